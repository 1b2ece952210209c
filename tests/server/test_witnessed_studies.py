"""A site whose journal was put back, forked or exchanged takes no part; without the check each of them does."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from fedtune.errors import FederationError, JournalError
from fedtune.flower.messages import encode_reply
from fedtune.journal.witness import Head, Receipt, require_extends
from fedtune_server import witness as witness_module
from fedtune_server.coordinator_key import coordinator_key
from fedtune_server.witness import Witness
from tests.support.journals import MemoryJournal
from tests.support.studies import TinyStudy, site_name

if TYPE_CHECKING:
    from collections.abc import Callable

    from flwr.app import RecordDict

    from fedtune.flower.messages import Update

    MakeStudy = Callable[..., TinyStudy]

BAD = site_name(1)


def interrupted(make_study: MakeStudy, *overrides: str) -> tuple[TinyStudy, MemoryJournal]:
    """Return a study that stopped in round 3 for want of a quorum, and a copy of one site's journal from round 1."""
    study = make_study("federation.rounds=3", *overrides)
    copies: list[MemoryJournal] = []

    def copy(update: Update) -> RecordDict:
        copies.append(study.sites.journal(BAD).snapshot())
        return encode_reply(update)

    study.sites.twists = {(BAD, 1): copy, **{(site_name(index), 3): crash for index in range(4)}}
    with pytest.raises(FederationError, match="no-quorum"):
        study.start()
    study.sites.twists = {}
    return study, copies[0]


def crash(update: Update) -> RecordDict:
    raise ValueError


def rounds_of(summary: dict[str, list[dict[str, object]]], name: str) -> object:
    return {site["name"]: site["rounds"] for site in summary["sites"]}[name]


def test_every_site_that_takes_part_is_witnessed_each_round(make_study: MakeStudy) -> None:
    study = make_study("federation.rounds=3")
    summary = study.start()
    assert summary["refused"] == {}
    for index in range(4):
        name = site_name(index)
        lines = (study.folder.path / "heads" / f"{name}.jsonl").read_text("utf-8").splitlines()
        receipts = [Receipt.from_dict(json.loads(line)) for line in lines]
        assert [receipt.head.sequence for receipt in receipts] == [0, 1, 2, 3]
        for receipt in receipts:
            require_extends(study.sites.journal(name), receipt)


def test_a_site_whose_journal_was_put_back_takes_no_further_part_and_is_named(make_study: MakeStudy) -> None:
    study, old = interrupted(make_study)
    study.sites.journals[BAD] = old
    summary = study.go_on()
    assert summary["refused"] == {BAD: "witness.rolled-back"}
    assert {site["name"]: site["failures"] for site in summary["sites"]}[BAD]["witness.rolled-back"] == 1
    assert study.sites.asked[3].count(BAD) == 1  # before the interruption, and not again
    assert rounds_of(summary, BAD) == 2
    assert rounds_of(summary, site_name(0)) == 3


def test_without_the_check_the_coordinator_takes_it_back(
    make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, old = interrupted(make_study)
    monkeypatch.setattr(witness_module, "judge", lambda newest, head: "")
    study.sites.journals[BAD], study.sites.careless = old, {BAD}
    summary = study.go_on()
    assert summary["refused"] == {}
    assert rounds_of(summary, BAD) == 3


@pytest.mark.parametrize("metrics", ["off", "clear"])
def test_a_site_that_outgrew_the_receipt_refuses_before_it_spends(make_study: MakeStudy, metrics: str) -> None:
    study, old = interrupted(make_study, f"evaluation.site_metrics={metrics}")
    study.sites.journals[BAD] = old.write("consent was given anew", times=9)
    spent = study.sites.trained[BAD]
    summary = study.go_on()
    assert study.lines()[2]["failed"] == {BAD: "journal.rolled-back"}
    assert study.sites.trained[BAD] == spent
    assert rounds_of(summary, BAD) == 2


def test_one_that_looks_at_no_receipt_would_go_on(make_study: MakeStudy) -> None:
    study, old = interrupted(make_study)
    study.sites.journals[BAD], study.sites.careless = old.write("consent was given anew", times=9), {BAD}
    assert rounds_of(study.go_on(), BAD) == 3


def test_and_the_receipts_convict_it_afterwards(make_study: MakeStudy) -> None:
    study, old = interrupted(make_study)
    study.sites.journals[BAD], study.sites.careless = old.write("consent was given anew", times=9), {BAD}
    study.go_on()
    lines = (study.folder.path / "heads" / f"{BAD}.jsonl").read_text("utf-8").splitlines()
    codes = []
    for line in lines:
        try:
            require_extends(study.sites.journal(BAD), Receipt.from_dict(json.loads(line)))
        except JournalError as error:
            codes.append(error.code)
    assert codes
    assert set(codes) == {"journal.rolled-back"}


def test_an_update_whose_head_stands_before_the_receipt_is_not_averaged(make_study: MakeStudy) -> None:
    study = make_study()
    before = Head.of(study.sites.journal(BAD))
    study.sites.journal(BAD).write(times=3)
    study.sites.twists = {(BAD, 2): lambda update: encode_reply(replace(update, head=before))}
    summary = study.start()
    assert [line["failed"] for line in study.lines()] == [{}, {BAD: "witness.rolled-back"}]
    assert rounds_of(summary, BAD) == 1


def test_nor_one_with_a_head_that_its_key_has_not_signed(make_study: MakeStudy) -> None:
    study = make_study()
    forged = lambda update: encode_reply(replace(update, head=replace(update.head, digest="0" * 64)))  # noqa: E731 - one line
    study.sites.twists = {(BAD, 1): forged}
    study.start()
    assert study.lines()[0]["failed"] == {BAD: "witness.forged"}


def test_another_site_that_takes_the_name_is_refused_and_the_name_stays_with_its_owner(make_study: MakeStudy) -> None:
    study, _ = interrupted(make_study)
    owner = study.sites.journal(BAD)
    study.sites.journals[BAD] = MemoryJournal.create(BAD).write(times=50)
    summary = study.go_on()
    assert summary["refused"] == {BAD: "witness.other-site"}
    assert rounds_of(summary, BAD) == 2
    witness = Witness(study.folder.path, coordinator_key(study.folder.path / "coordinator.key"))
    witness.accept(BAD, Head.of(owner))


def test_two_sites_with_one_journal_are_one_site(make_study: MakeStudy) -> None:
    study = make_study("federation.rounds=1")
    study.sites.journals[site_name(2)] = study.sites.journal(BAD)
    summary = study.start()
    assert summary["refused"] == {site_name(2): "witness.shared-journal"}
    assert [site["name"] for site in summary["sites"]] == [site_name(index) for index in (0, 1, 3)]


def test_a_refused_site_is_named_where_too_few_are_left(make_study: MakeStudy) -> None:
    study, old = interrupted(make_study, "federation.quorum=1")
    study.sites.journals[BAD] = old
    with pytest.raises(FederationError) as caught:
        study.go_on()
    assert f"{BAD}: witness.rolled-back" in caught.value.message
