"""A policy file is data: what it says is what is read, and every mistake in it is named with its place."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedtune.errors import PolicyError
from fedtune_client.policy.reading import NAME, parse_policy, policy_keys, read_policy
from fedtune_client.policy.schema import Policy
from tests.client.policy.conftest import MakePolicy, policy_tree

EXAMPLE = Policy.strict_example()


def refused(text: str, code: str) -> PolicyError:
    with pytest.raises(PolicyError) as caught:
        parse_policy(text)
    assert caught.value.code == f"policy.{code}"
    assert caught.value.hint
    return caught.value


def with_line(old: str, new: str) -> str:
    assert EXAMPLE.count(old) == 1
    return EXAMPLE.replace(old, new)


def test_the_example_parses_and_its_round_trip_is_exact() -> None:
    policy = parse_policy(EXAMPLE)
    assert Policy.from_canonical(policy.canonical) == policy
    assert Policy.from_canonical(policy.canonical).sha256 == policy.sha256


def test_the_example_names_every_key_and_says_what_it_means() -> None:
    assert len(policy_keys()) > 45
    for key in policy_keys():
        word = key.rsplit(".", 1)[-1]
        lines = [line for line in EXAMPLE.splitlines() if f"{word}: " in f"{line} ".replace("  #", " #")]
        assert any("  # " in line for line in lines), key


def test_the_example_writes_out_the_defaults() -> None:
    named = parse_policy(EXAMPLE)
    required = {"privacy": {"study_epsilon": "3", "delta": "1e-6"}, "federation": {"require_secure_aggregation": "no"}}
    defaults = Policy.model_validate(required)
    for section in ("privacy", "training", "adapter", "federation", "evaluation", "require_approval", "version"):
        assert getattr(named, section) == getattr(defaults, section)


def test_the_hash_does_not_depend_on_order_comments_or_spelling(make_policy: MakePolicy) -> None:
    def shuffled(value: Any, order: random.Random) -> Any:
        if isinstance(value, dict):
            return {key: shuffled(value[key], order) for key in order.sample(sorted(value), len(value))}
        return order.sample(value, len(value)) if isinstance(value, list) else value

    expected = make_policy()
    for seed in range(20):
        text = yaml.safe_dump(shuffled(policy_tree(), random.Random(seed)), sort_keys=False)
        assert parse_policy(f"# a comment\n{text}\n# another\n").sha256 == expected.sha256
    respelt = {**policy_tree(), "tasks": "classification"}
    respelt["privacy"] = {**respelt["privacy"], "delta": "0.000001", "allow_off": "off"}
    assert parse_policy(yaml.safe_dump(respelt)).sha256 == expected.sha256


def test_every_value_changes_the_hash(make_policy: MakePolicy) -> None:
    changed = [
        make_policy(**{key: value})
        for key, value in {
            "privacy__delta": 2e-6,
            "data__claims__lifetime_epsilon": 3.5,
            "data__claims__consent": "none",
            "require_approval": False,
            "opening_hours": {"timezone": "UTC", "spans": []},
            "name": "other",
        }.items()
    ]
    assert len({policy.sha256 for policy in [make_policy(), *changed]}) == 7


def test_words_stay_as_they_are_written() -> None:
    policy = parse_policy(with_line("purposes: [research]", "purposes: [on, 007, 2024-01-01, null]"))
    assert policy.data["claims"].purposes == ("007", "2024-01-01", "null", "on")
    assert policy.evaluation.site_metrics == "off"


@pytest.mark.parametrize(
    ("old", "new", "nearest"),
    [
        ("max_rounds: 50", "max_round: 50", "training.max_rounds"),
        ("lifetime_epsilon: 8.0", "lifetime_epsilom: 8.0", "data.claims.lifetime_epsilon"),
        ("column: consent ", "colum: consent ", "data.claims.consent.opt_in.column"),
        ("  max_rank: 16", "  max_rank: 16\n  max_tokens: 3", "training.max_tokens"),
        ("timezone: UTC", "timezon: UTC", "opening_hours.timezone"),
    ],
)
def test_an_unknown_key_is_named_with_its_line_and_the_nearest(old: str, new: str, nearest: str) -> None:
    text = with_line(old, new)
    wrong = new.strip().splitlines()[-1].split(":")[0].strip()
    line = next(number for number, line in enumerate(text.splitlines(), 1) if line.strip().startswith(f"{wrong}:"))
    message = refused(text, "unknown-key").message
    if wrong == "max_tokens":
        line = text.splitlines().index("  max_tokens: 3  # of LoRA") + 1
    assert f"line {line}: " in message
    assert f"nearest: {nearest}" in message


def test_nothing_names_something_to_execute() -> None:
    refused(with_line("name: strict example", "_target_: os.system"), "unknown-key")
    refused(with_line("  claims:", "  _target_:"), "bad-value")
    refused(with_line("name: strict example", "name: !!python/object/apply:os.system [x]"), "tag")
    refused(with_line("name: strict example", "name: !!str x"), "tag")


def test_aliases_are_refused_before_they_expand() -> None:
    lines = [f"k{i + 1}: &k{i + 1} [*k{i}, *k{i}]" for i in range(20)]
    bomb = "\n".join(["k0: &k0 [x]", *lines])
    refused(bomb, "alias")
    refused("name: *nowhere", "alias")
    refused("<<: {name: x}", "unknown-key")


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (with_line("name: strict example", "name: a\nname: b"), "duplicate-key"),
        (with_line("max_rank: 16", "max_rank: 16\n  max_rank: 160"), "duplicate-key"),
        ("[" * 60_000, "bad-yaml"),
        ("a: [" * 15_000, "bad-yaml"),
        ("{" * 60_000, "bad-yaml"),
        ("x" * 70_000, "too-large"),
        ("a: 1\n---\na: 2", "bad-yaml"),
        ("- a", "bad-yaml"),
        ("a: [1", "bad-yaml"),
        ("name: \x00", "bad-yaml"),
        ("", "missing-key"),
        (with_line("    consent:", "    consent: maybe\n    unused:"), "unknown-key"),
    ],
)
def test_what_is_no_policy_is_refused_with_a_code(text: str, code: str) -> None:
    refused(text, code)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("study_epsilon: 3.0", "study_epsilon: .inf"),
        ("study_epsilon: 3.0", "study_epsilon: inf"),
        ("study_epsilon: 3.0", "study_epsilon: nan"),
        ("study_epsilon: 3.0", "study_epsilon: -1"),
        ("delta: 1.0e-6", "delta: 1"),
        ("max_rank: 16", "max_rank: 99999999999999999999"),
        ("max_rank: 16", "max_rank:"),
        ("site_metrics: off", "site_metrics: loud"),
        ("timezone: UTC", "timezone: ../../etc/passwd"),
        ("timezone: UTC", "timezone: Europe"),
        ('opens: "20:00"', "opens: 8pm"),
        ('opens: "20:00"', 'opens: "06:00"'),
        ("days: [mon, tue, wed, thu, fri]", "days: []"),
        ('values: ["yes"]', "values: []"),
        ("version: 1", "version: 2"),
        ("require_approval: true", "require_approval: perhaps"),
        ("clip_norm: any", "clip_norm: {min: 2, max: 1}"),
        ("clip_norm: any", "clip_norm: none"),
        ("  claims:", "  ../claims:"),
    ],
)
def test_a_value_that_cannot_be_is_named_with_its_line(old: str, new: str) -> None:
    text = with_line(old, new)
    changed = next(i for i, (a, b) in enumerate(zip(EXAMPLE.splitlines(), text.splitlines(), strict=True), 1) if a != b)
    message = refused(text, "bad-value").message
    assert f"line {changed}: " in message or f"line {changed - 1}: " in message


def test_all_mistakes_are_named_at_once() -> None:
    text = (
        EXAMPLE.replace("max_rank: 16", "max_rnk: 16")
        .replace("delta: 1.0e-6", "delta: 7")
        .replace("site_metrics: off", "site_metrics: x")
    )
    message = refused(text, "unknown-key").message
    assert all(
        word in message for word in ("3 mistakes", "adapter.max_rnk", "privacy.delta", "evaluation.site_metrics")
    )


def test_consent_has_four_forms(make_policy: MakePolicy) -> None:
    for consent in (
        "none",
        {"opt_in": {"column": "consent", "values": ["yes"]}},
        {"opt_in": {"column": "patient_id", "file": "agreed.txt"}},
        {"opt_out": {"column": "patient_id", "file": "refused.txt"}},
    ):
        policy = make_policy(data__claims__consent=consent)
        assert json.loads(policy.canonical)["data"]["claims"]["consent"] == consent
    for wrong in ("all", {}, {"opt_in": "none"}, {"opt_out": {"column": "c", "values": ["no"]}}, "opt_in"):
        tree = policy_tree()
        tree["data"]["claims"]["consent"] = wrong
        with pytest.raises(PolicyError):
            parse_policy(yaml.safe_dump(tree))


def test_only_the_canonical_form_is_read_back(make_policy: MakePolicy) -> None:
    text = make_policy().canonical
    unsorted = json.dumps(dict(reversed(json.loads(text).items())), separators=(",", ":"))
    typed = text.replace('"max_rank":8', '"max_rank":"8"')
    for other in (f" {text}", unsorted, text[:-1], "[]", "{}", "[" * 100_000, typed):
        with pytest.raises(PolicyError, match="not-canonical"):
            Policy.from_canonical(other)


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    def code_of(path: Path) -> str:
        with pytest.raises(PolicyError) as caught:
            read_policy(path)
        return caught.value.code

    (tmp_path / "latin.yaml").write_bytes("name: café".encode("latin-1"))
    (tmp_path / "big.yaml").write_bytes(b"# \xc3\xa9" * 1_000_000)
    (tmp_path / "good.yaml").write_bytes(b"\xef\xbb\xbf" + EXAMPLE.encode())
    assert code_of(tmp_path / "none.yaml") == "policy.missing-file"
    assert code_of(tmp_path) == "policy.unreadable"
    assert code_of(Path("/dev/zero")) == "policy.unreadable"
    assert code_of(tmp_path / "latin.yaml") == "policy.unreadable"
    assert code_of(tmp_path / "big.yaml") == "policy.too-large"
    assert read_policy(tmp_path / "good.yaml") == parse_policy(EXAMPLE)


def test_every_key_of_a_data_set_is_known() -> None:
    assert f"data.{NAME}.lifetime_epsilon" in policy_keys()
    assert f"data.{NAME}.consent.opt_out.file" in policy_keys()
