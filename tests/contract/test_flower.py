"""What fedtune relies on in Flower beyond its documented surface; a failure names what moved."""

from __future__ import annotations

import ast
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, RecordDict
from flwr.app.user_config import UserConfig
from flwr.clientapp import ClientApp
from flwr.common import EventType
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.serverapp import Grid
from flwr.simulation.run_simulation import _run_simulation
from flwr.supercore.constant import NOOP_FEDERATION_ID
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from tests.support.flower_symbols import TRANSFER, TRANSPORT

ROOT = Path(__file__).parents[2]
SOURCES = [path for top in ("fedtune", "server", "client") for path in sorted((ROOT / top).rglob("*.py"))]
PUBLIC = {"flwr.app", "flwr.clientapp", "flwr.serverapp"}
NON_PUBLIC = {
    "flwr.app.user_config.UserConfig",
    "flwr.common.EventType",
    "flwr.common.constant.ErrorCode",
    "flwr.common.constant.SUPERLINK_NODE_ID",
    "flwr.simulation.run_simulation._run_simulation",
    "flwr.supercore.constant.NOOP_FEDERATION_ID",
    "flwr.supercore.run.Run",
    "flwr.supercore.task_identity.TaskIdentity",
}


def imported_from_flower(path: Path) -> set[tuple[str, str]]:
    """Return (module, name) of everything a file imports from Flower, also inside functions."""
    found: set[tuple[str, str]] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "flwr":
            found |= {(str(node.module), alias.name) for alias in node.names}
        if isinstance(node, ast.Import):
            found |= {(alias.name, "") for alias in node.names if alias.name.split(".")[0] == "flwr"}
    return found


@pytest.fixture
def message() -> Message:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 7, SUPERLINK_NODE_ID
    return Message(RecordDict({"c": ConfigRecord({"x": 1})}), 5, "train", ttl=2.0, group_id="3")


def test_only_one_package_knows_what_flower_does_not_publish() -> None:
    elsewhere = {
        (path.relative_to(ROOT).as_posix(), *found)
        for path in SOURCES
        if path.parent != ROOT / "fedtune" / "flower"
        for found in imported_from_flower(path)
        if found[0] not in PUBLIC
    }
    assert elsewhere == set()


def test_every_non_public_symbol_in_use_has_its_test_here() -> None:
    used = {".".join(found) for path in SOURCES for found in imported_from_flower(path) if found[0] not in PUBLIC}
    assert used == NON_PUBLIC | TRANSPORT | TRANSFER


def telemetry_after(module: str, **variables: str) -> list[str]:
    """Return Flower's two switches as a fresh process has them once `module` is imported."""
    names = ("FLWR_TELEMETRY_ENABLED", "FLWR_DISABLE_UPDATE_CHECK")
    environment = {name: value for name, value in os.environ.items() if name not in names} | variables
    code = (
        f"import os, {module}\nfrom flwr.supercore import telemetry, update_check\n"
        "print(telemetry.FLWR_TELEMETRY_ENABLED, os.environ[update_check.FLWR_DISABLE_UPDATE_CHECK])"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.split()


@pytest.mark.parametrize("module", ["fedtune_server", "fedtune_client", "fedtune.flower.engine"])
def test_telemetry_and_the_update_check_are_off_whichever_half_is_imported_first(module: str) -> None:
    assert telemetry_after(module) == ["0", "1"]


def test_a_person_can_turn_telemetry_on() -> None:
    assert telemetry_after("fedtune.flower", FLWR_TELEMETRY_ENABLED="1") == ["1", "1"]


def test_an_empty_run_takes_the_fields_that_the_engine_sets() -> None:
    run = Run.create_empty(run_id=7)
    assert run.run_id == 7
    assert hasattr(run, "primary_task_id")
    assert hasattr(run, "federation_id")
    assert isinstance(NOOP_FEDERATION_ID, str)


def test_the_task_identity_is_what_a_message_is_stamped_with(message: Message) -> None:
    assert message.metadata.run_id == 7
    assert message.metadata.src_node_id == SUPERLINK_NODE_ID == 1


def test_a_message_takes_an_id_through_its_metadata(message: Message) -> None:
    assert message.metadata.message_id == ""
    message.metadata.__dict__["_message_id"] = "m1"
    assert message.metadata.message_id == "m1"
    assert Message(RecordDict(), reply_to=message).metadata.reply_to_message_id == "m1"


def test_a_message_keeps_its_content_where_the_private_copy_replaces_it(message: Message) -> None:
    replaced = RecordDict()
    message.__dict__["_content"] = replaced
    assert message.content is replaced
    assert message.metadata.ttl == 2.0
    assert message.metadata.created_at > 0


def test_a_copied_record_holds_the_same_arrays_and_has_its_own_keys() -> None:
    record = ArrayRecord({"w": Array("float32", (1,), "raw", b"abcd")})
    copied = record.copy()
    copied["more"] = copied["w"]
    assert copied["w"] is record["w"]
    assert "more" not in record


def test_an_array_keeps_a_foreign_serialisation_and_its_bytes() -> None:
    array = ArrayRecord({"w": Array("float32", (1,), "fedtune.raw-le", b"abcd")})["w"]
    assert (array.dtype, array.shape, array.stype, array.data) == ("float32", (1,), "fedtune.raw-le", b"abcd")


def test_an_error_reply_carries_a_number_and_the_reason_it_was_given(message: Message) -> None:
    reply = Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "site.internal"), reply_to=message)
    assert (reply.error.code, reply.error.reason) == (2, "site.internal")


def test_flowers_own_client_runtime_would_send_the_text_which_is_why_the_site_catches_everything() -> None:
    from flwr.server.superlink.fleet.vce.vce_api import worker

    assert "str(ex)" in inspect.getsource(worker)


def test_a_client_app_raises_what_its_function_raises(message: Message) -> None:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        raise LookupError("inside")

    with pytest.raises(LookupError, match="inside"):
        app(message, Context(7, 5, {}, RecordDict(), {}))


def test_the_grid_has_no_other_abstract_methods_than_the_in_process_grid_implements() -> None:
    assert Grid.__abstractmethods__ == {
        "create_message",
        "get_node_ids",
        "pull_messages",
        "push_messages",
        "run",
        "send_and_receive",
        "set_run",
    }


def test_the_simulation_takes_the_arguments_that_the_engine_gives_it() -> None:
    given = {
        "num_supernodes",
        "exit_event",
        "client_app",
        "server_app",
        "backend_name",
        "backend_config",
        "server_app_context",
        "run",
        "app_dir",
        "is_app",
    }
    assert given <= set(inspect.signature(_run_simulation).parameters)
    assert EventType.PYTHON_API_RUN_SIMULATION_LEAVE


def test_a_run_configuration_holds_texts() -> None:
    config: UserConfig = {"plan": "{}"}
    assert Context(1, 2, {"partition-id": 0}, RecordDict(), config).run_config == {"plan": "{}"}
