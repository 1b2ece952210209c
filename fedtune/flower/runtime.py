"""Connections to Flower's runtime API on this machine: of a SuperNode for a site, of the SuperLink for the coordinator.

Flower's own clients end their process when a token is refused, and wait for ever when nothing answers; these raise, and
wait as long as they are told. Knows no app and no message.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import httpx
from flwr.proto.runtime_pb2 import AcquireTaskRequest, SendTaskHeartbeatRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.interceptors import RuntimeTokenHttpInterceptor, SuperExecAuthHttpInterceptor
from flwr.supercore.protobuf.client import ProtobufClientInterceptor
from flwr.supercore.retry import RetryInvoker, exponential
from flwr.supercore.runtime import RuntimeHttpClient

from fedtune.errors import TransportError
from fedtune.flower.local_gate import LocalToken

ACQUIRE = "/flwr.proto.Runtime/AcquireTask"
_BEAT = 10.0  # seconds; Flower takes a task away after 60 without one
_LONGEST_WAIT = 10
logger = logging.getLogger("fedtune.executor")


@dataclass(frozen=True, slots=True)
class Claim:
    """A task that this process has claimed; its token opens the task's input and output and nothing else."""

    kind: str
    token: str


class Runtime:
    """One runtime API; `patience` is how many seconds a call waits for a process that is being started again."""

    def __init__(self, port: int, secret: bytes, patience: float) -> None:
        self._port, self._secret, self._patience = port, secret, patience
        self._claims = self._connected(
            SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods={ACQUIRE}), patience=0.0
        )

    @property
    def address(self) -> str:
        """Host and port."""
        return f"127.0.0.1:{self._port}"

    def claim(self) -> Claim | None:
        """Claim the oldest task of any kind, so that one that will be refused is refused at once.

        Errors: `transport.not-running`, `transport.wrong-secret`.
        """
        try:
            answer = self._claims.AcquireTask(AcquireTaskRequest(supported_task_types=list(TaskType)))
        except httpx.HTTPStatusError as error:
            if error.response.status_code == httpx.codes.UNAUTHORIZED:
                hint = "give the executor the secret file of the process that it serves"
                raise TransportError("wrong-secret", f"{self.address} has another secret", hint=hint) from error
            raise _not_running(self.address, error) from error
        except (httpx.HTTPError, ValueError) as error:
            raise _not_running(self.address, error) from error
        return Claim(answer.task.type, answer.token) if answer.HasField("task") and answer.token else None

    def close(self) -> None:
        """Close the connection that claims tasks."""
        self._claims.close()

    @contextmanager
    def task(self, claim: Claim) -> Iterator[RuntimeHttpClient]:
        """Open a claimed task's connection; it says every few seconds that it is alive."""
        with (
            self._connected(RuntimeTokenHttpInterceptor(claim.token), patience=self._patience) as client,
            self._connected(RuntimeTokenHttpInterceptor(claim.token), patience=0.0) as pulse,
            _beating(pulse),
        ):
            yield client

    def _connected(self, *interceptors: ProtobufClientInterceptor, patience: float) -> RuntimeHttpClient:
        return RuntimeHttpClient.from_server_address(
            server_address=self.address,
            insecure=True,
            root_certificates=None,
            interceptors=[LocalToken(self._secret), *interceptors],
            retry_invoker=patient(patience) if patience else None,
        )


def patient(seconds: float) -> RetryInvoker:
    """Return how Flower's clients repeat a call: for so long, while nothing answers, and never after a refusal."""
    return RetryInvoker(
        wait_gen_factory=lambda: exponential(base_delay=0.5, max_delay=_LONGEST_WAIT),
        recoverable_exceptions=(httpx.TransportError, httpx.HTTPStatusError),
        max_tries=None,
        max_time=seconds,
        should_giveup=_is_refusal,
    )


def _is_refusal(error: Exception) -> bool:
    if not isinstance(error, httpx.HTTPStatusError):
        return False
    return error.response.status_code not in {
        httpx.codes.BAD_GATEWAY,
        httpx.codes.SERVICE_UNAVAILABLE,
        httpx.codes.GATEWAY_TIMEOUT,
    }


@contextmanager
def _beating(client: RuntimeHttpClient) -> Iterator[None]:
    """Send heartbeats from a thread; a lost task is only noted, and ends when its output is refused."""
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(_BEAT):
            try:
                if not client.SendTaskHeartbeat(SendTaskHeartbeatRequest()).success:
                    logger.warning("the task has been taken away")
            except (httpx.HTTPError, ValueError) as error:
                logger.warning("a heartbeat did not arrive: %s", type(error).__name__)

    thread = threading.Thread(target=beat, name="task-heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(_LONGEST_WAIT)


def _not_running(address: str, error: Exception) -> TransportError:
    hint = "it is started by fedtune client up or fedtune server up"
    return TransportError("not-running", f"nothing answers at {address}: {type(error).__name__}", hint=hint)
