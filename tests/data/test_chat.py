from typing import Any

import pytest

from fedtune.data.chat import lay_out
from fedtune.data.records import Dialogue, Turn
from fedtune.data.tasks import Task
from fedtune.data.templates import IGNORED, render
from fedtune.errors import DataError

MESSAGES = Task("messages", {"messages": "m"})
CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# Writes the sequence's beginning itself and trims the content, as many templates do.
TRIMMED = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
# Writes an empty reasoning block into the last turn only, so that an earlier dialogue is no prefix of a later one.
REASONING = (
    "{% for m in messages %}<|{{ m.role }}|>"
    "{% if loop.last and m.role == 'assistant' %}<think></think>{% endif %}{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# Counts the turns at the top: no earlier dialogue has a place in a later one.
COUNTING = "{{ messages | length }} turns: {% for m in messages %}{{ m.content }};{% endfor %}"
# Wants user and assistant in turn.
STRICT = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}{% endfor %}"


def dialogue(*turns: str) -> Dialogue:
    roles = {"s": "system", "u": "user", "a": "assistant"}
    return Dialogue(tuple(Turn(roles[turn[0]], turn[2:]) for turn in turns))


def bracketed(said: Dialogue, tokenizer: Any) -> str:
    return "".join(f"[[{part.text}]]" if part.trained else part.text for part in lay_out(said, tokenizer))


def test_each_turn_of_the_assistant_is_trained_with_its_end_marker(make_tokenizer: Any) -> None:
    said = dialogue("s:Be kind.", "u:Hi", "a:Hello", "u:Bye", "a:Ciao")
    assert bracketed(said, make_tokenizer(chat=CHATML)) == (
        "<|system|>Be kind.<|end|>\n<|user|>Hi<|end|>\n<|assistant|>[[Hello<|end|>\n]]"
        "<|user|>Bye<|end|>\n<|assistant|>[[Ciao<|end|>\n]]"
    )


@pytest.mark.parametrize("chat", [CHATML, None])
def test_turns_after_the_assistants_last_are_dropped(make_tokenizer: Any, chat: str | None) -> None:
    shorter, longer = dialogue("u:Hi", "a:Hello"), dialogue("u:Hi", "a:Hello", "u:Bye")
    tokenizer = make_tokenizer(chat=chat)
    assert lay_out(longer, tokenizer) == lay_out(shorter, tokenizer)


def test_a_template_that_treats_the_last_turn_differently_keeps_exact_bounds(make_tokenizer: Any) -> None:
    said = dialogue("u:Hi", "a:Hello", "u:Bye", "a:Ciao")
    assert bracketed(said, make_tokenizer(chat=REASONING)) == (
        "<|user|>Hi<|end|><|assistant|>[[Hello<|end|>]]<|user|>Bye<|end|><|assistant|>[[<think></think>Ciao<|end|>]]"
    )


@pytest.mark.parametrize("chat", [CHATML, TRIMMED, REASONING])
def test_the_segments_together_are_the_templates_own_text(make_tokenizer: Any, chat: str) -> None:
    tokenizer = make_tokenizer(bos="<s>", eos="</s>", chat=chat)
    said = dialogue("u: Hi ", "a: Hello ", "u:Hello again", "a:Hello", "u:Hello", "a:Hello Hello")
    whole = tokenizer.apply_chat_template(
        [{"role": turn.role, "content": turn.content} for turn in said.turns], tokenize=False
    )
    assert "".join(part.text for part in lay_out(said, tokenizer)) == whole


def test_the_tokens_of_a_dialogue_are_trained_exactly_where_the_assistant_speaks(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer(bos="<s>", eos="</s>", chat=TRIMMED)
    example = render(dialogue("u:Hi", "a:Yo", "u:Bye", "a:Ok"), tokenizer, MESSAGES, 99)
    assert example.labels is not None
    assert tokenizer.decode(example.input_ids) == "<s>[user]Hi</s>[assistant]Yo</s>[user]Bye</s>[assistant]Ok</s>"
    assert tokenizer.decode(example.labels[example.labels != IGNORED]) == "Yo</s>Ok</s>"
    assert example.input_ids.tolist().count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize(("eos", "stop"), [("</s>", "</s>"), (None, "\n\n")])
def test_a_tokenizer_without_a_template_gets_ours(make_tokenizer: Any, eos: str | None, stop: str) -> None:
    said = dialogue("s:Be kind.", "u:Hi", "a:Hello", "u:Bye", "a:Ciao")
    assert bracketed(said, make_tokenizer(eos=eos)) == (
        f"System:\nBe kind.\n\nUser:\nHi\n\nAssistant:\n[[Hello{stop}]]User:\nBye\n\nAssistant:\n[[Ciao{stop}]]"
    )


@pytest.mark.parametrize("chat", [COUNTING, STRICT])
def test_a_template_that_gives_no_exact_bounds_is_refused(make_tokenizer: Any, chat: str) -> None:
    with pytest.raises(DataError) as caught:
        lay_out(dialogue("s:Be kind.", "u:Hi", "a:Hello", "u:Bye", "a:Ciao"), make_tokenizer(chat=chat))
    assert caught.value.code == "data.chat-template"
