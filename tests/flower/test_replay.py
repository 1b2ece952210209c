from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_TOLERANCE
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.errors import TransportError
from fedtune.flower.replay import AHEAD, WINDOW, ReplayCache

NOW = 1_800_000_000.0


class Clock:
    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> float:
        return self.now


Opened = Callable[..., ReplayCache]


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def opened(tmp_path: Path, clock: Clock) -> Iterator[Opened]:
    caches: list[ReplayCache] = []

    def open_again(**changes: int) -> ReplayCache:
        while caches:
            caches.pop().close()
        caches.append(ReplayCache(tmp_path / "seen", clock=clock, **changes))
        return caches[0]

    yield open_again
    for cache in caches:
        cache.close()


def test_the_memory_is_longer_than_flower_accepts_a_signature() -> None:
    assert WINDOW > TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE
    assert AHEAD > SYSTEM_TIME_TOLERANCE


def test_ten_thousand_replays_are_all_refused_also_after_a_restart(opened: Opened, clock: Clock) -> None:
    cache = opened()
    identities = [(b"%d" % index, NOW - index % 300) for index in range(5_000)]
    assert [cache.admit(*each) for each in identities] == ["new"] * 5_000
    assert [cache.admit(*each) for each in identities] == ["replayed"] * 5_000
    cache = opened()
    assert [cache.admit(*each) for each in identities] == ["replayed"] * 5_000


def test_a_signature_never_becomes_young_again(opened: Opened, clock: Clock) -> None:
    cache = opened()
    assert cache.admit(b"a", NOW) == "new"
    for _ in range(40):
        clock.now += 10
        assert cache.admit(b"a", NOW) in {"replayed", "stale"}
    assert cache.admit(b"a", NOW) == "stale"


@pytest.mark.parametrize("restarted", [False, True])
def test_a_clock_that_is_set_back_lets_nothing_in(opened: Opened, clock: Clock, restarted: bool) -> None:
    cache = opened()
    cache.admit(b"old", NOW)
    clock.now = NOW + 3_600
    cache.admit(b"recent", clock.now)
    clock.now = NOW
    cache = opened() if restarted else cache
    assert cache.admit(b"old", NOW) == "clock-back"
    clock.now = NOW + 3_600
    assert cache.admit(b"other", clock.now) == "new"


def test_what_is_signed_for_later_is_refused(opened: Opened, clock: Clock) -> None:
    assert opened().admit(b"a", NOW + AHEAD + 1) == "stale"


def test_a_full_memory_refuses_instead_of_forgetting(opened: Opened, clock: Clock) -> None:
    cache = opened(capacity=10)
    assert [cache.admit(b"%d" % index, NOW) for index in range(11)] == ["new"] * 10 + ["full"]
    assert cache.admit(b"3", NOW) == "replayed"
    clock.now += WINDOW + 40
    assert cache.admit(b"later", clock.now) == "new"


def test_memory_and_files_go_with_the_window(opened: Opened, clock: Clock, tmp_path: Path) -> None:
    cache = opened()
    for second in range(4_000):
        clock.now = NOW + second
        cache.admit(b"%d" % second, clock.now)
    assert len(cache) <= WINDOW + 2 * 32
    assert len(list((tmp_path / "seen").glob("*.seen"))) <= WINDOW / 32 + 2


def test_a_torn_record_costs_only_itself(opened: Opened, tmp_path: Path) -> None:
    cache = opened()
    for index in range(3):
        cache.admit(b"%d" % index, NOW)
    (file,) = (tmp_path / "seen").glob("*.seen")
    os.truncate(file, file.stat().st_size - 5)
    cache = opened()
    assert [cache.admit(b"%d" % index, NOW) for index in (0, 1)] == ["replayed"] * 2
    assert [cache.admit(b"3", NOW), cache.admit(b"2", NOW)] == ["new"] * 2
    cache = opened()
    assert [cache.admit(b"%d" % index, NOW) for index in range(4)] == ["replayed"] * 4


def test_what_cannot_be_written_down_is_not_let_in(
    opened: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, written = opened(), os.write

    def full(descriptor: int, data: bytes) -> int:
        written(descriptor, data[:3])
        raise OSError(28, "No space left on device")

    cache.admit(b"before", NOW)
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        assert cache.admit(b"a", NOW) == "unwritable"
    assert cache.admit(b"a", NOW) in {"unwritable", "new"}
    assert cache.admit(b"b", NOW) == "new"
    cache = opened()
    assert [cache.admit(name, NOW) for name in (b"before", b"b")] == ["replayed"] * 2


def test_two_processes_do_not_share_a_memory(opened: Opened, tmp_path: Path) -> None:
    opened()
    with pytest.raises(TransportError, match="in use"):
        ReplayCache(tmp_path / "seen")


def test_what_was_forgotten_stays_stale_when_the_clock_is_set_back_across_a_restart(tmp_path: Path) -> None:
    clock = Clock()
    clock.now += 400
    cache = ReplayCache(tmp_path / "seen", clock=clock)
    assert cache.admit(b"a", NOW + 181) == "new"
    clock.now += 200
    cache.admit(b"b", NOW)  # by now everything of a's time has been forgotten
    assert len(cache) == 0
    cache.close()
    clock.now -= 100
    cache = ReplayCache(tmp_path / "seen", clock=clock)
    assert cache.admit(b"a", NOW + 181) in {"stale", "clock-back"}
    cache.close()


@given(data=st.data())
@settings(max_examples=50)
def test_nothing_that_flower_would_take_goes_through_twice(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    clock = Clock()
    folder = tmp_path_factory.mktemp("seen")
    cache, admitted = ReplayCache(folder, clock=clock), set[tuple[bytes, float]]()
    for _ in range(data.draw(st.integers(1, 30))):
        clock.now += data.draw(st.sampled_from([0.0, 1.0, 40.0, 200.0, -3.0, -100.0]))
        if data.draw(st.booleans()):
            cache.close()
            cache = ReplayCache(folder, clock=clock)
        each = data.draw(st.sampled_from([b"a", b"b"])), NOW + data.draw(st.integers(0, 400))
        if cache.admit(*each) == "new":
            assert each not in admitted
            assert clock.now - WINDOW < each[1] < clock.now + AHEAD
            admitted.add(each)
    cache.close()
