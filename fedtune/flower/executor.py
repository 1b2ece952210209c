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
from flwr.app.message import remove_content_from_message
from flwr.app.user_config import UserConfig
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode, SubStatus
from flwr.common.serde import context_from_proto, fab_from_proto, message_to_proto, run_from_proto
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import (
    PullAppMessagesRequest,
    PullTaskInputRequest,
    PullTaskInputResponse,
    PushAppMessagesRequest,
    PushTaskOutputRequest,
)
from flwr.serverapp import ServerApp
from flwr.supercore.constant import TaskType
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_pull_object_fn_protobuf,
    make_push_object_fn_protobuf,
)
from flwr.supercore.run import Run
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity

from fedtune.config.plan import PLAN_KEY
from fedtune.errors import BundleError, FedtuneError, TransportError
from fedtune.flower.bundle import read
from fedtune.flower.local_gate import read_secret
from fedtune.flower.remote_grid import RemoteGrid
from fedtune.flower.runtime import Claim, Runtime
from fedtune.flower.transfer import Parcels, receive

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
        reply, context, stopped = _replied(_pull(client, claim), app)
        status = SubStatus.FAILED if reply.has_error() else SubStatus.COMPLETED
        _push(client, reply, context)
        client.PushTaskOutput(PushTaskOutputRequest(sub_status=status, details=""))
        if stopped is not None:
            raise stopped


def _replied(given: _Given, app: ClientApp) -> tuple[Message, Context, SystemExit | None]:
    """Return a site's answer; what was asked is dropped with this function, before the answer is sent."""
    try:
        return given.reply(app), given.context, None
    except SystemExit as error:
        return _error(given.message, ErrorCode.CLIENT_APP_CRASHED, "site.stopped"), given.context, error
    except _Refused as error:
        return _error(given.message, ErrorCode.MOD_FAILED_PRECONDITION, error.code), given.context, None
    except Exception as error:
        logger.debug("the app raised", exc_info=True)
        code = _code(error, "site.internal")
        return _error(given.message, ErrorCode.CLIENT_APP_RAISED_EXCEPTION, code), given.context, None


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


def _pull(client: RuntimeHttpClient, claim: Claim) -> _Given:
    """Fetch a task's message, and say so, after which the SuperNode keeps nothing of it."""
    given, announced = _task_input(client), client.PullMessages(PullAppMessagesRequest())
    if not announced.messages_list:
        raise TransportError("lost-task", "the task has no message", hint="its SuperNode was started again")
    tree, run, node = announced.message_object_trees[0], given.run.run_id, Node(node_id=given.context.node_id)
    message = receive(tree, make_pull_object_fn_protobuf(client.PullObject, node, run))
    taken = ConfirmMessageReceivedRequest(node=node, run_id=run, message_object_id=tree.object_id)
    client.ConfirmMessageReceived(taken)
    context, fab = context_from_proto(given.context), fab_from_proto(given.fab)
    return _Given(claim, message, context, run_from_proto(given.run), fab)


def _push(client: RuntimeHttpClient, reply: Message, context: Context) -> None:
    """Hand an answer to the SuperNode."""
    parcels = Parcels()
    tree = parcels.add(reply)
    bare = message_to_proto(remove_content_from_message(reply))
    answer = client.PushMessages(PushAppMessagesRequest(messages_list=[bare], message_object_trees=[tree]))
    node = Node(node_id=context.node_id)
    push = make_push_object_fn_protobuf(client.PushObject, node, context.run_id, answer.session_id)
    parcels.send(set(answer.objects_to_push), push)


def _task_input(client: RuntimeHttpClient) -> PullTaskInputResponse:
    """Fetch a task's input; messages that this process makes from now on belong to its run."""
    given = client.PullTaskInput(PullTaskInputRequest())
    TaskIdentity.task_id, TaskIdentity.run_id = given.task_id, given.run.run_id
    TaskIdentity.node_id = given.context.node_id
    return given


def _error(message: Message, number: int, code: str) -> Message:
    logger.warning("answered with %s", code)
    return Message(Error(number, code), reply_to=message)


def _conduct(runtime: Runtime, claim: Claim, app: ServerApp) -> None:
    """Run one study at the coordinator; its end is told to the SuperLink as a code."""
    with runtime.task(claim) as client:
        status, code = SubStatus.FAILED, "coordinator.stopped"
        try:
            _require_kind(claim, TaskType.SERVER_APP)
            _conduct_run(client, app)
            status, code = SubStatus.COMPLETED, ""
        except Exception as error:
            code = _code(error, "coordinator.internal")
            logger.warning("a run ended with %s", code)
            logger.debug("its cause", exc_info=True)
        finally:
            client.PushTaskOutput(PushTaskOutputRequest(sub_status=status, details=code))


def _conduct_run(client: RuntimeHttpClient, app: ServerApp) -> None:
    given = _task_input(client)
    context, run = context_from_proto(given.context), run_from_proto(given.run)
    context.run_config = _config(run, fab_from_proto(given.fab))
    context.state = RecordDict()
    app(RemoteGrid(client, run), context)


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
