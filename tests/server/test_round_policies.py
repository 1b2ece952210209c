"""How long a round waits, and for whom: quarantine, early close, stragglers."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from flwr.app import RecordDict

from fedtune.errors import ConfigError, FederationError
from fedtune.flower.messages import Update, encode_reply
from fedtune_server.facts import SiteFacts
from tests.server.test_rounds import assert_mean_of, changed, crash
from tests.support.studies import TinyStudy, site_name

MakeStudy = Callable[..., TinyStudy]
BAD, SLOW = site_name(1), site_name(3)


def not_a_number(update: Update) -> RecordDict:
    return encode_reply(changed(update, np.nan))


def late(update: Update) -> RecordDict:
    time.sleep(0.5)
    return encode_reply(update)


def asked(study: TinyStudy, name: str) -> list[int]:
    return [number for number, names in sorted(study.sites.asked.items()) if name in names]


class TestQuarantine:
    def test_a_site_that_sends_what_no_honest_site_sends_is_not_asked_again(self, make_study: MakeStudy) -> None:
        study = make_study("federation.rounds=4")
        study.sites.twists = {(BAD, 2): not_a_number}
        summary = study.start()
        assert asked(study, BAD) == [1, 2]
        by_name = {site["name"]: site for site in summary["sites"]}
        assert by_name[BAD]["quarantine"] == "aggregation.not-finite"
        assert [by_name[site_name(index)]["quarantine"] for index in (0, 2, 3)] == [None] * 3
        assert [by_name[site_name(index)]["rounds"] for index in (0, 2, 3)] == [4] * 3

    def test_a_site_that_says_that_it_failed_is_asked_again(self, make_study: MakeStudy) -> None:
        study = make_study("federation.rounds=3")
        study.sites.twists = {(BAD, 1): crash}
        summary = study.start()
        assert asked(study, BAD) == [1, 2, 3]
        assert {site["name"]: site["quarantine"] for site in summary["sites"]}[BAD] is None

    def test_the_plan_says_how_many_bad_replies_are_too_many(self, make_study: MakeStudy) -> None:
        study = make_study("federation.rounds=4", "federation.bad_replies=2")
        study.sites.twists = {(BAD, 1): not_a_number, (BAD, 3): not_a_number}
        study.start()
        assert asked(study, BAD) == [1, 2, 3]

    def test_those_in_quarantine_still_count_for_the_quorum(self, make_study: MakeStudy) -> None:
        study = make_study("federation.quorum=0.75", "federation.rounds=3")
        study.sites.twists = {(site_name(0), 1): not_a_number, (site_name(1), 2): not_a_number}
        with pytest.raises(FederationError) as caught:
            study.start()
        assert caught.value.code == "federation.no-quorum"
        assert "round 2: 2 of 4 sites answered, 3 are needed" in caught.value.message

    def test_quarantine_outlasts_a_restart(self, make_study: MakeStudy) -> None:
        study = make_study("federation.rounds=3", "federation.quorum=0.75")
        study.sites.twists = {(BAD, 1): not_a_number} | {(site_name(index), 2): crash for index in range(4)}
        with pytest.raises(FederationError):
            study.start()
        study.sites.twists = {}
        study.go_on()
        assert asked(study, BAD) == [1]

    def test_a_person_lets_a_site_out_once_for_each_time_that_it_was_put_there(self) -> None:
        site = SiteFacts("bank", 100, "d" * 64)
        site.note_offence("message.wrong-shape", 1)
        site.release(0)
        assert site.quarantine == "message.wrong-shape"
        site.release(1)
        assert (site.quarantine, site.offences) == ("", 0)
        site.note_offence("message.wrong-shape", 1)
        site.release(1)  # the same word of the person, read again at a restart
        assert site.quarantine == "message.wrong-shape"


class TestEarlyClose:
    def test_a_round_ends_when_enough_have_answered(self, make_study: MakeStudy) -> None:
        study = make_study("federation.early_close=0.75", "federation.rounds=1")
        study.sites.twists = {(site_name(2), 1): late}  # what comes before it is there by then, what is after it is not
        summary = study.start()
        assert study.lines()[0]["failed"] == {SLOW: "federation.closed"}
        assert_mean_of(study, [site_name(index) for index in range(3)], rounds=1)
        assert {site["name"]: site["quarantine"] for site in summary["sites"]}[SLOW] is None

    def test_refused_replies_are_not_among_the_enough(self, make_study: MakeStudy) -> None:
        study = make_study("federation.early_close=0.75", "federation.rounds=1")
        study.sites.twists = {(BAD, 1): not_a_number}
        study.start()
        assert study.lines()[0]["failed"] == {BAD: "aggregation.not-finite"}
        assert_mean_of(study, [site_name(index) for index in (0, 2, 3)], rounds=1)

    def test_it_cannot_be_less_than_the_quorum(self, make_study: MakeStudy) -> None:
        with pytest.raises(ConfigError) as caught:
            make_study("federation.early_close=0.25", "federation.quorum=0.5")
        assert "federation.early_close" in caught.value.message


class TestStragglers:
    def test_a_site_that_was_too_late_rests_for_as_long_as_the_plan_says(self, make_study: MakeStudy) -> None:
        study = make_study("federation.deadline=0.4", "federation.straggler_rest=2", "federation.rounds=4")
        study.sites.twists = {(SLOW, 1): late}
        study.start()
        assert asked(study, SLOW) == [1, 4]
        assert [line["failed"] for line in study.lines()] == [{SLOW: "federation.deadline"}, {}, {}, {}]

    def test_it_does_not_count_for_the_quorum_while_it_rests(self, make_study: MakeStudy) -> None:
        words = ["federation.deadline=0.4", "federation.straggler_rest=1", "federation.rounds=2"]
        study = make_study(*words, "federation.quorum=0.75")
        study.sites.twists = {(SLOW, 1): late, (BAD, 2): crash}
        with pytest.raises(FederationError) as caught:
            study.start()
        assert "round 2: 2 of 3 sites answered, 3 are needed" in caught.value.message

    def test_control_by_default_it_is_asked_in_the_next_round(self, make_study: MakeStudy) -> None:
        study = make_study("federation.deadline=0.4", "federation.rounds=2")
        study.sites.twists = {(SLOW, 1): late}
        study.start()
        assert asked(study, SLOW) == [1, 2]


def test_an_update_under_anothers_name_costs_the_sender_its_place_and_not_the_other(make_study: MakeStudy) -> None:
    study = make_study("federation.rounds=3")
    study.sites.twists = {(BAD, 1): lambda update: encode_reply(replace(update, site=SLOW))}
    study.start()
    assert asked(study, BAD) == [1]
    assert asked(study, SLOW) == [1, 2, 3]
