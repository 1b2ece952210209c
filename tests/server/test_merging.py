"""What the coordinator sends to each site and takes back from it: the same state on both sides, and nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedtune.aggregation.assembly import codec_of
from fedtune.aggregation.lora.protocol import Turn
from fedtune.aggregation.lora.registry import ALGORITHMS
from fedtune.errors import FedtuneError
from fedtune.privacy.random import SeededSource
from fedtune_server.facts import SiteFacts
from fedtune_server.merging import Merging, Sending
from tests.support.whole import Federation, Workshop, same, workshop

INCREMENTAL = ("rolora", "flora", "fedex")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("merging")


@pytest.fixture
def shop(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workshop:
    return workshop(tmp_path, monkeypatch, shared=folder)


def facts(**fields: Any) -> SiteFacts:
    return SiteFacts("site-001", 20, "d" * 64, **fields)


def state_of(study: Federation, seed: int = 0) -> Any:
    """Return a coordinator's state whose every tensor is random, as after some rounds."""
    draw, begun = np.random.default_rng(seed), study.merging.start()
    adapter = {name: draw.normal(size=array.shape).astype(np.float32) for name, array in begun.adapter.items()}
    memory = {name: draw.normal(size=array.shape).astype(np.float32) for name, array in begun.memory.items()}
    return replace(begun, adapter=adapter, memory=memory)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_what_the_coordinator_measures_and_takes_a_site_to_start_from_is_what_its_sites_do_start_from(
    shop: Workshop, name: str
) -> None:
    """A bound on the length of updates, and a codec's differences, are from there."""
    study = shop.make(f"aggregation.algorithm={name}", "federation.rounds=3")
    study.run()
    state = study.state_after(2)
    whole_adapter = study.merging.as_site_holds(state, 2)
    reference = study.merging.exchange(Turn(3), state).reference(0)
    up = set(study.merging.algorithm.up(study.merging.layout, Turn(3)).names)
    assert reference.keys() == up
    for one in study.trained_in(3).values():
        assert name == "fedsa" or same(one.start, whole_adapter)
        known = {tensor: one.start[tensor] for tensor in up & one.start.keys()}
        assert all(np.array_equal(reference[tensor], array) for tensor, array in known.items())
        assert all(not np.any(reference[tensor]) for tensor in up - known.keys())


@pytest.mark.parametrize("name", ["flexlora", "hetlora", "flora"])
def test_sites_of_each_rank_are_sent_their_own_once_made(shop: Workshop, name: str) -> None:
    study = shop.make(f"aggregation.algorithm={name}", "lora.rank=4", "lora.ranks=[1,4,2]")
    sending = study.merging.exchange(Turn(2), state_of(study))
    for rank in (1, 2, 4):
        message = sending.message(rank, 0)
        down = study.merging.algorithm.down(study.merging.at(rank), Turn(2), 0)
        assert {key: array.shape for key, array in message.items()} == {spec.name: spec.shape for spec in down.tensors}
        assert sending.message(rank, 0) is message
    assert study.merging.at(0) is study.merging.at(4) is study.merging.layout


# --- marks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", INCREMENTAL)
def test_a_mark_names_one_state_of_one_round_at_one_rank(shop: Workshop, name: str) -> None:
    study = shop.make(f"aggregation.algorithm={name}")
    state = state_of(study)
    moved = replace(
        state, adapter={key: np.nextafter(array, 9, dtype=np.float32) for key, array in state.adapter.items()}
    )
    marks = [
        study.merging.exchange(Turn(2), state).mark(0),
        study.merging.exchange(Turn(3), state).mark(0),
        study.merging.exchange(Turn(2), moved).mark(0),
        study.merging.exchange(Turn(2), state).mark(1),
    ]
    assert len(set(marks)) == len(marks)
    assert study.merging.exchange(Turn(2), state_of(study)).mark(0) == marks[0]
    assert {len(mark) for mark in marks} == {32}


