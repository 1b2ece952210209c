"""What the transport relies on in Flower 1.41 and uvicorn 0.49 beyond their documented surface: a failure says what."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Error, Message, RecordDict
from flwr.common.constant import ISOLATION_MODE_PROCESS, SUPERLINK_NODE_ID, TIMESTAMP_HEADER, TRANSPORT_TYPE_GRPC_RERE
from flwr.proto import control_pb2, fleet_pb2, node_pb2, run_pb2, runtime_pb2
from flwr.supercore.auth import superexec
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER, TaskType
from flwr.supercore.control.control_http_client import ControlHttpClient
from flwr.supercore.error import ApiErrorCode, FlowerError
from flwr.supercore.exit import add_exit_handler
from flwr.supercore.fab import Fab
from flwr.supercore.interceptors import RuntimeTokenHttpInterceptor, SuperExecAuthHttpInterceptor
from flwr.supercore.interceptors.http.utils import add_headers
from flwr.supercore.logger import FLOWER_LOGGER
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.primitives.asymmetric import (
    bytes_to_public_key,
    public_key_to_bytes,
    sign_message,
    verify_signature,
)
from flwr.supercore.protobuf.client import ProtobufClient, ProtobufRequestContext
from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES
from flwr.supercore.retry import RetryInvoker, exponential
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.auth_plugin import NoOpControlAuthnPlugin
from flwr.superlink.cli.flower_superlink import SuperLinkLifespan
from flwr.superlink.config_loader import SuperLinkLifespanConfig, load_control_authn_plugin
from flwr.superlink.routers.fleet.node_auth import authenticate_node
from flwr.supernode import fleet_http_connection, start_client_internal
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.main import create_app as create_supernode_app
from flwr.supernode.nodestate import NodeStateFactory
from flwr.supernode.nodestate.in_memory_nodestate import InMemoryNodeState, MessageEntry
from uvicorn.protocols.http.h11_impl import H11Protocol

from fedtune.flower.fleet_gate import FLEET_PATHS
from fedtune.flower.link import LinkSettings, flower_config
from tests.support.flower_symbols import TRANSFER, TRANSPORT


def source(thing: Any) -> str:
    return inspect.getsource(thing)


def names_used_as_globals(function: Callable[..., Any]) -> set[str]:
    return {node.id for node in ast.walk(ast.parse(inspect.cleandoc(source(function)))) if isinstance(node, ast.Name)}


@pytest.mark.parametrize("symbol", sorted(TRANSPORT | TRANSFER))
def test_every_symbol_is_there(symbol: str) -> None:
    module, _, name = symbol.rpartition(".")
    assert hasattr(importlib.import_module(module), name) or importlib.import_module(symbol)


# The public listener -------------------------------------------------------------------------------------------------


def test_the_gates_paths_are_flowers_fleet_without_those_that_make_and_remove_nodes() -> None:
    served = {path.encode() for method, path in PROTOBUF_REQUEST_TYPES if path.startswith("/v1/fleet/")}
    assert {method for method, path in PROTOBUF_REQUEST_TYPES if path.startswith("/v1/fleet/")} == {"POST"}
    assert served - FLEET_PATHS == {b"/v1/fleet/register-node", b"/v1/fleet/unregister-node"}
    assert served > FLEET_PATHS


def test_a_supernode_with_a_key_neither_makes_nor_removes_its_node() -> None:
    text = source(fleet_http_connection.http_request_response)
    assert "self_registered = authentication_keys is None" in text
    assert text.count("if self_registered:") == 2


def test_a_supernode_signs_its_timestamp_and_nothing_else_which_is_why_the_gate_remembers() -> None:
    assert (FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER, TIMESTAMP_HEADER) == (
        "flwr-public-key",
        "flwr-signature",
        "flwr-timestamp",
    )
    assert 'timestamp.encode("ascii"), signature' in source(authenticate_node)


def test_keys_travel_as_pem_and_signatures_are_ecdsa() -> None:
    key = ec.generate_private_key(ec.SECP384R1())
    pem = public_key_to_bytes(key.public_key())
    assert pem.startswith(b"-----BEGIN PUBLIC KEY-----")
    assert verify_signature(bytes_to_public_key(pem), b"now", sign_message(key, b"now"))
    assert not verify_signature(bytes_to_public_key(pem), b"then", sign_message(key, b"now"))


def test_what_a_supernode_does_with_the_gates_statuses() -> None:
    from flwr.supercore.retry.http_retry import make_simple_http_retry_invoker

    text = source(make_simple_http_retry_invoker)
    assert "raise RunNotRunningException" in text  # 403 would be taken for a stopped run, so the gate says 401
    assert "httpx.codes.UNAUTHORIZED" in text  # 401 ends the process, whose supervisor says why
    assert "httpx.codes.SERVICE_UNAVAILABLE" in inspect.getsource(inspect.getmodule(make_simple_http_retry_invoker))  # type: ignore[arg-type]


def test_uvicorns_protocol_has_what_the_guard_extends() -> None:
    text = source(H11Protocol)
    for used in ("self.connections.add(self)", "self.app_state.copy()", "on_response=self.on_response_complete"):
        assert used in text
    assert list(inspect.signature(H11Protocol.__init__).parameters) == [
        "self",
        "config",
        "server_state",
        "app_state",
        "_loop",
    ]
    assert "response_complete" in source(H11Protocol.connection_lost)


def test_uvicorn_gives_an_app_no_certificate_which_is_why_the_guard_does() -> None:
    assert "peercert" not in source(H11Protocol)


def test_uvicorn_makes_its_sockets_through_the_loop_and_its_signals_through_one_method() -> None:
    assert "await loop.create_server(" in source(uvicorn.Server.startup)
    assert "with self.capture_signals():" in source(uvicorn.Server.serve)
    assert "self.ssl_context_factory(self, default_factory)" in source(uvicorn.Config.load)


# The SuperLink -------------------------------------------------------------------------------------------------------


def test_flowers_configuration_takes_the_fields_that_the_link_gives(tmp_path: Path) -> None:
    files = dict.fromkeys(("state", "certificate", "key", "client_authority", "secret", "ready"), tmp_path)
    config = flower_config(LinkSettings(**files), bytes(32))
    assert {field.name for field in dataclasses.fields(SuperLinkLifespanConfig)} == set(vars(config))
    assert (config.enable_supernode_auth, config.isolation, config.simulation) == (True, ISOLATION_MODE_PROCESS, False)
    assert (config.runtime_dependency_install, config.health_server_address) == (False, None)
    assert config.fleet_api_type == TRANSPORT_TYPE_GRPC_RERE


def test_in_process_isolation_flower_starts_nothing_by_itself() -> None:
    assert "if config.isolation != ISOLATION_MODE_SUBPROCESS:\n            return" in source(
        SuperLinkLifespan._start_superexec_if_needed
    )
    text = source(SuperLinkLifespan.startup)
    assert "FLWR_INTERNAL_GRPC_CONTROL_API" in text  # these variables are dropped by fedtune.flower.environment
    assert "FLWR_INTERNAL_GRPC_FLEET_API" in text


def test_the_control_api_asks_nobody_who_they_are_which_is_why_the_local_gate_does() -> None:
    assert isinstance(load_control_authn_plugin(), NoOpControlAuthnPlugin)


def test_the_runtime_api_asks_only_for_a_claim_for_the_secret() -> None:
    router = importlib.import_module("flwr.supercore.routers.runtime.router")
    assert source(router).count("SuperExecAuthDependency(") == 1
    assert "hmac" in source(superexec)


def test_the_control_client_has_what_submission_asks() -> None:
    for name in ("StartRun", "StopRun", "ListRuns", "RegisterNode", "UnregisterNode", "ListNodes"):
        assert hasattr(ControlHttpClient, name)
    run = run_pb2.Run(run_id=1, fab_hash="h", pending_at="p", finished_at="f")
    assert (run.status.status, run.status.sub_status, run.status.details) == ("", "", "")
    node = node_pb2.NodeInfo(node_id=1, name="n", status="s", public_key=b"k")
    assert (node.node_id, node.name, node.status, node.public_key) == (1, "n", "s", b"k")
    assert control_pb2.ListRunsRequest(limit=3, run_id=4).run_id == 4
    assert control_pb2.RegisterNodeRequest(public_key=b"k", name="n").name == "n"
    assert control_pb2.StartRunRequest().federation == ""
    assert control_pb2.StopRunRequest(run_id=1).run_id == control_pb2.UnregisterNodeRequest(node_id=1).node_id
    assert control_pb2.ListNodesRequest() is not None


def test_flowers_refusals_are_json_with_a_number() -> None:
    error = FlowerError.from_json(json.dumps(FlowerError(ApiErrorCode.NODE_NOT_FOUND, "text").to_json("public")))
    assert error is not None
    assert error.code == ApiErrorCode.NODE_NOT_FOUND
    assert FlowerError.from_json("<html>") is None


def test_a_fab_is_a_hash_and_bytes() -> None:
    assert dataclasses.astuple(Fab("h", b"c", {})) == ("h", b"c", {})


# The SuperNode -------------------------------------------------------------------------------------------------------


def test_the_supernode_looks_up_what_the_node_puts_in_place_of_its_own() -> None:
    assert "FleetHttpClient" in names_used_as_globals(fleet_http_connection.http_request_response)
    assert "get_fused_config_from_fab" in names_used_as_globals(start_client_internal._pull_and_store_message)
    assert "_pull_and_store_message" in names_used_as_globals(start_client_internal.start_client_internal)
    assert "if run_id is None:" in source(start_client_internal.start_client_internal)
    calls = {
        node.attr
        for node in ast.walk(ast.parse(source(start_client_internal)))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "time"
    }
    assert calls == {"sleep"}


def test_flowers_fleet_client_is_made_by_the_class_method_that_the_node_overrides() -> None:
    assert "FleetHttpClient.from_server_address(" in source(fleet_http_connection.http_request_response)
    assert list(inspect.signature(FleetHttpClient.from_server_address).parameters) == [
        "server_address",
        "insecure",
        "root_certificates",
        "interceptors",
        "retry_invoker",
    ]
    client = FleetHttpClient("http://127.0.0.1:1", verify=False)
    assert isinstance(client._client, httpx.Client)
    client.close()
    assert fleet_pb2.ActivateNodeResponse(node_id=5).node_id == fleet_pb2.DeactivateNodeRequest(node_id=5).node_id
    assert fleet_pb2.ActivateNodeRequest(public_key=b"k").public_key == b"k"


def test_the_supernode_takes_the_arguments_that_the_node_gives_it() -> None:
    given = {
        "state_factory",
        "server_address",
        "node_config",
        "root_certificates",
        "insecure",
        "authentication_keys",
        "isolation",
        "runtime_api_address",
        "superexec_auth_secret",
        "runtime_dependency_install",
    }
    assert given <= set(inspect.signature(start_client_internal.start_client_internal).parameters)
    assert {"state_factory", "superexec_auth_secret"} == set(inspect.signature(create_supernode_app).parameters)
    assert callable(add_exit_handler)


def test_a_supernode_waits_for_an_answer_without_end_which_is_why_the_node_has_a_state_of_its_own() -> None:
    text = source(start_client_internal._push_messages)
    assert "while not (reply_messages := state.get_messages_legacy(is_reply=True)):" in text
    assert "entry.is_retrieved" in source(InMemoryNodeState._store_error_replies)
    assert "self._on_task_tokens_expired(expired_tasks)" in source(
        InMemoryNodeState._cleanup_expired_task_tokens_locked
    )
    assert [field.name for field in dataclasses.fields(MessageEntry)] == ["message", "is_retrieved"]
    assert "self.state_instance" in source(NodeStateFactory.state)
    assert ObjectStoreFactory().store() is not None


# The executor --------------------------------------------------------------------------------------------------------


def test_the_task_types_are_those_that_the_executor_claims_to_refuse() -> None:
    assert {TaskType.CLIENT_APP, TaskType.SERVER_APP, TaskType.AGENT_APP} < set(TaskType)
    assert runtime_pb2.AcquireTaskRequest(supported_task_types=list(TaskType)).supported_task_types


def test_flowers_clients_take_interceptors_that_see_and_change_a_request() -> None:
    seen: list[str] = []

    class Interceptor:
        def intercept(
            self, context: ProtobufRequestContext, call_next: Callable[..., httpx.Response]
        ) -> httpx.Response:
            add_headers(context.request, {"x": "1"})
            seen.append(context.rpc_method)
            return httpx.Response(503, request=context.request)

    client = RuntimeHttpClient.from_server_address("127.0.0.1:1", True, None, [Interceptor()], retry_invoker=None)
    with pytest.raises(httpx.HTTPStatusError):
        client.SendTaskHeartbeat(runtime_pb2.SendTaskHeartbeatRequest())
    assert seen == ["/flwr.proto.Runtime/SendTaskHeartbeat"]
    assert issubclass(RuntimeHttpClient, ProtobufClient)
    assert RuntimeTokenHttpInterceptor("t")
    assert SuperExecAuthHttpInterceptor(master_secret=b"s", protected_methods={"/flwr.proto.Runtime/AcquireTask"})


def test_the_retry_ends_at_its_time_and_at_a_refusal() -> None:
    calls: list[int] = []

    def fail() -> None:
        calls.append(1)
        raise httpx.ConnectError("x")

    waits: dict[str, Any] = {"wait_gen_factory": lambda: exponential(0.01, 2, 1), "max_tries": None, "max_time": 0.05}
    with pytest.raises(httpx.ConnectError):
        RetryInvoker(recoverable_exceptions=httpx.ConnectError, **waits).invoke(fail)
    assert len(calls) > 1
    calls.clear()
    with pytest.raises(httpx.ConnectError):
        RetryInvoker(recoverable_exceptions=httpx.ConnectError, should_giveup=lambda _: True, **waits).invoke(fail)
    assert len(calls) == 1


def test_a_message_whose_time_is_over_can_still_be_answered() -> None:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 7, SUPERLINK_NODE_ID
    message = Message(RecordDict(), 5, "train", ttl=0.01)
    time.sleep(0.02)
    assert Message(Error(6, "message.expired"), reply_to=message).error.reason == "message.expired"


def test_flowers_logger_has_a_handler_of_its_own_that_the_processes_take_away() -> None:
    assert FLOWER_LOGGER.name == "flwr"
