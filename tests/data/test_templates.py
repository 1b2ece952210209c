from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.data.records import Conversation, Dialogue, LabelledText, Record, Segment, Turn, to_records
from fedtune.data.tasks import Task
from fedtune.data.templates import IGNORED, Example, render, render_all, special_tokens

CLASSES = Task("classification", {"text": "text", "label": "label"}, ("a", "b"))
TEXT = Task("text", {"text": "text"})
PROMPT = Task("prompt", {"prompt": "q", "completion": "a"})
INSTRUCTION = Task("instruction", {"instruction": "i", "output": "o"})
MESSAGES = Task("messages", {"messages": "m"})


def shown(example: Example, tokenizer: Any) -> str:
    """Decode an example with its trained tokens in brackets: `Q\n[A</s>]`."""
    assert example.labels is not None
    out, open_bracket = "", False
    for token, label in zip(example.input_ids.tolist(), example.labels.tolist(), strict=True):
        assert label in {token, IGNORED}
        if (label != IGNORED) is not open_bracket:
            out += "]" if open_bracket else "["
            open_bracket = not open_bracket
        out += tokenizer.decode([token])
    return out + "]" * open_bracket


def answered(prompt: str, answer: str) -> Conversation:
    return Conversation((Segment(prompt, trained=False), Segment(answer, trained=True)))


def test_all_of_a_text_and_its_end_are_trained(make_tokenizer: Any, make_table: Any) -> None:
    tokenizer = make_tokenizer(bos="<s>", eos="</s>")
    (record,) = to_records(make_table(text=["Hello"]), TEXT)
    assert shown(render(record, tokenizer, TEXT, 50), tokenizer) == "<s>[Hello</s>]"


def test_only_the_completion_and_its_end_are_trained(make_tokenizer: Any, make_table: Any) -> None:
    tokenizer = make_tokenizer(bos="<s>", eos="</s>")
    (record,) = to_records(make_table(q=["Who?"], a=["Me"]), PROMPT)
    assert shown(render(record, tokenizer, PROMPT, 50), tokenizer) == "<s>Who?\n[Me</s>]"


def test_only_the_output_of_an_instruction_is_trained(make_tokenizer: Any, make_table: Any) -> None:
    tokenizer = make_tokenizer(eos="</s>")
    (record,) = to_records(make_table(i=["Greet."], o=["Hi"]), INSTRUCTION)
    example = render(record, tokenizer, INSTRUCTION, 99)
    assert shown(example, tokenizer) == "Instruction:\nGreet.\n\nAnswer:\n[Hi</s>]"


