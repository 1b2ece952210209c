"""Attacks through the coordinator's own loop: what undoes the mean and not a rule, and sites that drop out of a rule.

The sites are scripted: each moves every number of the adapter by its own 0.01 to 0.07 a round, nothing trains.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from flwr.app import RecordDict

from fedtune.config.machine import ENVIRONMENT_VARIABLE
from fedtune.errors import AggregationError, FederationError
from fedtune.flower.messages import Refusal, Update, encode_reply
from fedtune.model.layout import AdapterState
from fedtune.simulation.workspace import open_workspace
from tests.support.attacks import Attack, gaussian, scaled
from tests.support.studies import TinyStudy, site_name, tiny_study
from tests.support.tiny import bank_csv, tiny_base

MakeStudy = Callable[..., TinyStudy]
SITES = 7
ATTACKERS = [6]
backwards = partial(scaled, factor=-100.0)
DEFENCES: list[tuple[str, Attack]] = [
    ("median", gaussian),
    ("trimmed_mean", scaled),
    ("geometric_median", backwards),
    ("krum", gaussian),
    ("multi_krum", backwards),
    ("bulyan", scaled),
    ("norm_clip", scaled),
]
PRODUCT_DEFENCES = ["geometric_median", "krum", "multi_krum", "norm_clip"]


@pytest.fixture(scope="module")
def base_and_records(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("attacked")
    return tiny_base(folder / "base"), bank_csv(folder / "bank.csv", rows=60)


@pytest.fixture
def make_study(base_and_records: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeStudy:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "")

    def make(*overrides: str) -> TinyStudy:
        run_dir = tmp_path / f"run-{len(list(tmp_path.iterdir()))}"
        run_dir.mkdir()
        fixed = [
            "privacy=off",
            f"federation.sites={SITES}",
            "federation.rounds=2",
            "federation.quorum=1",
            "lora.rank=2",
        ]
        return tiny_study(*base_and_records, run_dir, *fixed, "aggregation.algorithm=ffa", *overrides)

    return make


def attacked(study: TinyStudy, attack: Attack, only: str = "") -> TinyStudy:
    """Let the attackers send what an attack makes of the round's updates, in the tensors whose names hold `only`."""
    sites = study.sites
    shifts = [sites.shift(site_name(index)) for index in range(SITES)]

    def twist(index: int, update: Update) -> RecordDict:
        names = [name for name in update.state if only in name]
        centre = {name: update.state[name] - shifts[index] for name in names}
        states = [{name: centre[name] + shift for name in names} for shift in shifts]
        sent = attack(states, centre, ATTACKERS)[index]
        return encode_reply(replace(update, state={**update.state, **sent}))

    rounds = range(1, study.plan.federation.rounds + 1)
    sites.twists = {(site_name(index), number): partial(twist, index) for index in ATTACKERS for number in rounds}
    return study


def moved(study: TinyStudy) -> AdapterState:
    """Return by how much a study that ran has moved what its sites send."""
    start = open_workspace(study.plan, study.machine).initial
    return {name: array - start[name] for name, array in study.adapter().items() if "lora_A" not in name}


def is_among_honest_sites(study: TinyStudy) -> bool:
    """Return whether every number has moved as the honest sites move it in each round, or less or more by rounding."""
    shifts = [study.sites.shift(site_name(index)) for index in range(SITES) if index not in ATTACKERS]
    rounds, slack = study.plan.federation.rounds, 1e-5
    least, most = rounds * min(shifts) - slack, rounds * max(shifts) + slack
    return all(bool(np.all((least <= array) & (array <= most))) for array in moved(study).values())


@pytest.mark.parametrize(("rule", "attack"), DEFENCES, ids=[rule for rule, _ in DEFENCES])
def test_a_rule_holds_where_the_mean_falls(make_study: MakeStudy, rule: str, attack: Attack) -> None:
    undefended = attacked(make_study(), attack)
    undefended.start()
    assert not is_among_honest_sites(undefended)
    defended = attacked(make_study(f"aggregation.robust={rule}", "aggregation.attackers=1"), attack)
    summary = defended.start()
    assert is_among_honest_sites(defended)
    assert all(site["rounds"] == 2 for site in summary["sites"])  # nobody's reply was refused: the rule did it


