"""A plan that another machine wrote is data of bounded size, in one spelling; anything else has a code of its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.config.canonical import canonical_json
from fedtune.errors import PolicyError
from fedtune_client.policy.limits import simulation_policy
from fedtune_client.policy.plans import read_plan
from fedtune_client.policy.rules import judge
from fedtune_client.policy.schema import Policy
from tests.client.policy.conftest import plan_text, plan_tree, policy_tree
from tests.support.bench import make_bench


def code_of(text: str) -> str:
    with pytest.raises(PolicyError) as caught:
        read_plan(text)
    assert caught.value.hint
    return caught.value.code.removeprefix("policy.plan-")


def test_a_plan_as_it_travels_is_read() -> None:
    plan = read_plan(plan_text())
    assert plan.json_text == plan_text()
    assert plan.task.labels == ("card/lost", "loan")


def test_a_plan_that_fedtune_made_is_read_and_its_simulation_allows_it(tmp_path: Path) -> None:
    plan = make_bench(tmp_path, privacy__unit="patient_id", evaluation__site_metrics="noisy").plan
    assert read_plan(plan.json_text) == plan
    assert judge(plan, simulation_policy(plan), approved=False, units=1) == ()


@pytest.mark.parametrize("key", ["extra", "data__extra", "data__task__extra", "privacy__extra", "lora__extra"])
def test_an_unknown_key_is_refused_at_every_depth(key: str) -> None:
    assert code_of(plan_text(**{key: 1})) in {"unknown-key", "promise", "task"}


@pytest.mark.parametrize("key", ["_target_", "model___target_", "data__task___target_", "privacy___args_"])
def test_a_key_that_names_something_to_execute_is_refused(key: str) -> None:
    assert code_of(plan_text(**{key: "os.system"})) == "executable"


def test_a_missing_key_is_refused() -> None:
    assert code_of(plan_text(seed="del")) == "missing-key"
    assert code_of(plan_text(privacy__noise="del")) == "promise"


PATHS = ["/etc/passwd", "../secrets", "a/../../b", "~/x", "C:\\x", "a\\b", "file://x", ".", "./x", "\x1b[2J", "x" * 300]
NAMES = ["model__name", "model__architecture", "data__task__columns__text", "data__partition__column", "privacy__unit"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("key", NAMES)
def test_a_path_is_refused_where_a_name_belongs(key: str, path: str) -> None:
    assert code_of(plan_text(**{key: path})) == "path"


@pytest.mark.parametrize("path", PATHS)
def test_a_path_is_refused_among_targets_and_in_every_short_name(path: str) -> None:
    assert code_of(plan_text(lora__targets=["q_proj", path])) == "path"
    for key in ("name", "purpose", "data__name"):
        assert code_of(plan_text(**{key: path})) == "bad-value"


def test_labels_and_model_names_may_hold_slashes() -> None:
    assert read_plan(plan_text(data__task__labels=["../a", "/b", "n/a"])).task.labels == ("../a", "/b", "n/a")
    assert read_plan(plan_text(model__name="sentence-transformers/all-MiniLM-L6-v2"))


@pytest.mark.parametrize("digest", ["../../etc", "AB" * 32, "ab" * 31, ""])
def test_a_hash_is_a_hash(digest: str) -> None:
    assert code_of(plan_text(model__sha256=digest)) == "bad-value"
    assert code_of(plan_text(adapter__layout_sha256=digest)) == "bad-value"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("adapter__upload", -1),
        ("adapter__upload_bytes", 0),
        ("data__max_tokens", -5),
        ("data__holdout", 1.0),
        ("data__limit", 0),
        ("model__head_scale", 0.0),
    ],
)
def test_a_size_that_cannot_be_is_refused(key: str, value: float) -> None:
    assert code_of(plan_text(**{key: value})) == "bad-value"


@pytest.mark.parametrize(
    "number", ["1" + "0" * 5000, "1" + "0" * 30, "1e999", "-1e999", "NaN", "Infinity", "1e300", "0." + "1" * 100]
)
@pytest.mark.parametrize("key", ["seed", "max_steps", "max_tokens", "noise_multiplier"])
def test_a_number_that_no_setting_holds_is_refused(key: str, number: str) -> None:
    start = plan_text().index(f'"{key}":') + len(key) + 3
    end = min(at for mark in ",}" if (at := plan_text().find(mark, start)) > 0)
    assert code_of(plan_text()[:start] + number + plan_text()[end:]) == "number"


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (lambda: plan_text(data__task__labels=["x" * 10_000_000]), "too-large"),
        (lambda: "[" * 900_000, "too-deep"),
        (lambda: '{"a":' * 100_000, "too-deep"),
        (lambda: plan_text(data__task=json.loads("[" * 30 + "]" * 30)), "too-deep"),
        (lambda: '"' * 900_000, "not-json"),
        (lambda: '{"a\\' * 100_000, "too-deep"),
        (lambda: "", "not-json"),
        (lambda: "[]", "not-json"),
        (lambda: plan_text()[:-1], "not-json"),
        (lambda: json.dumps(plan_tree()), "not-canonical"),
        (lambda: f"{plan_text()}\n", "not-canonical"),
        (lambda: plan_text(seed="7"), "not-canonical"),
        (lambda: plan_text()[:-1] + ',"seed":7}', "not-canonical"),
        (lambda: plan_text().replace('"bert"', '"\\ud800"'), "not-canonical"),
        (lambda: plan_text(schema_version=2), "bad-value"),
        (lambda: plan_text(lora__rank=-1), "bad-value"),
        (lambda: plan_text(privacy__mode="none"), "promise"),
        (lambda: plan_text(privacy__epsilon="3"), "promise"),
        (lambda: plan_text(privacy__noise_multiplier=0.0), "promise"),
        (lambda: plan_text(privacy__max_steps=1.5), "promise"),
        (lambda: plan_text(privacy__unit=5), "promise"),
        (lambda: plan_text(privacy__unit=["a"]), "promise"),
        (lambda: plan_text(privacy__relation="replace one"), "promise"),
        (lambda: plan_text(data__task__style="code"), "task"),
        (lambda: plan_text(data__task__labels=["b", "a"]), "task"),
    ],
)
def test_each_kind_of_bad_plan_has_a_code(make: Callable[[], str], code: str) -> None:
    assert code_of(make()) == code


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
PLACES = [(), ("privacy",), ("data",), ("data", "task"), ("data", "task", "columns"), ("model",), ("lora",)]


def plan_or_refusal(text: str) -> str:
    try:
        plan = read_plan(text)
    except PolicyError as error:
        return error.code
    judge(plan, Policy.model_validate(policy_tree()), approved=False, units=None)
    return plan.json_text


@given(data=st.data(), value=json_values)
def test_whatever_a_coordinator_writes_is_a_plan_or_a_refusal(data: st.DataObject, value: Any) -> None:
    tree = plan_tree()
    place = tree
    for word in data.draw(st.sampled_from(PLACES)):
        place = place[word]
    place[data.draw(st.sampled_from(sorted(place)))] = value
    text = canonical_json(tree) if data.draw(st.booleans()) else json.dumps(tree)
    outcome = plan_or_refusal(text)
    assert outcome == text or (outcome.startswith("policy.plan-") and len(outcome) <= 64)


@given(text=st.text(max_size=200))
def test_no_text_is_too_strange_to_be_refused(text: str) -> None:
    with pytest.raises(PolicyError):
        read_plan(text)
