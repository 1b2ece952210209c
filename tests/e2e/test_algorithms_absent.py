"""Sites that miss a round, or half of one: they come back to the right base, and the others' mean is the right one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from flwr.app import RecordDict

from fedtune.aggregation.lora.protocol import Turn
from fedtune.flower.messages import Refusal, Update, decode_update, encode_reply
from tests.support.journal_lines import entries
from tests.support.whole import Federation, Letter, Trained, Workshop, dense, distance, same, workshop

INCREMENTAL = ("flora", "fedex", "rolora")
SITE = "site-002"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("absent")


@pytest.fixture
def shop(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workshop:
    return workshop(tmp_path, monkeypatch, shared=folder)


def away_in(*rounds: int, site: str = SITE) -> Callable[[Letter], str | None]:
    """Lose every message of these rounds to a site, to train and to measure."""
    return lambda letter: (
        "away" if letter.kind != "query.describe" and letter.site == site and letter.number in rounds else None
    )


def held(study: Federation, one: Trained) -> dict[str, np.ndarray]:
    """Return W − W0 of every layer of the model that a site trained from."""
    found = {}
    for spec_a, spec_b in study.merging.layout.pairs:
        found[spec_a.layer] = study.scale * dense(one.start[spec_a.name], one.start[spec_b.name])
        if f"drift/{spec_a.name}" in one.start:
            parts = (one.start[f"drift/{spec.name}"] for spec in (spec_a, spec_b))
            found[spec_a.layer] += study.scale * dense(*parts)
    return found


@pytest.mark.parametrize(
    "missed", [(1,), (2, 3, 4), *(pytest.param(more, marks=pytest.mark.slow) for more in [(2,), (1, 2)])], ids=str
)
@pytest.mark.parametrize("rule", INCREMENTAL)
def test_a_site_that_comes_back_holds_the_model_that_the_others_hold(
    shop: Workshop, rule: str, missed: tuple[int, ...]
) -> None:
    study = shop.make(f"aggregation.algorithm={rule}", "federation.rounds=5", "privacy.mode=off")
    study.meddle = away_in(*missed)
    study.run()
    for number in range(1, 6):
        trained = study.trained_in(number)
        assert (SITE in trained) == (number not in missed)
        if number > 1:
            first = held(study, trained["site-001"])
            assert all(distance(held(study, one), first) <= 1e-5 for one in trained.values())
    assert distance(held(study, study.trained_in(5)[SITE]), study.update_of(study.state_after(4))) <= 1e-5


@pytest.mark.parametrize("rule", INCREMENTAL)
def test_it_is_sent_what_it_missed_and_no_more(shop: Workshop, rule: str) -> None:
    study = shop.make(f"aggregation.algorithm={rule}", "federation.rounds=5", "evaluation.site_metrics=off")
    study.meddle = away_in(2, 3)
    study.run()
    standings = [letter.instruction.standing for letter in study.letters_to(SITE)]
    assert [standing.since for standing in standings] == [0, 0, 0, 0, 3]
    others = [letter.instruction.standing.since for letter in study.letters_to("site-001")]
    assert others == [0, 0, 1, 2, 3]
    sizes = [sum(array.size for array in letter.instruction.adapter.values()) for letter in study.letters_to(SITE)]
    regular = [sum(array.size for array in one.instruction.adapter.values()) for one in study.letters_to("site-001")]
    assert sizes[3] > regular[3]
    assert sizes[4] == regular[4]


@pytest.mark.parametrize("rule", INCREMENTAL)
def test_an_update_that_came_too_late_to_count_leaves_the_site_where_the_others_are(shop: Workshop, rule: str) -> None:
    """The site has trained and kept what it was sent; the coordinator never heard of it."""
    study = shop.make(f"aggregation.algorithm={rule}", "federation.rounds=4", "evaluation.site_metrics=off")

    def lost(letter: Letter, content: RecordDict) -> RecordDict:
        is_it = (letter.site, letter.number) == (SITE, 2)
        return encode_reply(Refusal("site.internal")) if is_it else content

    study.spoil = lost
    study.run()
    for number in (3, 4):
        trained = study.trained_in(number)
        assert distance(held(study, trained[SITE]), held(study, trained["site-001"])) <= 1e-5


@pytest.mark.parametrize(
    "words",
    [
        ["aggregation.algorithm=fedsa"],
        ["training.variates=scaffold"],
        ["aggregation.upload=int4", "aggregation.error_feedback=true"],
    ],
    ids=["fedsa", "scaffold", "error feedback"],
)
def test_a_round_that_was_not_counted_leaves_nothing_in_what_a_site_keeps(shop: Workshop, words: list[str]) -> None:
    """Its next round starts from what the last counted one has left: what else it adds would be sent twice or never."""
    study = shop.make(*words, "federation.rounds=3")

    def lost(letter: Letter, content: RecordDict) -> RecordDict:
        is_it = (letter.site, letter.number) == (SITE, 2)
        return encode_reply(Refusal("site.internal")) if is_it else content

    study.spoil = lost
    study.run()
    kept = {number: study.kept_at(SITE, number) for number in (1, 2, 3)}
    assert not same(kept[1], kept[2])
    assert [letter.instruction.standing.counted for letter in study.letters_to(SITE)] == [0, 1, 1]
    started = study.trained_in(3)[SITE]
    if "scaffold" in words[0]:
        own = {name.removeprefix("own-variate/"): array for name, array in kept[1].items()}
        change = started.result.variate_change
        assert all(np.allclose(started.result.variate[name] - own[name], change[name], atol=1e-6) for name in own)
    elif "fedsa" in words[0]:
        assert all(np.array_equal(started.start[name], array) for name, array in kept[1].items())
    else:
        assert_residual_starts_from(study, kept[1], kept[3])


def assert_residual_starts_from(study: Federation, before: dict[str, np.ndarray], after: dict[str, np.ndarray]) -> None:
    """What was trained + the residual before = what was decoded + the residual after, tensor by tensor."""
    one = study.trained_in(3)[SITE]
    reply = next(reply for reply in study.replies if (reply.letter.site, reply.letter.number) == (SITE, 3))
    sending = study.merging.exchange(Turn(3), study.state_after(2))
    assert isinstance(reply.update, Update)
    decoded = sending.read(0, reply.update.state)
    for name in decoded:
        left = one.state[name].astype(float) + before[f"residual/{name}"] - decoded[name]
        assert np.allclose(after[f"residual/{name}"], left, atol=1e-6)
        assert np.any(before[f"residual/{name}"])


# --- two exchanges --------------------------------------------------------------------------------------------------


def fedask(shop: Workshop, *words: str) -> Federation:
    return shop.make("aggregation.algorithm=fedask", "evaluation.site_metrics=off", *words)


def charges(study: Federation, site: str) -> list[int]:
    return [entry["round"] for entry in entries(study.sites / site / f"{site}.journal", "reserve")]


def wanted_without(study: Federation, number: int, absent: str) -> dict[str, np.ndarray]:
    trained = {site: one for site, one in study.trained_in(number).items() if site != absent}
    total = sum(study.weights[site] for site in trained)
    found: dict[str, np.ndarray] = {}
    for spec_a, spec_b in study.merging.layout.pairs:
        found[spec_a.layer] = sum(
            study.scale * study.weights[site] / total * dense(one.state[spec_a.name], one.state[spec_b.name])
            for site, one in trained.items()
        )
    return found


@pytest.mark.parametrize("noise", ["seeded", "secure"])
def test_a_site_that_leaves_between_two_exchanges_is_left_out_of_both(shop: Workshop, noise: str) -> None:
    study = fedask(shop, f"privacy.noise={noise}", "federation.rounds=2")
    study.meddle = lambda letter: "away" if (letter.site, letter.number, letter.part) == (SITE, 1, 1) else None
    study.run()
    first = [(letter.part, letter.site) for letter in study.letters if (letter.kind, letter.number) == ("train", 1)]
    assert first == [
        *((0, f"site-00{n}") for n in (1, 2, 3)),
        *((1, f"site-00{n}") for n in (1, 2, 3)),
        *((0, f"site-00{n}") for n in (1, 3)),
        *((1, f"site-00{n}") for n in (1, 3)),
    ]
    assert distance(study.update_of(study.state_after(1)), wanted_without(study, 1, SITE)) <= 1e-5
    assert [charges(study, f"site-00{n}") for n in (1, 2, 3)] == [[1, 2]] * 3
    summary = study.folder.summary()
    assert summary is not None
    assert [site["rounds"] for site in summary["sites"]] == [2, 1, 2]
    assert study.lines()[0]["failed"].keys() == {SITE}


@pytest.mark.parametrize("noise", ["seeded", "secure"])
def test_the_first_exchange_is_answered_again_with_the_same_bytes(shop: Workshop, noise: str) -> None:
    study = fedask(shop, f"privacy.noise={noise}", "federation.rounds=1")
    study.meddle = lambda letter: "away" if (letter.site, letter.part) == (SITE, 1) else None
    study.run()
    updates = [reply.update for reply in study.replies if (reply.letter.site, reply.letter.part) == ("site-001", 0)]
    one, again = updates
    assert isinstance(one, Update)
    assert isinstance(again, Update)
    assert same(one.state, again.state)
    assert one.events == again.events


def test_the_mean_of_all_projected_on_what_some_have_sketched_would_be_another(shop: Workshop) -> None:
    """The control of the test above: the update without the second try is not the mean of those who stayed."""
    study = fedask(shop, "federation.rounds=1")
    study.meddle = lambda letter: "away" if (letter.site, letter.part) == (SITE, 1) else None
    study.run()
    assert distance(study.update_of(study.state), wanted_without(study, 1, "nobody")) > 1e-3


def test_a_site_is_not_asked_a_third_time_when_two_leave_one_after_the_other(shop: Workshop) -> None:
    study = fedask(
        shop, "federation.rounds=1", "federation.quorum=0.3", "federation.sites=4", "aggregation.weights=equal"
    )
    tries = []

    def meddle(letter: Letter) -> str | None:
        if letter.kind != "train" or letter.part == 0:
            return None
        tries.append(letter.site)
        leaves = {"site-002": True, "site-003": tries.count("site-003") == 2}
        return "away" if leaves.get(letter.site) else None

    study.meddle = meddle
    study.run()
    stayed = {site: one for site, one in study.trained_in(1).items() if site in {"site-001", "site-004"}}
    wanted = {}
    for spec_a, spec_b in study.merging.layout.pairs:
        wanted[spec_a.layer] = sum(
            study.scale / 2 * dense(one.state[spec_a.name], one.state[spec_b.name]) for one in stayed.values()
        )
    assert distance(study.update_of(study.state), wanted) <= 1e-5
    assert study.lines()[0]["failed"].keys() == {"site-002", "site-003"}


def test_a_coordinator_that_dies_between_the_exchanges_starts_the_round_again_at_no_cost(shop: Workshop) -> None:
    whole, study = (fedask(shop, "federation.rounds=2") for _ in range(2))
    whole.run()
    study.meddle = lambda letter: "kill" if (letter.number, letter.part, letter.site) == (2, 1, SITE) else None
    study.run_until_killed()
    study.meddle = lambda _letter: None
    study.run()
    assert same(study.state.to_arrays(), whole.state.to_arrays())
    assert [charges(study, f"site-00{n}") for n in (1, 2, 3)] == [[1, 2]] * 3


def test_a_second_exchange_that_nobody_has_begun_is_refused(shop: Workshop) -> None:
    study = fedask(shop, "federation.rounds=2")
    study.run()
    letter = next(one for one in study.letters_to("site-001") if (one.number, one.part) == (2, 1))
    before = charges(study, "site-001")
    for entry in study.kept_names("site-001"):
        study.vault("site-001").remove(entry)
    answer = study.ask("train", replace(letter.instruction, receipt=None))
    assert answer == Refusal("message.wrong-round")
    assert charges(study, "site-001") == before


def test_an_answer_to_another_exchange_is_an_offence(shop: Workshop) -> None:
    """A site that answers the first exchange where the second was asked sends what no honest site sends."""
    study = fedask(shop, "federation.rounds=1")
    kept: dict[str, RecordDict] = {}

    def twist(letter: Letter, content: RecordDict) -> RecordDict:
        if letter.site != SITE:
            return content
        if letter.part == 0:
            kept[SITE] = content
            return content
        decoded = decode_update(content, study.plan.sha256)
        assert isinstance(decoded, Update)
        return kept[SITE]

    study.spoil = twist
    summary = study.run()
    by_name = {site["name"]: site for site in summary["sites"]}
    assert by_name[SITE]["quarantine"] == "message.wrong-sender"
    assert by_name[SITE]["rounds"] == 0