@pytest.mark.parametrize("rule", PRODUCT_DEFENCES)
def test_a_rule_in_product_space_holds_where_flexlora_falls(make_study: MakeStudy, rule: str) -> None:
    words = ["aggregation.algorithm=flexlora", "federation.rounds=1"]
    undefended = attacked(make_study(*words), scaled, only="lora_B")
    undefended.start()
    defended = attacked(make_study(*words, f"aggregation.robust={rule}", "aggregation.attackers=1"), scaled, "lora_B")
    defended.start()
    longest = max(length_if_only(defended, site_name(index)) for index in range(SITES) if index not in ATTACKERS)
    assert length(undefended, undefended.adapter()) > 5 * longest
    assert length(defended, defended.adapter()) <= longest * (1 + 1e-5)


def length_if_only(study: TinyStudy, name: str) -> float:
    """Return the length of ΔW that a site alone would make of the start."""
    start, shift = open_workspace(study.plan, study.machine).initial, study.sites.shift(name)
    return length(study, {tensor: array + shift for tensor, array in start.items()})


def length(study: TinyStudy, adapter: AdapterState) -> float:
    """Return the Frobenius norm of B·A over all layers."""
    pairs = open_workspace(study.plan, study.machine).layout.pairs
    products = [adapter[B.name].astype(float) @ adapter[A.name] for A, B in pairs]
    return float(np.sqrt(sum((product**2).sum() for product in products)))


def drop_out(study: TinyStudy, *indices: int, number: int = 1) -> TinyStudy:
    """Let sites refuse to answer a round."""
    refusal = encode_reply(Refusal("site.internal"))
    study.sites.twists |= {(site_name(index), number): lambda _update: refusal for index in indices}
    return study


@pytest.mark.parametrize(("rule", "least"), [("median", 3), ("krum", 5), ("bulyan", 7)])
def test_a_quorum_below_what_the_rule_needs_is_refused_before_anything_runs(
    make_study: MakeStudy, rule: str, least: int
) -> None:
    words = [f"aggregation.robust={rule}", "aggregation.attackers=1"]
    make_study(*words, f"federation.quorum={least / SITES - 0.01}")
    with pytest.raises(AggregationError, match=f"{least} sites, there are {least - 1}") as caught:
        make_study(*words, f"federation.quorum={(least - 1) / SITES - 0.01}")
    assert caught.value.code == "aggregation.too-few-sites"
    assert f"use {least} or more sites" in caught.value.hint


def test_sites_may_drop_out_down_to_the_quorum_and_the_rule_still_holds(make_study: MakeStudy) -> None:
    words = ["aggregation.robust=krum", "aggregation.attackers=1", f"federation.quorum={5 / SITES - 0.01}"]
    study = drop_out(attacked(make_study(*words), backwards), 0, 1)
    summary = study.start()
    assert [sorted(line["failed"]) for line in study.lines()] == [[site_name(0), site_name(1)], []]
    assert summary["rounds"] == 2
    assert is_among_honest_sites(study)


def test_one_site_fewer_ends_the_study_without_an_adapter_and_it_goes_on_when_the_sites_are_back(
    make_study: MakeStudy,
) -> None:
    words = ["aggregation.robust=krum", "aggregation.attackers=1", f"federation.quorum={5 / SITES - 0.01}"]
    study = drop_out(attacked(make_study(*words), backwards), 0, 1, 2, number=2)
    with pytest.raises(FederationError, match="round 2: 4 of 7 sites answered, 5 are needed") as caught:
        study.start()
    assert caught.value.code == "federation.no-quorum"
    assert study.folder.summary() is None
    assert not study.folder.adapter.exists()
    for index in (0, 1, 2):
        del study.sites.twists[(site_name(index), 2)]
    assert study.go_on()["rounds"] == 2
    assert is_among_honest_sites(study)


def test_an_attacker_that_is_caught_lying_counts_as_dropped_out(make_study: MakeStudy) -> None:
    words = ["aggregation.robust=median", "aggregation.attackers=1", "aggregation.max_update_norm=10"]
    study = attacked(make_study(*words), backwards)
    with pytest.raises(FederationError, match="6 of 7 sites answered") as caught:
        study.start()
    assert f"{site_name(6)}: aggregation.oversized-norm" in caught.value.message
