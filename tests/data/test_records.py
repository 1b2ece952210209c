from typing import Any

import pytest

from fedtune.data.records import (
    Conversation,
    Dialogue,
    LabelledText,
    Segment,
    Turn,
    instruction_prompt,
    to_records,
)
from fedtune.data.tasks import Task
from fedtune.errors import DataError

CLASSES = Task("classification", {"text": "text", "label": "label"}, ("lost", "stolen"))
PROMPT = Task("prompt", {"prompt": "q", "completion": "a"})
INSTRUCTION = Task("instruction", {"instruction": "i", "input": "in", "output": "o"})


def test_a_label_becomes_its_place_among_the_studys_labels(make_table: Any) -> None:
    records = to_records(make_table(text=["a", "b"], label=["stolen", " lost "]), CLASSES)
    assert records == [LabelledText("a", 1), LabelledText("b", 0)]


def test_a_label_unseen_in_training_is_named_with_its_line(make_table: Any) -> None:
    with pytest.raises(DataError) as caught:
        to_records(make_table(text=["a", "b"], label=["lost", "eaten"]), CLASSES)
    assert caught.value.code == "data.unknown-label"
    assert "'eaten'" in caught.value.message
    assert "bank.csv, line 3" in caught.value.message


@pytest.mark.parametrize(
    ("prompt", "answer", "shown"), [("Q?", "A", "Q?\n"), ("Q? ", "A", "Q? "), ("Q?", " A", "Q?\n"), ("Q\n", "A", "Q\n")]
)
def test_a_prompt_and_its_answer_are_parted_once(make_table: Any, prompt: str, answer: str, shown: str) -> None:
    (record,) = to_records(make_table(q=[prompt], a=[answer]), PROMPT)
    assert record == Conversation((Segment(shown, trained=False), Segment(answer, trained=True)))


def test_an_instruction_with_and_without_an_input_is_laid_out(make_table: Any) -> None:
    records = to_records(make_table(i=["Sum up.", "Greet."], **{"in": ["a b", None]}, o=["ab", "Hi"]), INSTRUCTION)
    prompts = [record.segments[0].text for record in records if isinstance(record, Conversation)]
    assert prompts == [
        "Instruction:\nSum up.\n\nInput:\na b\n\nAnswer:\n",
        "Instruction:\nGreet.\n\nAnswer:\n",
    ]
    assert prompts[1] == instruction_prompt("Greet.")


def test_messages_keep_their_turns(make_table: Any) -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    (record,) = to_records(make_table(m=[turns]), Task("messages", {"messages": "m"}))
    assert record == Dialogue((Turn("user", "Hi"), Turn("assistant", "Hello")))


@pytest.mark.parametrize("missing", [None, "", " \n"])
def test_an_empty_completion_is_named_by_its_line(make_table: Any, missing: object) -> None:
    with pytest.raises(DataError) as caught:
        to_records(make_table(q=["a", "b"], a=["x", missing]), PROMPT)
    assert caught.value.code == "data.blank-value"
    assert "bank.csv, line 3: column 'a'" in caught.value.message
