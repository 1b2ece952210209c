from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
from flwr.supercore import sql_mixin
from flwr.supercore.sql_mixin import SqlMixin

from fedtune.flower import database
from fedtune.flower.database import PRAGMAS, Turns
from tests.support.federation import wait_for
from tests.support.link_state import new_database


def waiting(turns: Turns) -> int:
    return len(turns._waiting)


def test_turns_go_to_those_who_have_waited_longest() -> None:
    turns, order = Turns(), list[int]()

    def take(number: int) -> None:
        with turns:
            order.append(number)

    threads = [threading.Thread(target=take, args=(number,)) for number in range(20)]
    with turns:
        for number, thread in enumerate(threads):
            thread.start()
            wait_for(lambda wanted=number + 1: waiting(turns) == wanted, 5)
    for thread in threads:
        thread.join(5)
    assert order == list(range(20))


def test_one_thread_at_a_time_has_the_turn_and_may_take_it_again() -> None:
    turns, inside, most = Turns(), 0, 0

    def work() -> None:
        nonlocal inside, most
        for _ in range(50):
            with turns, turns:
                inside += 1
                most = max(most, inside)
                time.sleep(0)
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert (most, inside) == (1, 0)


def test_an_error_gives_the_turn_back() -> None:
    turns = Turns()
    with pytest.raises(ValueError, match="inside"), turns, turns:
        raise ValueError("inside")
    with turns:
        assert waiting(turns) == 0


class State(SqlMixin):
    """Something of Flower's that has a database."""


def test_transactions_of_many_threads_all_come_through_with_small_caches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sql_mixin, "SQLITE_PRAGMAS", sql_mixin.SQLITE_PRAGMAS)
    monkeypatch.setattr(SqlMixin, "session", SqlMixin.session)
    database.prepare()
    (tmp_path / "link.db").write_bytes(new_database())
    states = [State(str(tmp_path / "link.db")) for _ in range(2)]
    for state in states:
        state.initialize()
    states[0].query("CREATE TABLE counted (number INTEGER)")
    states[0].query("INSERT INTO counted VALUES (0)")

    def count(state: State) -> None:
        for _ in range(20):
            with state.session():
                (row,) = state.query("SELECT number FROM counted")
                time.sleep(0.001)
                state.query("UPDATE counted SET number = :next", {"next": row["number"] + 1})

    threads = [threading.Thread(target=count, args=(state,)) for state in states * 4]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert states[0].query("SELECT number FROM counted") == [{"number": 160}]
    assert states[0].query("PRAGMA cache_size") == [{"cache_size": int(dict(PRAGMAS)["cache_size"])}]
    assert states[0].query("PRAGMA mmap_size") == [{"mmap_size": 0}]