@pytest.mark.parametrize("name", [name for name in ALGORITHMS if name not in INCREMENTAL])
def test_an_algorithm_that_sends_whole_adapters_asks_nobody_to_keep_them(shop: Workshop, name: str) -> None:
    study = shop.make(f"aggregation.algorithm={name}")
    instruction = study.merging.exchange(Turn(2), study.merging.start()).instruction(facts(), 2)
    assert (instruction.standing.mark, instruction.standing.base, instruction.standing.since) == ("", "", 0)


def test_a_site_is_told_where_it_is_taken_to_stand(shop: Workshop) -> None:
    study = shop.make("aggregation.algorithm=flora")
    sending = study.merging.exchange(Turn(3), study.merging.start())
    standing = sending.instruction(facts(counted=2, holds=1, mark="ab" * 16), 3).standing
    assert (standing.since, standing.base, standing.counted, standing.part) == (1, "ab" * 16, 2, 0)
    assert standing.mark == sending.mark(0)


# --- replies --------------------------------------------------------------------------------------------------------


def honest(sending: Sending) -> dict[str, np.ndarray]:
    return {key: array + np.float32(0.1) for key, array in sending.reference(0).items()}


@pytest.fixture
def sending(shop: Workshop) -> Sending:
    study = shop.make("aggregation.max_update_norm=10")
    return study.merging.exchange(Turn(2), state_of(study))


def test_an_honest_reply_is_taken_as_it_is(sending: Sending) -> None:
    sent = honest(sending)
    assert same(sending.read(0, sent), sent)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda one: one.astype(np.float64), "message.wrong-dtype"),
        (lambda one: one.astype(np.float16), "message.wrong-dtype"),
        (lambda one: one.ravel(), "message.wrong-shape"),
        (lambda one: one[:0], "message.wrong-shape"),
        (lambda one: one * np.float32(np.nan), "aggregation.not-finite"),
        (lambda one: one + np.float32(100), "aggregation.oversized-norm"),
        (lambda one: np.full_like(one, np.finfo(np.float32).max), "aggregation.oversized-norm"),
    ],
)
def test_a_reply_that_no_honest_site_sends_is_refused(sending: Sending, change: Any, code: str) -> None:
    sent = honest(sending)
    first = next(iter(sent))
    with pytest.raises(FedtuneError) as caught:
        sending.read(0, {**sent, first: change(sent[first])})
    assert caught.value.code == code


def test_a_compressed_reply_is_held_to_the_same_bound(shop: Workshop) -> None:
    """After decoding: what counts is what would be averaged."""
    study = shop.make("aggregation.upload=int8", "aggregation.max_update_norm=10")
    sending = study.merging.exchange(Turn(2), state_of(study))
    codec = codec_of(study.plan.aggregation)
    assert codec is not None
    up = study.merging.algorithm.up(study.merging.layout, Turn(2))
    short, long = (
        codec.encode(
            {k: a + np.float32(by) for k, a in sending.reference(0).items()},
            sending.reference(0),
            up,
            {},
            SeededSource("x"),
        )[0]
        for by in (0.1, 5.0)
    )
    sending.read(0, short.arrays)
    with pytest.raises(FedtuneError, match=r"aggregation\.oversized-norm"):
        sending.read(0, long.arrays)


def test_a_whole_adapter_names_its_increments_beside_its_tensors(shop: Workshop) -> None:
    study = shop.make("aggregation.algorithm=fedex", "federation.rounds=1")
    study.run()
    held = study.merging.as_site_holds(study.state, 1)
    drift = {key for key in held if key.startswith("drift/")}
    assert drift == {f"drift/{spec.name}" for pair in study.merging.layout.pairs for spec in pair}
    assert held.keys() - drift == set(study.merging.layout.names)


def test_two_coordinators_of_one_plan_begin_alike(shop: Workshop) -> None:
    for name in ALGORITHMS:
        study = shop.make(f"aggregation.algorithm={name}")
        again = Merging.of(study.plan, study.merging.layout, study.merging.initial)
        assert same(again.start().to_arrays(), study.merging.start().to_arrays())
