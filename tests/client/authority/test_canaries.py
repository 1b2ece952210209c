"""Records without opt-in, planted with canaries: in no batch, no log, no message, no error and no file."""

from __future__ import annotations

import csv
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from fedtune.data.templates import Example
from fedtune.errors import ConsentError
from fedtune_client import operator
from tests.client.authority.conftest import MakeSite, MakeStudy
from tests.support.sites import RealSite, content_of
from tests.support.tiny import tiny_tokenizer

CANARY = "zqx9"
Row = tuple[str, str, str, str]
BY_COLUMN = {"opt_in": {"column": "consent", "values": ["yes"]}}
IN_LIST = {"opt_in": {"column": "patient_id", "file": "agreed.txt"}}
OUT_LIST = {"opt_out": {"column": "patient_id", "file": "refused.txt"}}
RULES: dict[str, Any] = {"a column": BY_COLUMN, "a list of who opted in": IN_LIST, "a list of who opted out": OUT_LIST}


@dataclass
class Seen:
    """What training and measuring were given, as text."""

    texts: list[str] = field(default_factory=list)

    def add(self, examples: Sequence[Example]) -> None:
        tokenizer = tiny_tokenizer()
        self.texts.extend(tokenizer.decode(example.input_ids) for example in examples)

    def take(self) -> str:
        found, self.texts = " ".join(self.texts), []
        return found


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """Everything that is put into a batch, and everything that a round could have put into one."""
    from fedtune.training import evaluate, local
    from fedtune_client import app

    found = Seen()
    for place, name in ((local, "collate"), (evaluate, "collate"), (app, "train_round"), (app, "measure")):
        monkeypatch.setattr(place, name, _seeing(getattr(place, name), found))
    return found


def _seeing(act: Any, seen: Seen) -> Any:
    def acting(*arguments: Any) -> Any:
        for argument in arguments:
            examples = getattr(argument, "examples", argument)
            if isinstance(examples, list) and examples and isinstance(examples[0], Example):
                seen.add(examples)
        return act(*arguments)

    return acting


def rows_of(people: range, refusing: range) -> Iterator[Row]:
    """Rows of those who agree, then of those who do not: their texts, labels and ids are canaries."""
    for number in range(40):
        yield (
            f"my card number {number}",
            ("card", "cash", "loan")[number % 3],
            f"p{people[number % len(people)]}",
            "yes",
        )
    for number in range(20):
        yield f"{CANARY} text {number}", "card" if number % 2 else f"{CANARY}-label", f"{CANARY}-p{number}", "no"


def write_rows(site: RealSite, rows: Iterator[Row]) -> None:
    with site.data.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "category", "patient_id", "consent"])
        writer.writerows(rows)


def write_lists(site: RealSite) -> None:
    (site.path / "agreed.txt").write_text("".join(f"p{number}\n" for number in range(8)))
    (site.path / "refused.txt").write_text("".join(f"{CANARY}-p{number}\n" for number in range(20)))


@pytest.fixture
def planted(make_a_site: MakeSite, make_other_study: MakeStudy) -> RealSite:
    site = make_a_site(study=make_other_study(evaluation__site_metrics="clear"), granted=False)
    write_rows(site, rows_of(range(8), range(20)))
    write_lists(site)
    return site


def files_with(canary: str, folder: Path, *but: str) -> list[str]:
    return [
        path.name
        for path in folder.rglob("*")
        if path.is_file() and path.name not in but and canary.encode() in path.read_bytes()
    ]


