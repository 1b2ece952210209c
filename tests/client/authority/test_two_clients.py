"""Two clients on one site's folder: they take turns at the journal, and whatever either trains is charged."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from fedtune_client import operator
from tests.support.crashes import Clients, Script
from tests.support.sites import RealSite

ROUNDS = tuple(range(1, 7))


def test_two_processes_in_the_same_rounds_charge_every_training(
    site: RealSite, clients: Clients, tmp_path: Path
) -> None:
    scripts = [Script(site.path, ROUNDS, "", tmp_path / f"{name}.jsonl") for name in ("one", "two")]
    stories = clients.finished(*scripts)
    drawn = sum(len(story.told("draws")) for story in stories)
    assert not any(story.told("refused") for story in stories)
    assert site.charged == drawn >= len(ROUNDS)
    assert len(site.entries("commit")) == drawn
    for number in ROUNDS:
        made = {digest for story in stories for digest in story.told("commits", number)}
        assert {reply for story in stories for reply in story.told("reply", number)} <= made
    before = site.charged
    for number in ROUNDS[-1:]:
        site.update(number)  # by a third process, which sends one of the two again
    assert site.charged == before


def hold(site: RealSite, seconds: float) -> threading.Thread:
    """Hold the journal for a while, as another process would."""
    held = threading.Event()

    def holding() -> None:
        with site.open().journal:
            held.set()
            time.sleep(seconds)

    thread = threading.Thread(target=holding)
    thread.start()
    held.wait()
    return thread


def test_a_journal_that_is_held_for_a_moment_is_waited_for(site: RealSite) -> None:
    thread = hold(site, 0.2)
    site.update(1)
    thread.join()


def test_a_journal_that_is_held_longer_than_the_patience_is_in_use(
    site: RealSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.update(1)
    monkeypatch.setattr("fedtune.journal.journal.PATIENCE", 0.05)
    with site.open().journal:
        assert site.refusal(2) == "journal.in-use"
    assert site.charged == 1
    site.update(2)


def test_a_key_that_a_command_rotates_signs_the_client_s_next_round(site: RealSite) -> None:
    site.update(1)
    public = operator.rotate_key(site.open())
    assert site.update(2).head.public_key == public
    operator.rotate_key(site.open())
    site.restart().update(3)


def test_a_command_between_two_rounds_is_seen_by_the_running_client(site: RealSite) -> None:
    site.update(1)
    site.adopt(require_approval=True)
    assert site.refusal(2) == "policy.not-approved"
    operator.approve(site.open(), site.study.plan, "somebody")
    site.update(2)


def test_a_journal_that_is_replaced_under_a_running_client_stops_it(site: RealSite) -> None:
    site.update(1)
    whole = site.journal.read_bytes()
    site.update(2)
    site.journal.write_bytes(whole)
    assert site.refusal(3) == "journal.tampered"
    assert site.charged == 1
