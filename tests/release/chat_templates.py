"""Chat formats of well-known families, as short Jinja of our own that writes the same text."""

from __future__ import annotations

from typing import Any

_ALTERNATE = (
    "{% for m in rest %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('user and assistant must alternate') }}{% endif %}{% endfor %}"
)
_REST = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set rest = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}"
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN2 = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    + CHATML
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL = (  # the first one: no system message
    "{{ bos_token }}{% set rest = messages %}" + _ALTERNATE + "{% for m in messages %}{% if m.role == 'user' %}"
    "[INST] {{ m.content }} [/INST]{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
MISTRAL_LAST = (  # the later one: the system message stands in the last question
    _REST + "{{ bos_token }}" + _ALTERNATE + "{% for m in rest %}{% if m.role == 'user' %}[INST] "
    "{% if loop.last and system or (loop.index0 == rest | length - 2 and rest[-1].role == 'assistant' and system) %}"
    "{{ system }}\n\n{% endif %}{{ m.content }}[/INST]{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
LLAMA2 = (
    _REST + _ALTERNATE + "{% for m in rest %}{% if m.role == 'user' %}{{ bos_token }}[INST] "
    "{% if loop.first and system %}<<SYS>>\n{{ system }}\n<</SYS>>\n\n{% endif %}{{ m.content | trim }} [/INST]"
    "{% else %} {{ m.content | trim }} {{ eos_token }}{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
PLAIN = None  # no chat template: fedtune's own layout
COUNTING = "{% for m in messages %}Turn {{ loop.index }} {{ m.role }}: {{ m.content }}\n{% endfor %}"
SHOUTING = "{% for m in messages %}{{ m.role }}: {{ m.content | upper }}\n{% endfor %}"

KNOWN = {
    "chatml": CHATML, "qwen2": QWEN2, "llama3": LLAMA3, "gemma": GEMMA, "mistral": MISTRAL,
    "mistral-last": MISTRAL_LAST, "llama2": LLAMA2, "zephyr": ZEPHYR, "plain": PLAIN,
}  # fmt: skip
PLACES = {
    "chatml": "turn", "qwen2": "turn", "llama3": "turn", "gemma": "none", "mistral": "none",
    "mistral-last": "last", "llama2": "first", "zephyr": "turn", "plain": "turn",
}  # fmt: skip
MARKS = ("<|im_end|>", "<|im_start|>", "<|eot_id|>", "<end_of_turn>", "<start_of_turn>")


def chatting(template: str | None, *, bos: bool = True) -> Any:
    """Return a byte tokenizer with a chat template and the marks that the formats use."""
    from tokenizers import processors

    from tests.support.tiny import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    if not bos:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    tokenizer.add_special_tokens({"additional_special_tokens": list(MARKS)})
    return tokenizer
