"""The site's executor against Flower's own runtime API, in this process: no coordinator is needed for that."""

from __future__ import annotations

import hashlib
import io
import logging
import threading
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.app.user_config import UserConfig
from flwr.clientapp import ClientApp
from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL, SUPERLINK_NODE_ID
from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.fab import Fab
from flwr.supercore.run import Run
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.start_client_internal import _insert_message

from fedtune.errors import DataError, TransportError
from fedtune.flower.bundle import build
from fedtune.flower.executor import ExecutorSettings, serve_site
from fedtune.flower.local_gate import LocalToken, make_secret, read_secret
from fedtune.flower.node import runtime_server
from fedtune.flower.node_state import AnsweringStates
from fedtune.flower.runtime import Claim, Runtime
from tests.support.federation import wait_for

CANARY = "patient 4711"
NODE, RUN = 77, 5


@dataclass
class SuperNode:
    """Flower's runtime API and its state, without a coordinator."""

    port: int
    secret: Path
    state: Any
    server: uvicorn.Server
    thread: threading.Thread

    def give(
        self,
        content: bytes | None = None,
        *,
        kind: str = TaskType.CLIENT_APP,
        ttl: float = 60.0,
        overrides: UserConfig | None = None,
        lie: bool = False,
    ) -> None:
        """Hand over one message of a run, as a SuperNode does when it has pulled one."""
        content = build("{}").content if content is None else content
        digest = hashlib.sha256(content).hexdigest()
        run = Run.create_empty(run_id=RUN)
        run.fab_hash, run.override_config, run.series_id = digest, overrides or {}, RUN
        self.state.store_run(run)
        self.state.store_fab(Fab(digest, content, {}))
        if lie:
            self.state.fab_store[digest].content = build("another plan").content
        config: UserConfig = {"plan": "something else"}
        self.state.set_run_series_context(RUN, Context(RUN, NODE, {}, RecordDict(), config, RUN))
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, RUN, SUPERLINK_NODE_ID
        message = Message(RecordDict({"c": ConfigRecord({"x": 1})}), NODE, "train", ttl=ttl)
        _insert_message(message, self.state, self.state.object_store)
        assert self.state.create_task(task_type=kind, run_id=RUN, fab_hash=digest)

    def answer(self) -> Message:
        """Return the next reply as a SuperNode would send it."""
        (found,) = wait_for(lambda: self.state.get_messages_legacy(is_reply=True), 10)
        assert isinstance(found, Message)
        return found

    def close(self) -> None:
        self.server.should_exit = True
        self.thread.join(5)


def start_supernode(folder: Path, port: int = 0) -> SuperNode:
    make_secret(folder / "secret")
    states = AnsweringStates()
    states.state().set_node_id(NODE)
    server = runtime_server(states, read_secret(folder / "secret"))
    server.config.port = port
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_for(lambda: server.started, 5)
    found: int = server.servers[0].sockets[0].getsockname()[1]
    return SuperNode(found, folder / "secret", states.state(), server, thread)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SuperNode]:
    node = start_supernode(tmp_path_factory.mktemp("node"))
    yield node
    node.close()


@pytest.fixture
def node(running: SuperNode) -> SuperNode:
    running.state.delete_messages()
    running.state.task_store.clear()
    running.state.fab_store.clear()
    return running