@pytest.mark.parametrize("rule", RULES)
def test_a_record_without_opt_in_is_nowhere_but_in_its_own_file(
    planted: RealSite,
    rule: str,
    seen: Seen,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    planted.adopt(data__claims__consent=RULES[rule])
    with caplog.at_level(logging.DEBUG):
        planted.grant()
        replies = [planted.ask(kind, number) for kind, number in (("query.describe", 0), ("train", 1), ("evaluate", 1))]
    assert all(reply.content["fedtune"]["kind"] != "refusal" for reply in replies)
    texts = seen.take()
    assert "my card" in texts
    assert CANARY not in texts
    assert CANARY not in caplog.text + "".join(capfd.readouterr())
    assert CANARY not in "".join(repr(content_of(reply.content)) + repr(reply.metadata) for reply in replies)
    assert files_with(CANARY, planted.path, "claims.csv", "refused.txt") == []
    assert files_with(CANARY, planted.study.machine_file.parent) == []
    vault = planted.open().vault
    assert all(CANARY.encode() not in vault.get(name) for name in vault.names())
    (noted,) = planted.entries("records-consented")
    assert noted["units"] == 40


def test_control_without_a_rule_the_canaries_are_in_batches(planted: RealSite, seen: Seen) -> None:
    write_rows(
        planted, (row if CANARY not in row[1] else (row[0], "card", *row[2:]) for row in rows_of(range(8), range(20)))
    )
    planted.grant()
    planted.update(1)
    assert CANARY in seen.take()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("trouble", ["a blank text", "a label that no plan has", "a failure in training"])
def test_an_error_at_a_site_says_nothing_of_a_record_without_opt_in(
    planted: RealSite,
    rule: str,
    trouble: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    rows = list(rows_of(range(8), range(20)))
    if trouble == "a blank text":
        rows[5] = ("", *rows[5][1:])
    elif trouble == "a label that no plan has":
        rows[5] = (rows[5][0], "unheard-of", *rows[5][2:])
    else:
        monkeypatch.setattr("fedtune.training.local.clip_and_sum", None)
    write_rows(planted, iter(rows))
    planted.adopt(data__claims__consent=RULES[rule])
    with caplog.at_level(logging.DEBUG):
        planted.grant()
        reply = planted.ask("train", 1)
    assert reply.content["fedtune"]["kind"] == "refusal"
    assert "Traceback" in caplog.text
    assert CANARY not in caplog.text + "".join(capfd.readouterr()) + repr(reply.content)
    assert files_with(CANARY, planted.path, "claims.csv", "refused.txt") == []


@pytest.mark.parametrize(
    "bad",
    [
        f'"{CANARY} never closed,card,p1,no\n',
        f"{CANARY},card,p1,no,{CANARY},{CANARY}\n",
        f"{CANARY}\n",
        f"\udcff{CANARY},a,b,no\n",
    ],
    ids=["an open quote", "too many cells", "too few cells", "no UTF-8"],
)
def test_a_row_that_cannot_be_read_is_not_quoted(
    planted: RealSite, bad: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    planted.adopt(data__claims__consent=BY_COLUMN)
    planted.grant()
    with planted.data.open("ab") as file:
        file.write(bad.encode("utf-8", "surrogateescape"))
    with caplog.at_level(logging.DEBUG):
        reply = planted.ask("train", 1)
    assert reply.content["fedtune"]["kind"] == "refusal"
    assert CANARY not in caplog.text + "".join(capfd.readouterr()) + repr(reply.content)


@pytest.mark.parametrize("same_times", [False, True])
@pytest.mark.parametrize("rule", ["a list of who opted in", "a list of who opted out"])
def test_who_opts_out_between_two_rounds_is_not_in_the_next(
    planted: RealSite, seen: Seen, rule: str, same_times: bool
) -> None:
    """Also when the new list has the length and the time of modification of the old one, as some tools leave it."""
    agreed, refused = planted.path / "agreed.txt", planted.path / "refused.txt"
    write_rows(planted, ((f"hello {who}", *rest, who, yes) for _, *rest, who, yes in rows_of(range(8), range(20))))
    agreed.write_text("".join(f"p{number}\n" for number in range(8)))
    refused.write_text(refused.read_text() + "# p3\n")
    planted.adopt(data__claims__consent=RULES[rule])
    planted.grant()
    planted.update(1)
    assert "hello p3" in seen.take()
    file, old, new = (agreed, "p3\n", "#3\n") if "opted in" in rule else (refused, "# p3\n", "p3 #\n")
    before = file.stat()
    file.write_text(file.read_text().replace(old, new))
    if same_times:
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    planted.update(2)
    texts = seen.take()
    assert "hello p4" in texts
    assert "hello p3" not in texts
    sources = [entry["source"] for entry in planted.entries("records-consented")]
    assert len(sources) == len(set(sources)) == 2


@pytest.mark.parametrize("rule", ["a list of who opted in", "a list of who opted out"])
def test_a_list_that_is_missing_allows_nobody(planted: RealSite, seen: Seen, rule: str) -> None:
    planted.adopt(data__claims__consent=RULES[rule])
    planted.grant()
    for name in ("agreed.txt", "refused.txt"):
        (planted.path / name).unlink()
    assert planted.refusal(1) == "consent.unreadable-list"
    write_lists(planted)
    planted.update(1)
    for name in ("agreed.txt", "refused.txt"):
        (planted.path / name).unlink()
    seen.take()
    assert planted.refusal(2) == "consent.unreadable-list"
    assert seen.take() == ""
    assert planted.charged == 1


def test_a_rule_about_a_column_that_is_not_there_allows_nobody(planted: RealSite, seen: Seen) -> None:
    planted.adopt(data__claims__consent=IN_LIST)
    planted.grant()
    planted.adopt(data__claims__consent={"opt_in": {"column": "agreement", "values": ["yes"]}})
    assert planted.refusal(1) == "consent.missing-column"
    with pytest.raises(ConsentError, match=r"consent\.missing-column"):
        planted.grant()
    assert seen.take() == ""


def test_where_nobody_opted_in_nothing_is_charged(planted: RealSite, seen: Seen) -> None:
    (planted.path / "agreed.txt").write_text("somebody else\n")
    planted.adopt(data__claims__consent=IN_LIST)
    planted.grant()
    assert planted.refusal(1) == "policy.few-units"
    assert seen.take() == ""
    assert planted.charged == 0


@pytest.mark.parametrize("least", [40, 41])
def test_the_least_number_of_units_is_of_those_who_opted_in(planted: RealSite, least: int) -> None:
    """The file holds 60 records; 40 of them may be used."""
    planted.adopt(data__claims__consent=BY_COLUMN, data__claims__min_units=least)
    planted.grant()
    if least == 40:
        planted.update(1)
    else:
        assert planted.refusal(1) == "policy.few-units"
        assert planted.charged == 0


def test_a_plan_that_takes_a_few_of_the_records_is_refused_where_few_are_too_few(
    make_a_site: MakeSite, make_other_study: MakeStudy
) -> None:
    site = make_a_site(study=make_other_study(data__limit=30), data__claims__min_units=31)
    assert site.refusal(1) == "policy.few-units"
    site.adopt(data__claims__min_units=30)
    site.update(1)


def test_an_opt_in_that_changes_in_training_is_of_the_next_round(
    planted: RealSite, seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A round has one set of records from RESERVE to its end, and its units are theirs."""
    planted.adopt(data__claims__consent=IN_LIST)
    planted.grant()
    from fedtune_client.authority import Authority

    reserve = Authority.reserve

    def changing(*arguments: Any) -> Any:
        found = reserve(*arguments)
        (planted.path / "agreed.txt").write_text("p1\n")
        return found

    monkeypatch.setattr(Authority, "reserve", changing)
    planted.update(1)
    first = seen.take()
    monkeypatch.setattr(Authority, "reserve", reserve)
    planted.update(2)
    assert len(seen.take()) < len(first) / 2


def test_a_revocation_leaves_the_choice_of_records_in_the_trail(planted: RealSite) -> None:
    planted.adopt(data__claims__consent=IN_LIST)
    grant = planted.grant()
    planted.update(1)
    operator.revoke(planted.open(), grant, "asked to")
    assert planted.refusal(2) == "consent.not-granted"
    kinds = [entry["kind"] for entry in planted.entries()]
    assert kinds.index("records-consented") < kinds.index("reserve") < kinds.index("consent-revoked")


@pytest.mark.parametrize("opted_out", [False, True])
def test_seeded_noise_is_not_drawn_again_over_other_records(
    make_a_site: MakeSite, make_other_study: MakeStudy, opted_out: bool
) -> None:
    """Two updates with one noise would differ by exactly what the missing records contribute."""
    site = make_a_site(study=make_other_study(privacy__noise="seeded"), granted=False)
    write_rows(site, rows_of(range(8), range(20)))
    write_lists(site)
    site.adopt(data__claims__consent=IN_LIST)
    site.grant()
    first = content_of(site.ask(number=1).content)
    if opted_out:
        (site.path / "agreed.txt").write_text("p1\np2\np3\np4\n")
        assert site.refusal(1) == "ledger.not-repeatable"
    else:
        assert content_of(site.restart().ask(number=1).content) == first
    assert site.charged == 1
