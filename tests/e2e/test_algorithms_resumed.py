"""Rules whose messages or sites build on earlier rounds: killed anywhere and resumed, they end with the same bits."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.journal_lines import entries
from tests.support.whole import Federation, Killed, Letter, Workshop, dense, same, workshop

RULES = {
    "flora": ["aggregation.algorithm=flora"],
    "fedex": ["aggregation.algorithm=fedex"],
    "rolora": ["aggregation.algorithm=rolora"],
    "fedask": ["aggregation.algorithm=fedask"],
    "fedsa": ["aggregation.algorithm=fedsa"],
    "local head": ["aggregation.local_head=true", "training.head_learning_rate=5"],
    "scaffold": ["training.variates=scaffold"],
    "error feedback": ["aggregation.upload=int4", "aggregation.upload_keep=0.2", "aggregation.error_feedback=true"],
    "feedback on two factors in turns": [
        "aggregation.algorithm=rolora",
        "aggregation.upload=int8",
        "aggregation.upload_keep=0.3",
        "aggregation.error_feedback=true",
    ],
}
INCREMENTAL = ("flora", "fedex", "rolora")
OFTEN = ("flora", "fedask", "error feedback", "scaffold")
every = pytest.mark.parametrize("rule", RULES)


@pytest.fixture(scope="module")
def wholes() -> dict[str, Federation]:
    return {}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("resumed")


@pytest.fixture
def shop(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workshop:
    return workshop(tmp_path, monkeypatch, shared=folder)


@pytest.fixture
def whole(shop: Workshop, wholes: dict[str, Federation], folder: Path) -> Callable[[str], Federation]:
    """Return a rule's study that nothing has interrupted, run once."""

    def find(rule: str) -> Federation:
        if rule not in wholes:
            wholes[rule] = shop.make(*words(rule), f"run.dir={folder / rule}")
            wholes[rule].run()
        return wholes[rule]

    return find


def words(rule: str) -> list[str]:
    return [*RULES[rule], "federation.rounds=4"]


def facts(study: Federation) -> list[dict[str, Any]]:
    """Return the metrics' lines without what a kill changes: time, and bytes of heads and receipts."""
    return [
        {key: value for key, value in line.items() if not key.endswith("seconds") and not key.startswith("bytes")}
        for line in study.lines()
    ]


def charged(study: Federation) -> dict[str, list[int]]:
    return {
        path.stem: sorted({entry["round"] for entry in entries(path, "reserve")})
        for path in study.sites.glob("*/*.journal")
    }


def assert_same(study: Federation, whole: Federation) -> None:
    assert same(study.state.to_arrays(), whole.state.to_arrays())
    assert study.released() == whole.released()
    assert facts(study) == facts(whole)
    assert charged(study) == charged(whole)
    rounds = study.plan.federation.rounds
    for site, one in study.trained_in(rounds).items():
        assert same(one.start, whole.trained_in(rounds)[site].start)
        assert same(one.state, whole.trained_in(rounds)[site].state)


def killed_before(*deaths: int) -> Callable[[Letter], str | None]:
    """Return a hand that stops the study before these messages, counted over all its starts."""
    seen = [0]

    def meddle(_letter: Letter) -> str | None:
        seen[0] += 1
        return "kill" if seen[0] in deaths else None

    return meddle


@pytest.mark.parametrize("rule", [one if one in OFTEN else pytest.param(one, marks=pytest.mark.slow) for one in RULES])
def test_a_study_killed_again_and_again_ends_with_the_same_bits(
    shop: Workshop, whole: Callable[[str], Federation], rule: str
) -> None:
    study, draw = shop.make(*words(rule)), random.Random(rule)
    lives = 0
    while study.folder.summary() is None and lives < 40:
        study.meddle = killed_before(draw.randint(9, 20))
        with suppress(Killed):
            study.run()
        lives += 1
    assert lives > 2
    assert_same(study, whole(rule))


@every
def test_a_study_that_has_lost_its_newest_checkpoint_ends_with_the_same_bits(
    shop: Workshop, whole: Callable[[str], Federation], rule: str
) -> None:
    study = shop.make(*words(rule))
    study.meddle = lambda letter: (
        "kill" if (letter.kind, letter.number, letter.site) == ("train", 4, "site-002") else None
    )
    study.run_until_killed()
    (study.folder.checkpoints / "round-000003.safetensors").unlink()
    study.meddle = lambda _letter: None
    study.run()
    assert [one.number for one in study.trainings if one.site == "site-001"][:5] == [1, 2, 3, 4, 3]
    assert_same(study, whole(rule))