Serve = Callable[[SuperNode, Callable[[Message, Context], Message]], None]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Return a function that serves a node with one train function until the test ends."""
    ended, threads = threading.Event(), list[threading.Thread]()

    def start(node: SuperNode, train: Callable[[Message, Context], Message]) -> None:
        app = ClientApp()
        app.train()(train)
        settings = ExecutorSettings(node.port, node.secret, poll=0.02, patience=1.0, longest_pause=0.2)
        threads.append(threading.Thread(target=serve_site, args=(settings, app, lambda: not ended.is_set())))
        threads[-1].start()

    yield start
    ended.set()
    for thread in threads:
        thread.join(10)


def forbidden(message: Message, context: Context) -> Message:
    raise AssertionError("the app must not run")


def code(message: Message) -> tuple[int, str]:
    return message.error.code, message.error.reason


def test_the_app_gets_the_plan_of_the_bundle_and_nothing_else(node: SuperNode, serve: Serve) -> None:
    configs: list[UserConfig] = []

    def train(message: Message, context: Context) -> Message:
        configs.append(context.run_config)
        return Message(RecordDict({"x": ArrayRecord()}), reply_to=message)

    serve(node, train)
    node.give(build('{"name":"münchen"}').content)
    assert not node.answer().has_error()
    assert configs == [{"plan": '{"name":"münchen"}'}]


def test_nothing_of_a_message_stays_for_the_next(node: SuperNode, serve: Serve) -> None:
    kept: list[int] = []

    def train(message: Message, context: Context) -> Message:
        kept.append(len(context.state))
        context.state["canary"] = ConfigRecord({"x": 1})
        return Message(RecordDict(), reply_to=message)

    serve(node, train)
    for _ in range(2):
        node.give()
        node.answer()
    assert kept == [0, 0]


def with_code() -> bytes:
    buffer = io.BytesIO(build("{}").content)
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.writestr("fedtune/__init__.py", "raise SystemExit")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"content": with_code()}, "bundle.other-files"),
        ({"content": b"no archive"}, "bundle.not-an-archive"),
        ({"lie": True}, "bundle.other-hash"),
        ({"overrides": {"plan": "another"}}, "bundle.overridden"),
        ({"kind": TaskType.AGENT_APP}, "transport.other-task"),
        ({"ttl": -1.0}, "message.expired"),
    ],
)
def test_what_a_site_refuses_by_itself_is_answered_with_a_code(
    node: SuperNode, serve: Serve, given: dict[str, Any], expected: str
) -> None:
    serve(node, forbidden)
    node.give(**given)
    assert code(node.answer()) == (6, expected)


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (DataError("missing-column", CANARY), (2, "data.missing-column")),
        (ValueError(CANARY), (2, "site.internal")),
        (MemoryError(CANARY), (2, "site.internal")),
        (RecursionError(CANARY), (2, "site.internal")),
    ],
)
def test_what_an_app_raises_leaves_the_site_as_a_code(
    node: SuperNode, serve: Serve, raised: Exception, expected: tuple[int, str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)

    def train(message: Message, context: Context) -> Message:
        raise raised

    serve(node, train)
    node.give()
    answer = node.answer()
    assert code(answer) == expected
    assert CANARY not in caplog.text


def test_after_a_failure_the_next_task_is_served(node: SuperNode, serve: Serve) -> None:
    calls: list[int] = []

    def train(message: Message, context: Context) -> Message:
        calls.append(1)
        if len(calls) == 1:
            raise ValueError(CANARY)
        return Message(RecordDict(), reply_to=message)

    serve(node, train)
    for failed in (True, False):
        node.give()
        assert node.answer().has_error() is failed


def test_a_process_that_is_told_to_stop_still_answers(node: SuperNode) -> None:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        raise SystemExit  # what a handler of SIGTERM raises, wherever the app is

    node.give()
    with pytest.raises(SystemExit):
        serve_site(ExecutorSettings(node.port, node.secret, poll=0.02, patience=1.0), app)
    assert code(node.answer()) == (8, "site.stopped")


def test_an_executor_outlives_its_supernode(tmp_path: Path, serve: Serve) -> None:
    first = start_supernode(tmp_path)
    entered, released = threading.Event(), threading.Event()

    def train(message: Message, context: Context) -> Message:
        entered.set()
        released.wait(5)
        return Message(RecordDict(), reply_to=message)

    serve(first, train)
    first.give()
    assert entered.wait(5)
    first.close()
    released.set()  # the answer finds nobody
    second = start_supernode(tmp_path, first.port)
    second.give()
    assert not second.answer().has_error()
    second.close()


def runtime_client(node: SuperNode, *interceptors: Any) -> RuntimeHttpClient:
    return RuntimeHttpClient.from_server_address(f"127.0.0.1:{node.port}", True, None, interceptors)


def test_a_task_is_not_given_to_a_local_process_without_the_secret(node: SuperNode) -> None:
    node.give()
    request = AcquireTaskRequest(supported_task_types=list(TaskType))
    local = LocalToken(read_secret(node.secret))
    wrong = LocalToken(bytes(32))
    for interceptors in ([], [wrong], [local]):  # the last one lacks Flower's own HMAC
        with runtime_client(node, *interceptors) as client, pytest.raises(httpx.HTTPStatusError) as error:
            client.AcquireTask(request)
        assert error.value.response.status_code == 401
    assert Runtime(node.port, read_secret(node.secret), 0.0).claim() is not None  # the control


def test_an_executor_with_another_secret_ends_and_says_so(node: SuperNode, tmp_path: Path) -> None:
    make_secret(tmp_path / "other")
    with pytest.raises(TransportError) as error:
        serve_site(ExecutorSettings(node.port, tmp_path / "other"), ClientApp())
    assert error.value.code == "transport.wrong-secret"


def claimed(node: SuperNode) -> tuple[Runtime, Claim]:
    runtime = Runtime(node.port, read_secret(node.secret), 0.0)
    claim = runtime.claim()
    assert claim is not None
    return runtime, claim


@pytest.mark.parametrize("fetched", [False, True])
def test_the_site_answers_for_an_executor_that_was_killed_at_any_moment(node: SuperNode, fetched: bool) -> None:
    node.give()
    runtime, claim = claimed(node)
    with runtime.task(claim) as client:
        from flwr.proto.runtime_pb2 import PullAppMessagesRequest, PullTaskInputRequest

        client.PullTaskInput(PullTaskInputRequest())
        if fetched:
            client.PullMessages(PullAppMessagesRequest())
    for record in node.state.task_token_store.values():  # two minutes later
        record.active_until -= type(record.active_until - record.active_until)(seconds=4 * HEARTBEAT_DEFAULT_INTERVAL)
    assert node.answer().error.code == 8


def test_a_long_task_is_kept_alive(node: SuperNode, monkeypatch: pytest.MonkeyPatch) -> None:
    from flwr.proto.runtime_pb2 import PullTaskInputRequest

    monkeypatch.setattr("fedtune.flower.runtime._BEAT", 0.02)
    node.give()
    runtime, claim = claimed(node)
    with runtime.task(claim) as client:
        client.PullTaskInput(PullTaskInputRequest())
        (record,) = node.state.task_token_store.values()
        before = record.active_until
        wait_for(lambda: record.active_until > before, 5)


def test_a_secret_that_others_can_read_is_not_used(node: SuperNode, tmp_path: Path) -> None:
    make_secret(tmp_path / "open")
    assert (tmp_path / "open").stat().st_mode & 0o777 == 0o600
    (tmp_path / "open").chmod(0o640)
    with pytest.raises(TransportError) as error:
        read_secret(tmp_path / "open")
    assert error.value.code == "transport.open-secret"


def test_a_secret_is_never_written_over(tmp_path: Path) -> None:
    make_secret(tmp_path / "secret")
    before = read_secret(tmp_path / "secret")
    make_secret(tmp_path / "secret")
    assert read_secret(tmp_path / "secret") == before
