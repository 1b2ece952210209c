"""What generation starts from is what training had before the answer, token for token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.data.records import Record, to_records
from fedtune.data.tasks import Task
from fedtune.data.templates import IGNORED, render
from fedtune.errors import DataError
from fedtune.generation.prompts import input_columns, prompt_of, text_of, unanswered

if TYPE_CHECKING:
    from fedtune.data.table import Table

TEXT = Task("text", {"text": "t"})
PROMPT = Task("prompt", {"prompt": "q", "completion": "a"})
INSTRUCTION = Task("instruction", {"instruction": "i", "input": "n", "output": "o"})
MESSAGES = Task("messages", {"messages": "m"})
CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content | trim }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
OWN_START = "{{ bos_token }}" + CHATML
# What a chat model that reasons writes in front of its last answer alone.
REASONING = (
    "{% for m in messages %}<|{{ m.role }}|>"
    "{% if loop.last and m.role == 'assistant' %}<think></think>{% endif %}{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
words = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12).filter(
    str.strip
)


def trained_prefix(record: Record, tokenizer: Any, task: Task, max_tokens: int = 10_000) -> list[int]:
    """Return a training example's tokens before its last trained stretch, found by its labels alone."""
    example = render(record, tokenizer, task, max_tokens)
    assert example.labels is not None
    labels = example.labels.tolist()
    while labels and labels[-1] != IGNORED:
        labels.pop()
    return example.input_ids.tolist()[: len(labels)]


def assert_equal_to_training(table: Table, task: Task, tokenizer: Any) -> None:
    """Compare prompts made without the answers with what training made of the whole rows."""
    trained = [trained_prefix(record, tokenizer, task) for record in to_records(table, task)]
    waiting = unanswered(table.select(input_columns(task)), task)
    assert [list(prompt_of(record, tokenizer, task, 10_000).tokens) for record in waiting] == trained


@pytest.fixture(params=["bytes", "bytes with both ends", "merges across the boundary", "SentencePiece"])
def tokenizer(request: pytest.FixtureRequest, make_tokenizer: Any) -> Any:
    if request.param == "SentencePiece":
        return request.getfixturevalue("stories")
    ends = {"bos": "<s>", "eos": "</s>"} if "ends" in request.param else {}
    merges = (("Ċ", "A"), ("x", "A"), ("Ċ", "Ċ")) if "merges" in request.param else ()
    return make_tokenizer(**ends, merges=merges)


@pytest.mark.parametrize("answer", ["A", "Answer it", "é"])
def test_a_prompt_is_what_training_had_before_the_completion(tokenizer: Any, make_table: Any, answer: str) -> None:
    table = make_table(q=["Who?", "Who is it?\n", "a b "], a=[answer] * 3)
    assert_equal_to_training(table, PROMPT, tokenizer)


def test_an_instruction_is_what_training_had_before_the_output(tokenizer: Any, make_table: Any) -> None:
    table = make_table(i=["Sum up.", "Greet."], n=["A long text", ""], o=["A", "Hello"])
    assert_equal_to_training(table, INSTRUCTION, tokenizer)


@pytest.mark.parametrize("chat", [None, CHATML, OWN_START, REASONING])
def test_a_dialogue_is_what_training_had_before_the_last_answer(
    tokenizer: Any, make_table: Any, chat: str | None
) -> None:
    tokenizer.chat_template = chat
    said = [("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Bye"), ("assistant", "Ciao")]
    messages = [{"role": role, "content": content} for role, content in said]
    table = make_table(m=[messages, messages[1:3]])
    assert_equal_to_training(table, MESSAGES, tokenizer)
    open_ended = make_table(m=[messages[:-1], messages[1:2]])
    assert [prompt_of(record, tokenizer, MESSAGES, 9999) for record in unanswered(open_ended, MESSAGES)] == [
        prompt_of(record, tokenizer, MESSAGES, 9999) for record in unanswered(table, MESSAGES)
    ]
    tokenizer.chat_template = None


def test_a_chat_template_that_writes_the_beginning_itself_does_not_get_two(
    make_tokenizer: Any, make_table: Any
) -> None:
    tokenizer = make_tokenizer(bos="<s>", eos="</s>", chat=OWN_START)
    (record,) = unanswered(make_table(m=[[{"role": "user", "content": "Hi"}]]), MESSAGES)
    tokens = prompt_of(record, tokenizer, MESSAGES, 9999).tokens
    assert tokens.count(tokenizer.bos_token_id) == 1
    assert tokenizer.decode(tokens) == "<s><|user|>\nHi<|end|>\n<|assistant|>\n"


def test_a_text_is_continued_where_training_would_go_on(tokenizer: Any, make_table: Any) -> None:
    begun, whole = "Once upon a time", "Once upon a time there was"
    (record,) = unanswered(make_table(t=[begun]), TEXT)
    (longer,) = to_records(make_table(t=[whole]), TEXT)
    prompt = list(prompt_of(record, tokenizer, TEXT, 999).tokens)
    assert render(longer, tokenizer, TEXT, 999).input_ids.tolist()[: len(prompt)] == prompt
    assert tokenizer.eos_token_id is None or tokenizer.eos_token_id not in prompt


@settings(max_examples=60)
@given(prompts=st.lists(words, min_size=1, max_size=3), answer=words)
def test_any_prompt_is_what_training_had(make_tokenizer: Any, make_table: Any, prompts: list[str], answer: str) -> None:
    tokenizer = make_tokenizer(bos="<s>", eos="</s>", merges=(("Ċ", "a"), ("a", "a"), ("Ġ", "a")))
    table = make_table(q=prompts, a=[answer] * len(prompts))
    assert_equal_to_training(table, PROMPT, tokenizer)


@settings(max_examples=60)
@given(st.lists(words, min_size=1, max_size=5))
def test_any_dialogue_is_what_training_had(make_tokenizer: Any, make_table: Any, said: list[str]) -> None:
    tokenizer = make_tokenizer(bos="<s>", eos="</s>", chat=OWN_START, merges=(("Ċ", "a"), ("a", "a")))
    roles = ("user", "assistant") * len(said)
    messages = [{"role": role, "content": content} for role, content in zip(roles, [*said, *said], strict=True)]
    assert_equal_to_training(make_table(m=[messages]), MESSAGES, tokenizer)


def test_too_long_a_prompt_keeps_its_beginning_token_and_its_end(make_tokenizer: Any, make_table: Any) -> None:
    tokenizer = make_tokenizer(bos="<s>", eos="</s>")
    (record,) = unanswered(make_table(i=["a" * 200], n=[""]), INSTRUCTION)
    prompt = prompt_of(record, tokenizer, INSTRUCTION, 64)
    assert prompt.cut
    assert prompt.tokens[0] == tokenizer.bos_token_id
    assert len(prompt.tokens) <= 64
    assert text_of(prompt, tokenizer).endswith("a\n\nAnswer:\n")


@pytest.mark.parametrize(
    ("messages", "code"),
    [
        ([], "data.bad-messages"),
        ("Hi", "data.mixed-types"),
        (None, "data.blank-value"),
        ([{"role": "user"}], "bad-messages"),
    ],
)
def test_what_is_no_dialogue_is_refused_with_its_place(
    make_tokenizer: Any, make_table: Any, messages: Any, code: str
) -> None:
    with pytest.raises(DataError, match=code) as caught:
        unanswered(make_table(m=[messages]), MESSAGES)
    assert "line 2" in caught.value.message
