"""One bad site never spoils a round: it is refused, named and counted, and the others' mean is what comes out."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
from flwr.app import ConfigRecord, RecordDict

from fedtune.errors import DataError, FederationError
from fedtune.flower.messages import Refusal, Update, encode_reply, refusal_of
from fedtune.privacy.accounting import epsilon
from fedtune.simulation.workspace import open_workspace
from fedtune_server.selection import sites_of_round
from tests.support.studies import TinyStudy, site_name

if TYPE_CHECKING:
    from collections.abc import Callable

    from fedtune.model.layout import AdapterState

    MakeStudy = Callable[..., TinyStudy]

BAD = site_name(1)
CANARY = "patient 4711 has"


def changed(update: Update, value: float) -> Update:
    name = min(update.state)
    array = update.state[name].copy()
    array.flat[0] = value
    return replace(update, state={**update.state, name: array})


def without_one(update: Update) -> Update:
    return replace(update, state={name: update.state[name] for name in sorted(update.state)[1:]})


def with_one_more(update: Update) -> Update:
    return replace(update, state={**update.state, "extra": np.zeros(1, np.float32)})


def reshaped(update: Update) -> Update:
    return replace(update, state={name: array.reshape(-1) for name, array in update.state.items()})


def in_float64(update: Update) -> Update:
    return replace(update, state={name: array.astype(np.float64) for name, array in update.state.items()})


def crash(update: Update) -> RecordDict:
    raise ValueError(CANARY)


def fail_as_expected(update: Update) -> RecordDict:
    return encode_reply(refusal_of(DataError("missing-column", CANARY)))


def with_events(update: Update, **fields: object) -> Update:
    return replace(update, events=tuple(replace(event, **fields) for event in update.events))


TWISTS = {
    "another mechanism": (
        lambda update: encode_reply(with_events(update, noise_multiplier=1e9)),
        "message.wrong-events",
    ),
    "another unit": (lambda update: encode_reply(with_events(update, unit="person")), "message.wrong-events"),
    "forgotten events": (lambda update: encode_reply(replace(update, events=())), "message.wrong-events"),
    "impossible steps": (lambda update: encode_reply(with_events(update, steps=10**15)), "message.wrong-events"),
    "NaN": (lambda update: encode_reply(changed(update, np.nan)), "aggregation.not-finite"),
    "infinity": (lambda update: encode_reply(changed(update, -np.inf)), "aggregation.not-finite"),
    "oversized norm": (lambda update: encode_reply(changed(update, 2e4)), "aggregation.oversized-norm"),
    "missing key": (lambda update: encode_reply(without_one(update)), "message.missing-key"),
    "unknown key": (lambda update: encode_reply(with_one_more(update)), "message.unknown-key"),
    "wrong shape": (lambda update: encode_reply(reshaped(update)), "message.wrong-shape"),
    "wrong type": (lambda update: encode_reply(in_float64(update)), "message.wrong-dtype"),
    "wrong round": (lambda update: encode_reply(replace(update, round=7)), "message.wrong-sender"),
    "another's name": (lambda update: encode_reply(replace(update, site=site_name(0))), "message.wrong-sender"),
    "other plan": (lambda update: encode_reply(replace(update, plan_sha256="0" * 64)), "message.other-plan"),
    "an empty record": (lambda update: RecordDict(), "message.wrong-schema"),
    "a foreign record": (lambda update: RecordDict({"fedtune": ConfigRecord({"x": 1})}), "message.wrong-schema"),
    "its own refusal": (fail_as_expected, "data.missing-column"),
    "a crash": (crash, "site.internal"),
}
HONEST = {"its own refusal", "a crash"}


def assert_mean_of(study: TinyStudy, names: list[str], rounds: int = 2) -> None:
    """Every round moves every number of the adapter by the mean of the accepted sites' shifts."""
    start = study_start(study)
    step = np.mean([study.sites.shift(name) for name in names], dtype=np.float64)
    for name, array in study.adapter().items():
        np.testing.assert_allclose(array, start[name] + rounds * step, rtol=0, atol=1e-6, err_msg=name)


def study_start(study: TinyStudy) -> AdapterState:
    return open_workspace(study.plan, study.machine).initial