@pytest.mark.slow
@every
@pytest.mark.parametrize("seed", range(4))
def test_a_study_killed_dozens_of_times_ends_with_the_same_bits(
    shop: Workshop, whole: Callable[[str], Federation], rule: str, seed: int
) -> None:
    study, draw = shop.make(*words(rule)), random.Random(f"{rule} {seed}")
    for _ in range(60):
        if study.folder.summary() is not None:
            break
        study.meddle = killed_before(draw.randint(1, 16))
        with suppress(Killed):
            study.run()
        newest = sorted(study.folder.checkpoints.glob("round-*"))
        if draw.random() < 0.2 and len(newest) == 2:
            newest[-1].unlink()
    study.meddle = lambda _letter: None
    study.run()
    assert_same(study, whole(rule))


@pytest.mark.parametrize("rule", INCREMENTAL)
def test_a_site_that_has_lost_what_it_was_sent_misses_one_round_and_is_then_sent_everything(
    shop: Workshop, rule: str
) -> None:
    study = shop.make(*words(rule), "federation.rounds=5", "evaluation.every=5")
    site = "site-002"

    def meddle(letter: Letter) -> None:
        if (letter.kind, letter.number, letter.site) == ("train", 3, site):
            for path in (study.sites / site).glob("received-*"):
                path.unlink()

    study.meddle = meddle
    study.run()
    assert [line["failed"] for line in study.lines()] == [{}, {}, {site: "message.lacks-state"}, {}, {}]
    standings = {letter.number: letter.instruction.standing for letter in study.letters_to(site)}
    assert standings[3].base
    assert (standings[4].base, standings[4].since) == ("", 0)
    assert standings[5].base
    for number in (4, 5):
        mine, other = study.trained_in(number)[site].start, study.trained_in(number)["site-001"].start
        assert mine.keys() == other.keys()
        assert held(study, mine) == pytest.approx(held(study, other), rel=1e-5, abs=1e-7)


def held(study: Federation, start: Any) -> np.ndarray:
    """Return W − W0 of all layers that a site starts from."""
    found = []
    for spec_a, spec_b in study.merging.layout.pairs:
        total = dense(start[spec_a.name], start[spec_b.name])
        if f"drift/{spec_a.name}" in start:
            total = total + dense(start[f"drift/{spec_a.name}"], start[f"drift/{spec_b.name}"])
        found.append(total.ravel())
    return np.concatenate(found)


@pytest.mark.parametrize("rule", ["flora", "fedex"])
def test_a_site_that_loses_it_between_training_and_measuring_misses_a_measurement_and_no_round(
    shop: Workshop, rule: str
) -> None:
    study = shop.make(*words(rule))
    site = "site-003"

    def meddle(letter: Letter) -> None:
        if (letter.kind, letter.number, letter.site) == ("evaluate", 2, site):
            for path in (study.sites / site).glob("received-*"):
                path.unlink()

    study.meddle = meddle
    summary = study.run()
    assert [line["failed"] for line in study.lines()] == [{}] * 4
    by_name = {one["name"]: one for one in summary["sites"]}
    assert by_name[site]["rounds"] == 4
    assert by_name[site]["failures"] == {"message.lacks-state": 1}


@pytest.mark.parametrize("rule", ["fedsa", "scaffold", "error feedback"])
def test_a_site_whose_vault_has_lost_what_it_kept_begins_anew_and_the_study_goes_on(shop: Workshop, rule: str) -> None:
    study = shop.make(*words(rule))
    site = "site-002"

    def meddle(letter: Letter) -> None:
        if (letter.kind, letter.number, letter.site) == ("train", 3, site):
            vault = _vault(study, site)
            for name in [name for name in vault.names() if name.startswith("kept-")]:
                vault.remove(name)

    study.meddle = meddle
    summary = study.run()
    assert [one["rounds"] for one in summary["sites"]] == [4, 4, 4]


def _vault(study: Federation, site: str) -> Any:
    from fedtune_client.simulated import _vault as open_vault

    return open_vault(study.sites / site)


def test_a_copy_of_a_site_that_is_older_than_the_coordinators_count_is_not_made_to_guess(shop: Workshop) -> None:
    """What a site keeps after a round that it does not have any more: it goes on from the newest before it."""
    study = shop.make(*words("fedsa"))
    site = "site-001"

    def meddle(letter: Letter) -> None:
        if (letter.kind, letter.number, letter.site) == ("train", 4, site):
            vault = _vault(study, site)
            vault.remove(next(name for name in vault.names() if name.startswith("kept-") and name.endswith("000003")))

    study.meddle = meddle
    study.run()
    spec = study.merging.layout.pairs[0][1]
    assert same({"B": study.trained_in(4)[site].start[spec.name]}, {"B": study.trained_in(2)[site].state[spec.name]})
