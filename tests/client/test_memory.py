"""What a site keeps of its optimiser: a repeated round starts where it started the first time."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np
import pytest

from fedtune.errors import MessageError
from fedtune_client.memory import OptimizerMemory, ReceivedStates

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray


def moments(value: float) -> dict[str, NDArray[np.float32]]:
    return {"x.lora_B.weight/exp_avg": np.full((3, 2), value, np.float32), "x.lora_B.weight/step": np.float32([value])}


@pytest.fixture
def memory(tmp_path: Path) -> OptimizerMemory:
    return OptimizerMemory(tmp_path / "sites" / "site-0")


def started_from(memory: OptimizerMemory, number: int) -> float | None:
    state = memory.before(number)
    return float(state["x.lora_B.weight/step"][0]) if state else None


def test_the_first_round_starts_from_nothing(memory: OptimizerMemory) -> None:
    assert started_from(memory, 1) is None


def test_state_is_kept_bit_for_bit(memory: OptimizerMemory) -> None:
    kept = {name: np.float32([0.1, -1e-38, 3e38]) for name in moments(0)}
    memory.keep(1, kept)
    found = OptimizerMemory(memory.folder).before(2)
    assert found.keys() == kept.keys()
    assert all(found[name].tobytes() == kept[name].tobytes() for name in kept)


def test_a_scalar_keeps_its_shape(memory: OptimizerMemory) -> None:
    memory.keep(1, {"x/step": np.array(4.0, np.float32)})
    assert memory.before(2)["x/step"].shape == ()


def test_a_repeated_round_starts_from_the_same_state(memory: OptimizerMemory) -> None:
    memory.keep(1, moments(1))
    memory.keep(2, moments(2))
    assert started_from(memory, 2) == 1
    memory.keep(2, moments(2.5))
    assert started_from(memory, 2) == 1
    assert started_from(memory, 3) == 2.5


def test_a_site_that_sat_out_some_rounds_goes_on_from_its_own_last_one(memory: OptimizerMemory) -> None:
    memory.keep(3, moments(3))
    assert started_from(memory, 9) == 3


def test_rounds_are_ordered_as_numbers(memory: OptimizerMemory) -> None:
    for number in (9, 10, 99, 100):
        memory.keep(number, moments(number))
    assert started_from(memory, 101) == 100
    assert started_from(memory, 100) == 99


def test_a_coordinator_that_goes_back_two_rounds_finds_their_start(memory: OptimizerMemory) -> None:
    """It keeps two checkpoints, so the oldest round that it can ask for again is the one after the older of them."""
    for number in range(1, 8):
        memory.keep(number, moments(number))
    assert [started_from(memory, number) for number in (6, 7, 8)] == [5, 6, 7]


def test_old_states_are_dropped(memory: OptimizerMemory) -> None:
    for number in range(1, 20):
        memory.keep(number, moments(number))
    assert len(list(memory.folder.iterdir())) == 3


def test_a_file_that_a_killed_writer_left_is_not_a_state(memory: OptimizerMemory) -> None:
    memory.keep(1, moments(1))
    (memory.folder / ".optimizer-000002.safetensors.partial").write_bytes(b"half")
    assert started_from(memory, 3) == 1


def test_nothing_to_keep_leaves_no_file(memory: OptimizerMemory) -> None:
    memory.keep(1, {})
    assert not memory.folder.exists()


# --- what a site was sent -------------------------------------------------------------------------------------------


@pytest.fixture
def received(tmp_path: Path) -> ReceivedStates:
    return ReceivedStates(tmp_path / "sites" / "site-0")


def mark(number: int) -> str:
    return f"{number:032x}"


def test_a_received_state_comes_back_bit_for_bit_with_names_that_hold_slashes(received: ReceivedStates) -> None:
    adapter = {"head.weight": np.float32([[0.1, -1e-38]]), "a/b": np.zeros((0, 3), np.float32)}
    memory = {"drift/x.lora_A.weight": np.arange(6, dtype=np.float32).reshape(2, 3).T}
    received.keep(mark(1), adapter, memory)
    for kept, found in zip((adapter, memory), ReceivedStates(received.folder).get(mark(1)), strict=True):
        assert kept.keys() == found.keys()
        assert all(np.array_equal(kept[name], found[name]) and kept[name].shape == found[name].shape for name in kept)


def test_a_state_that_is_not_there_is_said_to_be_lacking(received: ReceivedStates) -> None:
    with pytest.raises(MessageError, match=r"message\.lacks-state"):
        received.get(mark(1))


def test_the_newest_few_states_stay(received: ReceivedStates) -> None:
    for number in range(1, 8):
        received.keep(mark(number), {"x": np.float32([number])}, {})
    for number in (5, 6, 7):
        assert received.get(mark(number))[0]["x"] == [number]
    with pytest.raises(MessageError):
        received.get(mark(4))


def test_a_state_that_is_used_again_is_not_the_oldest(received: ReceivedStates) -> None:
    """A coordinator that goes back asks for what it asked for before: that must not push out what it names next."""
    for number in (1, 2, 3):
        received.keep(mark(number), {"x": np.float32([number])}, {})
    received.keep(mark(1), {"x": np.float32([1])}, {})
    received.keep(mark(4), {"x": np.float32([4])}, {})
    assert received.get(mark(1))[0]["x"] == [1]


def test_a_state_that_messages_still_build_on_stays(received: ReceivedStates) -> None:
    """As at a site whose updates come too late, round after round: the coordinator goes on naming the last counted."""
    received.keep(mark(0), {"x": np.float32([0])}, {})
    for number in range(1, 8):
        assert received.get(mark(0))[0]["x"] == [0]
        received.keep(mark(number), {"x": np.float32([number])}, {})
    assert len(list(received.folder.iterdir())) == 3


def test_a_clock_that_was_set_back_does_not_make_the_newest_state_the_oldest(received: ReceivedStates) -> None:
    for number in (1, 2, 3):
        received.keep(mark(number), {"x": np.float32([number])}, {})
    for path in received.folder.glob("received-*"):
        os.utime(path, (2e9, 2e9))
    received.keep(mark(4), {"x": np.float32([4])}, {})
    assert received.get(mark(4))[0]["x"] == [4]
    assert len(list(received.folder.iterdir())) == 3


def test_a_state_that_a_killed_writer_left_half_is_none(received: ReceivedStates) -> None:
    received.keep(mark(1), {"x": np.float32([1])}, {})
    (received.folder / f".received-{mark(2)}.safetensors.partial").write_bytes(b"half")
    with pytest.raises(MessageError, match=r"message\.lacks-state"):
        received.get(mark(2))
    assert received.get(mark(1))[0]["x"] == [1]


def test_a_damaged_state_is_as_good_as_none(received: ReceivedStates) -> None:
    """The coordinator then sends everything: a site with a broken file must not be lost to the study."""
    received.keep(mark(1), {"x": np.float32([1])}, {})
    (path,) = received.folder.glob("received-*")
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(MessageError, match=r"message\.lacks-state"):
        received.get(mark(1))
