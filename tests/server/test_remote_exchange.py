"""Between machines: signed both ways, lost sites are asked again, and what comes too late is dropped and said."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import RecordDict
from flwr.common.constant import ErrorCode

from fedtune.envelopes.peers import revoked
from fedtune.errors import DataError
from fedtune.flower.messages import Instruction, Update, decode_update, encode_reply, refusal_of
from fedtune_server.exchange import Answer, Exchange, Traffic
from fedtune_server.fleet import Fleet
from fedtune_server.witness import Witness
from tests.support.parties import new_key
from tests.support.sealed_world import World, update, with_body
from tests.support.wire import NODES, SITES, STUDY, Wire

INSTRUCTION = Instruction(STUDY, 1, {"w": np.ones(3, np.float32)})


class Study:
    """An exchange over a wire, and what comes of one question."""

    def __init__(self, folder: Path, deadline: float = 30.0, reconnect: float = 20.0) -> None:
        self.world, self.known = World(), dict(NODES)
        self.wire = Wire(self.world)
        fleet = Fleet(self.world.coordinator, STUDY, SITES, lambda: self.known)
        witness = Witness(folder, new_key())
        grid: Any = self.wire
        self.exchange = Exchange(grid, deadline, Traffic(), witness, fleet, reconnect)

    def ask(self, number: int = 1, **how: Any) -> dict[str, Answer[Update]]:
        asked = Instruction(STUDY, number, INSTRUCTION.adapter)
        decode = lambda content: decode_update(content, STUDY)  # noqa: E731 - one line, used once
        answers = self.exchange.ask("train", list(NODES), asked, decode, **how)
        return {NODES[answer.node]: answer for answer in answers}

    def codes(self, number: int = 1, **how: Any) -> dict[str, str]:
        return {site: answer.code for site, answer in self.ask(number, **how).items()}


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return Study(tmp_path)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedtune_server.outstanding._PAUSE", 0.05)


def test_every_site_answers_in_an_envelope(study: Study) -> None:
    answers = study.ask()
    assert {site: answer.code for site, answer in answers.items()} == dict.fromkeys(SITES, "")
    assert [site for site, _ in study.world.acts] == list(SITES)
    for site, answer in answers.items():
        assert answer.reply is not None
        assert answer.reply.site == site


@pytest.mark.parametrize(
    "error", [ErrorCode.NODE_UNAVAILABLE, ErrorCode.CLIENT_APP_CRASHED, ErrorCode.MESSAGE_UNAVAILABLE]
)
def test_a_site_that_was_lost_on_the_way_is_asked_again_in_the_same_round(study: Study, error: int) -> None:
    study.wire.losses[12] = [error, error]
    assert study.codes() == dict.fromkeys(SITES, "")
    assert study.wire.sent.count(12) == 3
    assert study.wire.sent.count(11) == study.wire.sent.count(13) == 1


def test_a_site_that_is_away_is_asked_when_it_is_back(study: Study) -> None:
    study.wire.away.add(13)
    serve = study.world.serve

    def first_comes_back(site: str, content: RecordDict) -> RecordDict:
        study.wire.away.clear()
        return serve(site, content)

    study.wire.act = first_comes_back
    assert study.codes() == dict.fromkeys(SITES, "")


def test_a_site_that_stays_away_is_given_up_before_the_deadline(tmp_path: Path) -> None:
    study = Study(tmp_path, deadline=600.0, reconnect=0.3)
    study.wire.away.add(13)
    study.wire.losses[12] = [ErrorCode.NODE_UNAVAILABLE] * 100
    assert study.codes() == {"bank-1": "", "bank-2": "flower.error-5", "bank-3": "federation.offline"}


def test_a_site_that_ends_by_itself_says_so_by_a_code(tmp_path: Path) -> None:
    study = Study(tmp_path, reconnect=0.0)
    study.wire.losses[12] = [ErrorCode.CLIENT_APP_CRASHED]
    assert study.codes()["bank-2"] == "site.stopped"


def test_a_refusal_in_an_envelope_is_the_sites_own_and_no_offence(study: Study) -> None:
    def refuse(site: str, content: RecordDict) -> RecordDict:
        from fedtune.flower.sealed import seal_answer

        opened = study.world.open(site, content)
        refusal = encode_reply(refusal_of(DataError("missing-column", "patient 4711")))
        return seal_answer(study.world.ends[site], opened, refusal)

    study.wire.act = refuse
    answers = study.ask()
    assert {(answer.code, answer.offence) for answer in answers.values()} == {("data.missing-column", False)}


HostileAct = Callable[[World, str, RecordDict], RecordDict]
HOSTILE: dict[str, tuple[HostileAct, str]] = {
    "no envelope": (lambda _world, site, _content: update(STUDY, site, 1), "envelope.missing"),
    "a bare refusal": (
        lambda _world, _site, _content: encode_reply(refusal_of(DataError("missing-column", "x"))),
        "data.missing-column",
    ),
    "a body that was swapped": (
        lambda world, site, content: with_body(world.serve(site, content), update(STUDY, site, 1, 9.0)),
        "envelope.other-body",
    ),
    "another site's answer": (
        lambda world, _site, content: _answer_of_another(world, content),
        "envelope.",
    ),
}


def _answer_of_another(world: World, content: RecordDict) -> RecordDict:
    """Let bank-1 answer a request as if it were its own, whoever it was for."""
    from fedtune.errors import EnvelopeError

    try:
        return world.serve("bank-1", content)
    except EnvelopeError as error:
        return encode_reply(refusal_of(error))


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_its_site_has_not_signed_is_refused_and_held_against_nobody(study: Study, kind: str) -> None:
    act, code = HOSTILE[kind]
    serve = study.world.serve
    study.wire.act = lambda site, content: act(study.world, site, content) if site == "bank-3" else serve(site, content)
    answers = study.ask()
    assert answers["bank-3"].code.startswith(code)
    assert not answers["bank-3"].offence
    assert [answers[site].code for site in ("bank-1", "bank-2")] == ["", ""]


def test_what_a_site_has_signed_and_no_honest_site_sends_is_an_offence(study: Study) -> None:
    def wrong(site: str, content: RecordDict) -> RecordDict:
        from fedtune.flower.sealed import seal_answer

        opened = study.world.open(site, content)
        return seal_answer(study.world.ends[site], opened, RecordDict())

    study.wire.act = wrong
    assert all(answer.offence for answer in study.ask().values())


def test_a_revoked_site_is_not_asked(study: Study) -> None:
    study.world.known = revoked(study.world.known, "bank-2")
    assert study.codes() == {"bank-1": "", "bank-2": "envelope.revoked", "bank-3": ""}
    assert 12 not in study.wire.sent


def test_a_node_that_is_registered_for_no_site_of_the_study_is_not_asked(study: Study) -> None:
    study.known[12] = "another-bank"
    assert 12 not in study.exchange.online()


def test_the_round_ends_when_the_caller_has_enough_and_the_late_reply_is_said_to_be_dropped(
    study: Study, caplog: pytest.LogCaptureFixture
) -> None:
    study.wire.slow[13] = 3
    taken: list[str] = []

    def decode(content: RecordDict) -> Any:
        reply = decode_update(content, STUDY)
        taken.append("one")
        return reply

    answers = study.exchange.ask("train", list(NODES), INSTRUCTION, decode, enough=lambda: len(taken) >= 2)
    codes = {NODES[answer.node]: answer.code for answer in answers}
    assert codes == {"bank-1": "", "bank-2": "", "bank-3": "federation.closed"}
    study.wire.slow[11] = 6
    with caplog.at_level(logging.WARNING):
        assert study.codes(2) == dict.fromkeys(SITES, "")
    assert "dropped the reply of bank-3 to round 1: it came too late" in caplog.text


def test_a_deadline_ends_the_wait_for_whoever_is_lost(tmp_path: Path) -> None:
    study = Study(tmp_path, deadline=0.5, reconnect=60.0)
    study.wire.away.add(13)
    assert study.codes() == {"bank-1": "", "bank-2": "", "bank-3": "federation.deadline"}
