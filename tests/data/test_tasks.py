import json
from typing import Any

import pytest

from fedtune.config.schema import DataSettings
from fedtune.data.labels import find_labels
from fedtune.data.tasks import Task, find_task
from fedtune.errors import DataError


@pytest.mark.parametrize(
    ("columns", "style", "used"),
    [
        (["id", "text", "label"], "classification", ("text", "label")),
        (["Sentence", "Category"], "classification", ("Sentence", "Category")),
        (["text", "intent"], "classification", ("text", "intent")),
        (["text", "label", "category"], "classification", ("text", "label")),
        (["text", "bank"], "text", ("text",)),
        (["prompt", "completion"], "prompt", ("prompt", "completion")),
        (["site", "question", "answer"], "prompt", ("question", "answer")),
        (["instruction", "output"], "instruction", ("instruction", "output")),
        (["output", "input", "instruction"], "instruction", ("instruction", "input", "output")),
        (["instruction", "response"], "instruction", ("instruction", "response")),
        (["messages", "id"], "messages", ("messages",)),
    ],
)
def test_usual_names_are_recognised(columns: list[str], style: str, used: tuple[str, ...]) -> None:
    task = find_task(DataSettings(), columns)
    assert (task.style, task.used) == (style, used)
    assert task.kind == ("classification" if style == "classification" else "causal-lm")


@pytest.mark.parametrize(
    ("keys", "style", "used"),
    [
        ({"text": "body", "label": "kind"}, "classification", ("body", "kind")),
        ({"label": "kind"}, "classification", ("text", "kind")),
        ({"text": "body"}, "text", ("body",)),
        ({"text": "body", "task": "classification"}, "classification", ("body", "label")),
        ({"prompt": "question"}, "prompt", ("question", "completion")),
        ({"completion": "body"}, "prompt", ("prompt", "body")),
        ({"output": "body"}, "instruction", ("instruction", "input", "body")),
        ({"messages": "body"}, "messages", ("body",)),
        ({"task": "classification"}, "classification", ("text", "label")),
    ],
)
def test_named_columns_win_over_usual_ones(keys: dict[str, str], style: str, used: tuple[str, ...]) -> None:
    columns = ["text", "label", "prompt", "completion", "instruction", "input", "messages", "body", "kind", "question"]
    task = find_task(DataSettings(**keys), columns)
    assert (task.style, task.used) == (style, used)


@pytest.mark.parametrize(
    ("keys", "columns", "code"),
    [
        ({}, ["text", "label", "prompt", "completion"], "ambiguous-task"),
        ({}, ["messages", "text"], "ambiguous-task"),
        ({}, ["text", "category", "intent"], "ambiguous-task"),
        ({}, ["a", "b"], "no-task"),
        ({"task": "classification"}, ["prompt", "completion"], "no-task"),
        ({"text": "a", "prompt": "b"}, ["a", "b"], "conflicting-columns"),
        ({"label": "a", "task": "causal-lm"}, ["a", "text"], "conflicting-columns"),
        ({"prompt": "a"}, ["a", "b"], "missing-column"),
    ],
)
def test_what_cannot_be_told_is_an_error_that_names_the_keys(
    keys: dict[str, str], columns: list[str], code: str
) -> None:
    with pytest.raises(DataError) as caught:
        find_task(DataSettings(**keys), columns)
    assert caught.value.code == f"data.{code}"
    assert "data." in caught.value.hint


def test_a_task_travels_as_json_and_comes_back_equal() -> None:
    task = find_task(DataSettings(), ["text", "category"]).with_labels(["b", "a", "b"])
    assert task.labels == ("a", "b")
    assert Task.from_dict(json.loads(json.dumps(task.to_dict()))) == task


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"style": "poem", "columns": {"text": "a"}, "labels": []},
        {"style": "text", "columns": {}, "labels": []},
        {"style": "text", "columns": {"text": "a", "label": "b"}, "labels": []},
        {"style": "text", "columns": {"text": 3}, "labels": []},
        {"style": "text", "columns": {"text": "a"}, "labels": "ab"},
        {"style": "classification", "columns": {"text": "a", "label": "b"}, "labels": ["y", "x"]},
        {"style": "text", "columns": {"text": "a"}, "labels": [], "path": "/somewhere"},
    ],
)
def test_a_task_that_another_machine_made_up_is_refused(value: dict[str, Any]) -> None:
    with pytest.raises(DataError) as caught:
        Task.from_dict(value)
    assert caught.value.code == "data.bad-task"


LABELLED = Task("classification", {"text": "text", "label": "label"})


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        (["b", "a", "b "], ("a", "b")),
        ([2, 10, 2], ("10", "2")),
        ([1.0, 0.0, 1.0], ("0", "1")),
        ([0.5, 1.5, 0.5], ("0.5", "1.5")),
        ([True, False, True], ("false", "true")),
    ],
)
def test_labels_are_sorted_text_whatever_their_type(make_table: Any, values: list[object], labels: tuple[str]) -> None:
    assert find_labels(make_table(text=["x"] * 3, label=values), LABELLED) == labels


def test_a_label_column_of_free_text_is_refused(make_table: Any) -> None:
    table = make_table(text=["x"] * 30, label=[f"opinion {at}" for at in range(30)])
    with pytest.raises(DataError) as caught:
        find_labels(table, LABELLED)
    assert caught.value.code == "data.labels-look-like-text"
    assert "30" in caught.value.message
    assert "data.label" in caught.value.hint


@pytest.mark.parametrize("missing", [None, "", "  ", float("nan")])
def test_a_missing_label_is_named_by_its_line(make_table: Any, missing: object) -> None:
    with pytest.raises(DataError) as caught:
        find_labels(make_table(text=["x"] * 3, label=["a", missing, "b"]), LABELLED)
    assert caught.value.code == "data.blank-value"
    assert "bank.csv, line 3" in caught.value.message
