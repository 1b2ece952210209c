"""What stays in a SuperLink's state after runs and rounds in which not everything went well."""

from __future__ import annotations

import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest
from flwr.supercore.object_store.sql_object_store import SqlObjectStore

from fedtune.flower.housekeeping import Housekeeper, Tidied
from tests.support.link_state import LinkState, content, message, reply_to

SIZE = 200_000
NOTHING = Tidied(0, 0, 0, 0)
HOUR = 3600.0


@pytest.fixture
def link(tmp_path: Path) -> LinkState:
    return LinkState.make(tmp_path, nodes=3)


def keeper(link: LinkState, ahead: float = 0.0) -> Housekeeper:
    """Return a housekeeper whose clock is ahead of Flower's."""
    return Housekeeper(link.state, link.path, lambda: time.time() + ahead)


def rows(link: LinkState) -> dict[str, int]:
    tables = ("objects", "object_children", "run_objects", "message_ins", "message_res", "object_push_sessions")
    with closing(sqlite3.connect(link.path)) as connection:
        return {table: connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in tables}


def troubled_round(link: LinkState, seed: int) -> None:
    """Ask three sites: one answers, one answers and is never asked for it, one never fetches its message."""
    grid = link.grid
    names = grid.push_messages([message(node, SIZE, seed) for node in link.nodes])
    for node in link.nodes[:2]:
        asked = link.pull(node)
        assert asked is not None
        link.push(node, reply_to(asked, content(SIZE, seed=1000 + seed)))
    grid.pull_messages(names[:1])


def test_what_a_finished_run_leaves_is_deleted_and_the_run_is_still_known(link: LinkState) -> None:
    troubled_round(link, 1)
    link.finish()
    assert min(rows(link).values()) == 0 < max(rows(link).values())
    tidied = keeper(link).tidy()
    assert (tidied.runs, tidied.messages) == (1, 0)
    assert set(rows(link).values()) == {0}
    assert link.object_bytes() == 0
    (run,) = link.state.get_run_info(run_ids=[link.run])
    assert run.status.sub_status == "completed"
    assert keeper(link).tidy() == NOTHING


def test_a_run_that_goes_on_keeps_everything_whose_time_is_not_over(link: LinkState) -> None:
    grid = link.grid
    (name,) = grid.push_messages([message(link.nodes[0], SIZE)])
    asked = link.pull(link.nodes[0])
    assert asked is not None
    answer = content(SIZE, seed=1)
    link.push(link.nodes[0], reply_to(asked, answer))
    before = rows(link)
    assert keeper(link).tidy() == NOTHING
    assert rows(link) == before
    (reply,) = grid.pull_messages([name])
    assert reply.content["x"] == answer["x"]


def test_messages_whose_time_is_over_are_deleted_with_their_replies(link: LinkState) -> None:
    troubled_round(link, 1)
    assert link.object_bytes() > SIZE
    assert keeper(link, ahead=HOUR).tidy().messages == 2
    assert set(rows(link).values()) == {0}
    assert link.object_bytes() == 0


def test_a_reply_that_the_coordinator_is_fetching_outlives_its_message(link: LinkState) -> None:
    grid = link.grid
    names = grid.push_messages([message(link.nodes[0], SIZE)])
    asked = link.pull(link.nodes[0])
    assert asked is not None
    link.push(link.nodes[0], reply_to(asked, content(SIZE, seed=1)))
    grid._announce(set(names))
    keeper(link, ahead=HOUR).tidy()
    (reply,) = grid.pull_messages(names)
    assert reply.has_content()


def left_after(link: LinkState, few: int, many: int, *, tidied: bool = True) -> list[tuple[int, int, int]]:
    """Return objects' rows, files' and database's bytes after few and after many rounds of one run."""
    left = {}
    for number in range(1, many + 1):
        troubled_round(link, number)
        if tidied:
            keeper(link, ahead=HOUR).tidy()
        left[number] = (rows(link)["objects"], link.object_bytes(), link.database_bytes())
    return [left[few], left[many]]


@pytest.mark.parametrize(("few", "many"), [(2, 6), pytest.param(5, 50, marks=pytest.mark.slow)])
def test_many_troubled_rounds_leave_no_more_than_few(link: LinkState, few: int, many: int) -> None:
    after_few, after_many = left_after(link, few, many)
    assert after_many[:2] == after_few[:2] == (0, 0)
    assert after_many[2] <= after_few[2]


def test_without_housekeeping_they_leave_more_with_each(link: LinkState) -> None:
    """The control for the test above."""
    after_few, after_many = left_after(link, 2, 4, tidied=False)
    assert after_many[1] == pytest.approx(2 * after_few[1], rel=0.01)


@pytest.mark.parametrize("runs", [4, pytest.param(50, marks=pytest.mark.slow)])
def test_finished_runs_leave_a_few_kilobytes_each(link: LinkState, runs: int) -> None:
    sizes = []
    for number in range(runs):
        troubled_round(link, number)
        link.finish()
        keeper(link).tidy()
        sizes.append(link.database_bytes())
        link.start()
    assert link.object_bytes() == 0
    assert sizes[-1] - sizes[0] <= 8192 * (runs - 1)


def test_a_database_that_was_large_becomes_small_when_no_run_is_under_way(tmp_path: Path) -> None:
    link = LinkState.make(tmp_path, nodes=3, store=SqlObjectStore)  # which keeps objects in the database
    link.grid.push_messages([message(link.nodes[0], 60 * SIZE)])
    large = link.database_bytes()
    assert large > 60 * SIZE
    assert keeper(link, ahead=HOUR).tidy() == Tidied(0, 1, 0, 0)  # a run is under way
    assert link.database_bytes() >= large
    link.finish()
    assert keeper(link).tidy().bytes > 59 * SIZE
    assert link.database_bytes() < large - 59 * SIZE
    assert set(rows(link).values()) == {0}


def test_files_that_a_crash_has_left_are_swept(link: LinkState) -> None:
    (link.path.parent / "link.db.objects" / ("f" * 64)).write_bytes(b"x")
    assert keeper(link).tidy() == Tidied(0, 0, 1, 0)


def test_a_database_that_another_process_writes_to_is_tidied_later(link: LinkState) -> None:
    troubled_round(link, 1)
    link.finish()
    with link.state.session(), closing(sqlite3.connect(link.path, timeout=0.1)) as other:
        other.execute("BEGIN IMMEDIATE")
        link.state.query("PRAGMA busy_timeout = 50")
        assert keeper(link).tidy() == NOTHING
        other.rollback()
    assert keeper(link).tidy().runs == 1