def test_without_an_end_token_nothing_is_appended(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer()
    assert shown(render(answered("Q\n", "A"), tokenizer, PROMPT, 50), tokenizer) == "Q\n[A]"


def test_an_end_token_already_there_is_not_doubled(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer(eos="</s>")
    assert shown(render(answered("Q\n", "A</s>"), tokenizer, PROMPT, 50), tokenizer) == "Q\n[A</s>]"


def test_a_merge_across_the_boundary_never_hides_the_start_of_the_completion(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer(merges=(("Q", "A"),))
    assert len(tokenizer("QA")["input_ids"]) == 1, "the control: the tokenizer does join the two"
    assert shown(render(answered("Q", "A"), tokenizer, PROMPT, 50), tokenizer) == "Q[A]"


@settings(max_examples=60, deadline=None)
@given(prompt=st.text(min_size=1, max_size=30), answer=st.text(min_size=1, max_size=30))
def test_the_tokens_before_the_completion_are_those_generation_starts_from(
    stories: Any, prompt: str, answer: str
) -> None:
    prompt, answer = prompt.replace("<", "("), answer.replace("<", "(")  # no special tokens by accident
    example = render(answered(prompt, answer), stories, PROMPT, 1000)
    assert example.labels is not None
    untrained = [int(token) for token, label in zip(example.input_ids, example.labels, strict=True) if label < 0]
    assert untrained == stories(prompt)["input_ids"]
    trained = example.labels[len(untrained) :].tolist()
    assert trained[-1] == stories.eos_token_id
    assert stories.decode(trained[:-1]).lstrip(" ") == stories.decode(stories(answer)["input_ids"][1:]).lstrip(" ")


def test_a_completion_in_mid_text_gets_no_space_in_front(stories: Any) -> None:
    example = render(answered("Once\n", "upon"), stories, PROMPT, 50)
    assert stories.decode(example.input_ids, skip_special_tokens=True) == "Once\nupon"


@pytest.mark.parametrize(
    ("prompt", "answer", "max_tokens", "expected"),
    [
        ("0123456789", "abcd", 16, "<s>0123456789[abcd</s>]"),
        ("0123456789", "abcd", 10, "<s>6789[abcd</s>]"),  # the prompt loses its left, the completion nothing
        ("0123456789", "abcdefghij", 9, "<s>6789[abcd]"),  # both too long: half of the room each
        ("01", "abcdefghij", 9, "<s>01[abcdef]"),  # the completion keeps its start and does not learn to stop
        ("0123456789", "abcd", 2, "<s>[a]"),
    ],
)
def test_what_is_too_long_loses_the_left_of_its_prompt_and_the_end_of_its_completion(
    make_tokenizer: Any, prompt: str, answer: str, max_tokens: int, expected: str
) -> None:
    tokenizer = make_tokenizer(bos="<s>", eos="</s>")
    example = render(answered(prompt, answer), tokenizer, PROMPT, max_tokens)
    assert shown(example, tokenizer) == expected
    assert example.length == len(prompt) + len(answer) + 2
    assert example.truncated is (example.length > max_tokens)


@settings(max_examples=100, deadline=None)
@given(
    prompt=st.text("abc ", min_size=1, max_size=40),
    answer=st.text("xyz", min_size=1, max_size=40),
    max_tokens=st.integers(2, 50),
    bos=st.booleans(),
)
def test_every_record_keeps_a_trained_token_and_the_limit(
    make_tokenizer: Any, prompt: str, answer: str, max_tokens: int, bos: bool
) -> None:
    tokenizer = make_tokenizer(bos="<s>" if bos else None, eos="</s>")
    example = render(answered(prompt, answer), tokenizer, PROMPT, max_tokens)
    assert example.labels is not None
    assert len(example.input_ids) == len(example.labels) == min(example.length, max_tokens)
    assert (example.labels != IGNORED).any()
    assert example.trained_tokens >= 1


def test_a_single_token_predicts_nothing_and_says_so(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer()
    example = render(Conversation((Segment("x", trained=True),)), tokenizer, TEXT, 50)
    assert example.trained_tokens == 0


def test_a_classified_text_keeps_its_beginning_within_the_special_tokens(minilm: Any) -> None:
    text = "where is my new card, I have been waiting for two weeks"
    example = render(LabelledText(text, 1), minilm, CLASSES, 6)
    assert minilm.convert_ids_to_tokens(example.input_ids.tolist()) == ["[CLS]", "where", "is", "my", "new", "[SEP]"]
    assert (example.target, example.truncated, example.labels) == (1, True, None)
    assert example.length == len(minilm(text)["input_ids"])


@settings(max_examples=50, deadline=None)
@given(text=st.text(max_size=60))
def test_a_classified_text_has_the_tokenizers_own_tokens(minilm: Any, text: str) -> None:
    example = render(LabelledText(text, 0), minilm, CLASSES, 40)
    assert example.input_ids.tolist() == minilm(text, truncation=True, max_length=40)["input_ids"]


def test_what_a_tokenizer_adds_by_itself_is_found(make_tokenizer: Any, minilm: Any, stories: Any) -> None:
    assert special_tokens(make_tokenizer()).before == ()
    assert special_tokens(minilm) == type(special_tokens(minilm))((101,), (102,))
    assert special_tokens(stories).before == (stories.bos_token_id,)


@pytest.mark.parametrize("task", [CLASSES, PROMPT, MESSAGES])
def test_an_example_does_not_depend_on_its_neighbours(make_tokenizer: Any, task: Task) -> None:
    tokenizer = make_tokenizer(bos="<s>", eos="</s>", merges=(("Q", "A"),))
    made: dict[str, list[Record]] = {
        "classification": [LabelledText("word " * at, 0) for at in range(1, 1200)],
        "prompt": [answered("Q" * at, "A" * (at % 7 + 1)) for at in range(1, 1200)],
        "messages": [Dialogue((Turn("user", "Q" * at), Turn("assistant", "A"))) for at in range(1, 1200)],
    }
    records = made[task.style]
    together = render_all(records, tokenizer, task, 30)
    for at in (0, 1, 500, 998, 1198):
        alone = render(records[at], tokenizer, task, 30)
        assert together[at].input_ids.tolist() == alone.input_ids.tolist()
        assert together[at].length == alone.length
        assert together[at].target == alone.target
