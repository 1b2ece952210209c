"""Runs one installed app on the tasks of a runtime API, in one process that stays: a base model is loaded once.

    site:        SuperNode → task → `ClientApp` → reply
    coordinator: SuperLink → task → `ServerApp`, which speaks with the sites over a grid

What a coordinator sends is data. The app is an object that the caller has imported; the bundle is read for the plan in
it and never unpacked, and the plan is all that the app's run configuration holds. Refused, with a code and no text:
tasks of other kinds, a bundle that is not exactly a plan's, overridden configuration, and messages whose time is over.
Whatever an app raises leaves the process as a code.

When the process that it serves dies, the executor goes on asking until there is one again. Knows no study.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import httpx
from flwr.app import Context, Error, Message, RecordDict
from flwr.app.user_config import UserConfig
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode, SubStatus
from flwr.common.serde import context_from_proto, fab_from_proto, run_from_proto
from flwr.proto.runtime_pb2 import PullTaskInputRequest, PushTaskOutputRequest
from flwr.serverapp import ServerApp
from flwr.supercore.constant import TaskType
from flwr.supercore.fab import Fab
from flwr.supercore.run import Run
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import HttpGrid
from flwr.supernode.runtime.run_clientapp import pull_task_input, push_message

from fedtune.config.plan import PLAN_KEY
from fedtune.errors import BundleError, FedtuneError, TransportError
from fedtune.flower.bundle import read
from fedtune.flower.local_gate import read_secret
from fedtune.flower.runtime import Claim, Runtime

logger = logging.getLogger("fedtune.executor")


@dataclass(frozen=True, slots=True)
class ExecutorSettings:
    """Which runtime API an executor serves; times in seconds.

    `patience` is how long a call within a task waits for an answer. It is just below the 60 seconds after which a
    SuperLink that comes back takes a run away from an executor that it has not heard of. A SuperNode that comes back
    has forgotten its tasks and says so at once.
    """

    port: int
    secret: Path
    poll: float = 0.2
    patience: float = 50.0
    longest_pause: float = 10.0


def serve_site(settings: ExecutorSettings, app: ClientApp, going: Callable[[], bool] = lambda: True) -> None:
    """Answer a SuperNode's messages with an app, while `going`.

    Ends with SystemExit where a signal handler raises it, also in the middle of a task: the site then answers
    `site.stopped`. Error: `transport.wrong-secret`.
    """
    _serve(settings, lambda runtime, claim: _answer(runtime, claim, app), going)


def serve_coordinator(settings: ExecutorSettings, app: ServerApp, going: Callable[[], bool] = lambda: True) -> None:
    """Run a SuperLink's runs with an app, one after another, while `going`; otherwise as `serve_site`."""
    _serve(settings, lambda runtime, claim: _conduct(runtime, claim, app), going)


def _serve(settings: ExecutorSettings, act: Callable[[Runtime, Claim], None], going: Callable[[], bool]) -> None:
    runtime = Runtime(settings.port, read_secret(settings.secret), settings.patience)
    pause = settings.poll
    try:
        while going():
            claim = None
            try:
                claim = runtime.claim()
                pause = settings.poll
            except TransportError as error:
                if error.code != "transport.not-running":
                    raise
                pause = min(pause * 2, settings.longest_pause)
                logger.info("waiting for %s", runtime.address)
            if claim is None:
                time.sleep(pause)
            else:
                _survive(partial(act, runtime, claim))
    finally:
        runtime.close()


def _survive(act: Callable[[], None]) -> None:
    """Go on after a task whose input or output was lost with the process that gave it."""
    try:
        act()
    except Exception as error:
        logger.warning("a task was lost: %s", _code(error, "transport.lost-task"))
        logger.debug("its cause", exc_info=True)


