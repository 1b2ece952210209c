"""The tables and rules of Flower 1.41 by which housekeeping finds what nobody can ask for any more."""

from __future__ import annotations

import inspect

from flwr.common.constant import Status
from flwr.server.superlink.linkstate.linkstate import LinkState
from flwr.server.superlink.linkstate.sql_linkstate import SqlLinkState
from flwr.server.superlink.utils import check_abort
from flwr.supercore.state.alembic.utils import get_combined_metadata
from flwr.supercore.utils import int64_to_uint64, uint64_to_int64
from flwr.superlink.servicer.control import control_handlers

USED = {
    "message_ins": {"message_id", "run_id", "created_at", "ttl"},
    "message_res": {"message_id", "run_id", "reply_to_message_id"},
    "object_push_sessions": {"run_id"},
    "run_objects": {"run_id"},
}


def test_the_tables_have_the_columns_that_are_asked_for() -> None:
    tables = get_combined_metadata().tables
    for table, columns in USED.items():
        assert columns <= set(tables[table].columns.keys())


def test_every_table_with_a_run_is_emptied_or_known_to_be_small() -> None:
    of_runs = {name for name, table in get_combined_metadata().tables.items() if "run_id" in table.columns}
    small = {"run", "task", "run_connector", "series_runs"}  # a row a run or task
    agents = {"message", "task_event", "task_message", "task_usage", "automation", "compacted_contexts"}  # never ours
    assert of_runs - small - agents == set(USED)


def test_cleaning_up_a_run_deletes_messages_objects_and_sessions() -> None:
    text = inspect.getsource(LinkState.cleanup_run)
    for step in ("self.delete_messages(", "delete_objects_in_run(run_id)", "self.delete_sessions_in_run(run_id)"):
        assert step in text


def test_flower_cleans_up_only_when_somebody_asks_for_the_run() -> None:
    assert "state.cleanup_run(run_id)" in inspect.getsource(check_abort)
    assert "state.cleanup_run(run.run_id)" in inspect.getsource(control_handlers)


def test_numbers_of_runs_are_signed_in_the_database() -> None:
    assert int64_to_uint64(uint64_to_int64(2**64 - 5)) == 2**64 - 5


def test_runs_can_be_asked_for_by_their_numbers_and_by_how_far_they_are() -> None:
    assert {"run_ids", "statuses", "limit"} <= set(inspect.signature(SqlLinkState.get_run_info).parameters)
    assert (Status.PENDING, Status.STARTING, Status.RUNNING, Status.FINISHED) == (
        "pending",
        "starting",
        "running",
        "finished",
    )


def test_an_expired_message_is_handed_to_nobody() -> None:
    assert "MessageInsModel.created_at + MessageInsModel.ttl > current_time" in inspect.getsource(
        SqlLinkState._claim_message_ins_rows
    )
    assert "if available_until <= current_time:" in inspect.getsource(SqlLinkState._check_stored_messages)
