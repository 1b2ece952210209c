"""How a release is used without fedtune, as Python that runs beside the base model."""

from __future__ import annotations

from fedtune.config.plan import StudyPlan

_BASE = "# SHA-256 of the content: {sha256}"
_ADAPTER = {
    "pooled": """\
from peft import PeftModel
from transformers import AutoModel

base = AutoModel.from_pretrained("{name}")  {hash}
encoder = PeftModel.from_pretrained(base, "adapter")  # the LoRA part; the head is head.safetensors
""",
    "architecture": """\
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

base = AutoModelForSequenceClassification.from_pretrained("{name}", num_labels={labels}{pad})  {hash}
model = PeftModel.from_pretrained(base, "adapter")  # with the head, which was trained whole
""",
    "none": """\
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("{name}")  {hash}
model = PeftModel.from_pretrained(base, "adapter")
""",
}
_MERGED = {
    "pooled": """\
from transformers import AutoModel

encoder = AutoModel.from_pretrained("merged")  # the head is head.safetensors
""",
    "architecture": """\
from transformers import AutoModelForSequenceClassification

model = AutoModelForSequenceClassification.from_pretrained("merged")
""",
    "none": """\
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("merged")
""",
}
_POOLED = """
Logits are {scale:g} · W · e with `head.weight` W and e the mean of the last hidden states over a text's tokens, divided
by its norm{centre}. The labels, in the order of the rows of W, are in `fedtune.json`."""


def use_of(plan: StudyPlan, kind: str, pad_id: int | None = None) -> str:
    """Return the Markdown of a card's section on use, for a folder of this kind that lies in the working directory.

    `pad_id` is the token that fills batches; a decoder's own head reads the last token that is another.
    """
    code = (_MERGED if kind == "merged" else _ADAPTER)[plan.model.head]
    pad = "" if pad_id is None else f", pad_token_id={pad_id}"
    base = _BASE.format(sha256=plan.model.sha256)
    filled = code.format(name=plan.model.name, labels=len(plan.task.labels), pad=pad, hash=base)
    head = _pooled(plan) if plan.model.head == "pooled" else ""
    with_fedtune = "`fedtune predict` and `fedtune evaluate` use the whole; other tools load the LoRA part:"
    first = "Without fedtune:" if kind == "merged" else with_fedtune
    return f"{first}\n\n```python\n{filled}```\n{head}".rstrip()


def _pooled(plan: StudyPlan) -> str:
    centred = plan.model.head_center == "labels"
    centre = "; then minus `centre` and divided by its norm again" if centred else ""
    return _POOLED.format(scale=plan.model.head_scale, centre=centre)


def gguf_use(plan: StudyPlan, file: str, *, merged: bool) -> str:
    """Return the Markdown of how a GGUF file is used with llama.cpp."""
    if merged:
        return f"The whole model in one file, with its tokenizer:\n\n```sh\nllama-cli -m {file}\n```"
    return (
        f"An adapter for a GGUF file of the same base, {plan.model.name} (SHA-256 of its content: "
        f"{plan.model.sha256}):\n\n```sh\nllama-cli -m BASE.gguf --lora {file}\n```"
    )


def ollama_use(plan: StudyPlan) -> str:
    """Return the Markdown of how a folder for Ollama is used, in that folder."""
    name = plan.name.lower()
    return (
        "With Ollama, in this folder; the template is the one of training:\n\n"
        f"```sh\nollama create {name} -f Modelfile\nollama run {name}\n```"
    )