@pytest.mark.parametrize("kind", TWISTS)
def test_a_bad_reply_is_refused_named_and_counted_and_the_rest_is_averaged(make_study: MakeStudy, kind: str) -> None:
    study = make_study()
    twist, code = TWISTS[kind]
    study.sites.twists = {(BAD, 1): twist, (BAD, 2): twist}
    summary = study.start()
    asked_again = kind in HONEST
    assert [line["failed"] for line in study.lines()] == [{BAD: code}, {BAD: code} if asked_again else {}]
    by_name = {site["name"]: site for site in summary["sites"]}
    assert (by_name[BAD]["failed"], by_name[BAD]["failures"]) == (1 + asked_again, {code: 1 + asked_again})
    assert by_name[BAD]["quarantine"] == (None if asked_again else code)
    assert by_name[BAD]["rounds"] == 0
    assert by_name[site_name(0)]["failed"] == 0
    assert by_name[site_name(0)]["rounds"] == summary["rounds"] == 2
    assert_mean_of(study, [site_name(index) for index in (0, 2, 3)])


def test_without_a_bad_reply_all_sites_are_averaged(make_study: MakeStudy) -> None:
    study = make_study()
    study.start()
    assert_mean_of(study, [site_name(index) for index in range(4)])


def test_without_the_norm_bound_the_oversized_reply_would_take_the_study_over(make_study: MakeStudy) -> None:
    study = make_study("aggregation.max_update_norm=1e9")
    study.sites.twists = {(BAD, 1): lambda update: encode_reply(changed(update, 2e4))}
    study.start()
    assert max(np.abs(array).max() for array in study.adapter().values()) > 1e3


def test_a_site_that_answers_after_the_deadline_is_left_out(make_study: MakeStudy) -> None:
    study = make_study("federation.deadline=0.4")
    late = site_name(3)  # sites work one after another here, so it must be the last

    def slow(update: Update) -> RecordDict:
        time.sleep(0.5)
        return encode_reply(update)

    study.sites.twists = {(late, 1): slow}
    summary = study.start()
    assert [line["failed"] for line in study.lines()] == [{late: "federation.deadline"}, {}]
    assert {site["name"]: site["rounds"] for site in summary["sites"]}[late] == 1


def test_no_text_of_a_failure_reaches_the_run_folder(make_study: MakeStudy) -> None:
    study = make_study()
    study.sites.twists = {(BAD, 1): crash, (BAD, 2): fail_as_expected}
    study.start()
    written = [path.read_bytes() for path in study.folder.path.rglob("*") if path.is_file()]
    assert written
    assert not any(CANARY.encode() in content for content in written)


def test_a_refusal_cannot_carry_a_long_text(make_study: MakeStudy) -> None:
    study = make_study()
    study.sites.twists = {(BAD, 1): lambda update: encode_reply(Refusal("x" * 1000))}
    study.start()
    assert study.lines()[0]["failed"] == {BAD: "x" * 64}


def test_without_quorum_the_study_stops_with_the_causes_and_can_go_on(make_study: MakeStudy) -> None:
    study, whole = make_study("federation.rounds=3"), make_study("federation.rounds=3")
    study.sites.twists = {(site_name(index), 2): crash for index in range(3)}
    with pytest.raises(FederationError) as caught:
        study.start()
    assert caught.value.code == "federation.no-quorum"
    assert "1 of 4 sites answered, 2 are needed" in caught.value.message
    assert f"{site_name(0)}: site.internal" in caught.value.message
    assert "--resume" in caught.value.hint
    assert study.folder.summary() is None
    study.sites.twists = {}
    summary = study.go_on()
    whole.start()
    assert summary["rounds"] == 3
    assert study.adapter().keys() == whole.adapter().keys()
    assert all(np.array_equal(study.adapter()[name], array) for name, array in whole.adapter().items())


def test_a_repeated_round_is_charged_to_those_who_had_trained_it(make_study: MakeStudy) -> None:
    study = make_study()
    study.sites.twists = {(site_name(index), 2): crash for index in range(3)}
    with pytest.raises(FederationError):
        study.start()
    study.sites.twists = {}
    summary = study.go_on()
    promise = study.plan.promise
    assert all(site["epsilon"] == epsilon([promise.event(3)], promise.delta) for site in summary["sites"])
    assert summary["privacy"]["max_epsilon"] > promise.epsilon
    assert summary["privacy"]["statement"].startswith("EXCEEDED: ε = ")
    assert "EXCEEDED" in (study.folder.adapter / "README.md").read_text("utf-8")