def _answer(runtime: Runtime, claim: Claim, app: ClientApp) -> None:
    """Answer one message at a site.

    A SuperNode waits for ever for the answer to a task that has ended without one. A task whose message cannot be read
    or whose answer cannot be handed over is therefore left to run out, after which the SuperNode answers by itself.
    """
    with runtime.task(claim) as client:
        given = _Given(claim, *pull_task_input(client))
        stopped = None
        try:
            reply = given.reply(app)
        except SystemExit as error:
            stopped = error
            reply = _error(given.message, ErrorCode.CLIENT_APP_CRASHED, "site.stopped")
        except _Refused as error:
            reply = _error(given.message, ErrorCode.MOD_FAILED_PRECONDITION, error.code)
        except Exception as error:
            logger.debug("the app raised", exc_info=True)
            reply = _error(given.message, ErrorCode.CLIENT_APP_RAISED_EXCEPTION, _code(error, "site.internal"))
        status = SubStatus.FAILED if reply.has_error() else SubStatus.COMPLETED
        push_message(client, reply, given.context)
        client.PushTaskOutput(PushTaskOutputRequest(sub_status=status, details=""))
        if stopped is not None:
            raise stopped


@dataclass(frozen=True, slots=True)
class _Given:
    """What a SuperNode hands over for one task."""

    claim: Claim
    message: Message
    context: Context
    run: Run
    fab: Fab

    def reply(self, app: ClientApp) -> Message:
        """Return the app's answer, after everything that a site refuses by itself."""
        _require_kind(self.claim, TaskType.CLIENT_APP)
        self.context.run_config = _config(self.run, self.fab)
        self.context.state = RecordDict()
        _require_time(self.message)
        return app(self.message, self.context)


def _error(message: Message, number: int, code: str) -> Message:
    logger.warning("answered with %s", code)
    return Message(Error(number, code), reply_to=message)


def _conduct(runtime: Runtime, claim: Claim, app: ServerApp) -> None:
    """Run one study at the coordinator; its end is told to the SuperLink as a code."""
    with runtime.task(claim) as client:
        status, code = SubStatus.FAILED, "coordinator.stopped"
        try:
            _require_kind(claim, TaskType.SERVER_APP)
            _conduct_run(runtime, client, app)
            status, code = SubStatus.COMPLETED, ""
        except Exception as error:
            code = _code(error, "coordinator.internal")
            logger.warning("a run ended with %s", code)
            logger.debug("its cause", exc_info=True)
        finally:
            client.PushTaskOutput(PushTaskOutputRequest(sub_status=status, details=code))


def _conduct_run(runtime: Runtime, client: RuntimeHttpClient, app: ServerApp) -> None:
    given = client.PullTaskInput(PullTaskInputRequest())
    context, run, fab = context_from_proto(given.context), run_from_proto(given.run), fab_from_proto(given.fab)
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = given.task_id, run.run_id, context.node_id
    context.run_config = _config(run, fab)
    context.state = RecordDict()
    grid = _Grid(runtime.address, client)
    grid.set_run(run)
    app(grid, context)


class _Grid(HttpGrid):
    """Flower's grid on the task's own connection: it carries the machine's token and raises when a run is stopped."""

    def __init__(self, address: str, client: RuntimeHttpClient) -> None:
        super().__init__(address, insecure=True, token="unused")  # noqa: S106 - the connection has the task's token
        self._client = client

    def close(self) -> None:
        """Leave the connection to its owner."""


class _Refused(Exception):  # noqa: N818 - control flow inside this module
    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code


def _require_kind(claim: Claim, kind: TaskType) -> None:
    if claim.kind != kind:
        raise _Refused("transport.other-task")


def _config(run: Run, fab: Fab) -> UserConfig:
    """Return the run configuration: the plan of a bundle that is exactly a plan's, and nothing that a run adds."""
    try:
        bundle = read(fab.content)
    except BundleError as error:
        raise _Refused(error.code) from error
    if not bundle.sha256 == fab.hash_str == run.fab_hash:
        raise _Refused("bundle.other-hash")
    if run.override_config:
        raise _Refused("bundle.overridden")
    return {PLAN_KEY: bundle.plan}


def _require_time(message: Message) -> None:
    if time.time() > message.metadata.created_at + message.metadata.ttl:
        raise _Refused("message.expired")


def _code(error: Exception, otherwise: str) -> str:
    if isinstance(error, (FedtuneError, _Refused)):
        return error.code
    if isinstance(error, httpx.HTTPStatusError) and error.response.status_code == httpx.codes.UNAUTHORIZED:
        return "transport.task-taken"
    return otherwise