def test_a_lost_reply_is_in_the_final_epsilon(make_study: MakeStudy) -> None:
    study = make_study()
    study.sites.twists = {(BAD, 2): crash}
    summary = study.start()
    promise = study.plan.promise
    by_name = {site["name"]: site for site in summary["sites"]}
    assert by_name[BAD]["rounds"] == 1
    assert (
        by_name[BAD]["epsilon"]
        == epsilon([promise.event(2)], promise.delta)
        > epsilon([promise.event(1)], promise.delta)
    )
    assert summary["privacy"]["max_epsilon"] == by_name[BAD]["epsilon"] <= promise.epsilon


@pytest.mark.parametrize("seed", [0, 1])
def test_each_round_asks_the_sites_that_anybody_can_compute_from_the_plan(make_study: MakeStudy, seed: int) -> None:
    study = make_study("federation.sites_per_round=2", "federation.rounds=6", f"seed={seed}")
    summary = study.start()
    names = [site_name(index) for index in range(4)]
    expected = {number: sites_of_round(study.plan, names, number) for number in range(1, 7)}
    assert study.sites.asked == expected
    assert all(len(set(asked)) == 2 for asked in expected.values())
    assert len({tuple(asked) for asked in expected.values()}) > 1
    assert sum(site["rounds"] for site in summary["sites"]) == 12


def test_weights_are_the_plans_whatever_counts_the_sites_claim(make_study: MakeStudy) -> None:
    study = make_study("aggregation.weights=[4,3,2,1]", "federation.rounds=1")
    study.sites.units = {site_name(3): 10**15}
    study.start()
    start, shifts = study_start(study), [study.sites.shift(site_name(index)) for index in range(4)]
    step = np.average(shifts, weights=[4, 3, 2, 1])
    for name, array in study.adapter().items():
        np.testing.assert_allclose(array, start[name] + step, rtol=0, atol=1e-6)


def test_the_weights_of_a_round_that_misses_sites_are_renormalised(make_study: MakeStudy) -> None:
    study = make_study("aggregation.weights=[4,3,2,1]", "federation.rounds=1")
    study.sites.twists = {(site_name(0), 1): crash}
    study.start()
    start, shifts = study_start(study), [study.sites.shift(site_name(index)) for index in (1, 2, 3)]
    step = np.average(shifts, weights=[3, 2, 1])
    for name, array in study.adapter().items():
        np.testing.assert_allclose(array, start[name] + step, rtol=0, atol=1e-6)


def test_two_nodes_with_one_name_count_as_one_site(make_study: MakeStudy) -> None:
    study = make_study("federation.rounds=1")
    study.sites.names = {3: site_name(0)}
    summary = study.start()
    assert [site["name"] for site in summary["sites"]] == [site_name(index) for index in range(3)]


def test_a_study_of_sites_that_do_not_answer_says_so(make_study: MakeStudy) -> None:
    study = make_study()
    study.sites.names = dict.fromkeys(range(4), "bank-0")
    with pytest.raises(FederationError) as caught:
        study.start()
    assert caught.value.code == "federation.no-quorum"
    assert "message.duplicate-site" in caught.value.message


def test_evaluation_of_all_sites_is_the_tally_of_all_records(make_study: MakeStudy) -> None:
    study = make_study("evaluation.site_metrics=clear")
    summary = study.start()
    assert summary["metrics"]["final"]["accuracy"] == 0.5
    assert all(site["metrics"]["final"]["accuracy"] == 0.5 for site in summary["sites"])


def test_traffic_is_what_the_messages_hold(make_study: MakeStudy) -> None:
    study = make_study("federation.rounds=1")
    summary = study.start()
    line = study.lines()[0]
    arrays = 4 * sum(array.size for array in study.adapter().values())
    assert line["bytes_down"] >= 4 * arrays
    assert line["bytes_up"] >= 4 * arrays
    assert line["bytes_up"] < 4 * (arrays + 1000)
    assert summary["traffic"]["bytes_up"] >= line["bytes_up"]
