"""The coordinator's side of Flower's control API: runs are started, listed and stopped, nodes registered and removed.

Talks to the private listener of the SuperLink on this machine (`fedtune.flower.link`). Knows no plan's content and no
site's name: a run is known by its bundle's hash, a node by its key.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self, TypeVar

import httpx
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from flwr.common.serde import fab_to_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    UnregisterNodeRequest,
)
from flwr.proto.node_pb2 import NodeInfo
from flwr.proto.run_pb2 import Run
from flwr.supercore.control.control_http_client import ControlHttpClient
from flwr.supercore.error import ApiErrorCode, FlowerError
from flwr.supercore.fab import Fab
from flwr.supercore.primitives.asymmetric import bytes_to_public_key, public_key_to_bytes

from fedtune.errors import TransportError
from fedtune.flower.bundle import Bundle
from fedtune.flower.local_gate import LocalToken
from fedtune.flower.peer import key_digest

_NOT_RUNNING = "start the coordinator: fedtune server up"
_KNOWN: dict[int, str] = {
    ApiErrorCode.PUBLIC_KEY_ALREADY_IN_USE: "node-exists",
    ApiErrorCode.PUBLIC_KEY_NOT_VALID: "bad-key",
    ApiErrorCode.NODE_NOT_FOUND: "no-node",
    ApiErrorCode.RUN_ID_NOT_FOUND: "no-run",
    ApiErrorCode.RUN_ALREADY_FINISHED: "run-finished",
}
Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class RunFacts:
    """A run of Flower's: `status` pending, starting, running or finished; `outcome` completed, failed or stopped."""

    number: int
    bundle_sha256: str
    status: str
    outcome: str
    details: str
    submitted_at: str
    finished_at: str


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """A registered node: `status` registered, online, offline or unregistered; `key` as `key_digest` has it."""

    number: int
    name: str
    status: str
    key: str


class Control:
    """Speaks with the SuperLink of this machine on its private port.

    Errors of every method: `transport.not-running`, `transport.wrong-secret`, and what Flower refuses:
    `transport.node-exists`, `.bad-key`, `.no-node`, `.no-run`, `.run-finished`, otherwise `transport.refused`.
    """

    def __init__(self, port: int, secret: bytes) -> None:
        self._client = ControlHttpClient.from_server_address(
            server_address=f"127.0.0.1:{port}",
            insecure=True,
            root_certificates=None,
            interceptors=[LocalToken(secret)],
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _at: TracebackType | None
    ) -> None:
        self._client.close()

    def start(self, bundle: Bundle) -> int:
        """Start a run of a bundle and return its number."""
        fab = fab_to_proto(Fab(bundle.sha256, bundle.content, {}))
        return _asked(lambda: self._client.StartRun(StartRunRequest(fab=fab))).run_id

    def stop(self, run: int) -> bool:
        """Stop a run that has not finished."""
        return _asked(lambda: self._client.StopRun(StopRunRequest(run_id=run))).success

    def runs(self, limit: int = 100) -> tuple[RunFacts, ...]:
        """Return the newest runs, newest first."""
        found = _asked(lambda: self._client.ListRuns(ListRunsRequest(limit=limit))).run_dict
        return tuple(sorted(map(_run_facts, found.values()), key=lambda run: run.submitted_at, reverse=True))

    def run(self, number: int) -> RunFacts:
        """Return one run."""
        return _run_facts(_asked(lambda: self._client.ListRuns(ListRunsRequest(run_id=number))).run_dict[number])

    def register(self, public_key: EllipticCurvePublicKey, name: str) -> int:
        """Let the holder of a key connect as a node; return the node's number."""
        request = RegisterNodeRequest(public_key=public_key_to_bytes(public_key), name=name)
        return _asked(lambda: self._client.RegisterNode(request)).node_id

    def unregister(self, node: int) -> None:
        """Remove a node; its key can be registered again."""
        _asked(lambda: self._client.UnregisterNode(UnregisterNodeRequest(node_id=node)))

    def nodes(self) -> tuple[NodeFacts, ...]:
        """Return the nodes, without those that were removed."""
        found = _asked(lambda: self._client.ListNodes(ListNodesRequest())).nodes_info
        return tuple(_node_facts(node) for node in found if node.status != "unregistered")


def _run_facts(run: Run) -> RunFacts:
    status = run.status
    return RunFacts(
        run.run_id, run.fab_hash, status.status, status.sub_status, status.details, run.pending_at, run.finished_at
    )


def _node_facts(node: NodeInfo) -> NodeFacts:
    return NodeFacts(node.node_id, node.name, node.status, key_digest(bytes_to_public_key(node.public_key)))


def _asked(ask: Callable[[], Answer]) -> Answer:
    try:
        return ask()
    except httpx.HTTPStatusError as error:
        raise _refusal(error.response) from error
    except (httpx.HTTPError, ValueError) as error:
        raise TransportError(
            "not-running", f"no SuperLink answers: {type(error).__name__}", hint=_NOT_RUNNING
        ) from error


def _refusal(response: httpx.Response) -> TransportError:
    if response.status_code == httpx.codes.UNAUTHORIZED:
        return TransportError("wrong-secret", "the SuperLink has another secret", hint="use its state folder's secret")
    error = FlowerError.from_json(response.text)
    slug = _KNOWN.get(error.code, "refused") if error is not None else "refused"
    told = error.message if error is not None else f"status {response.status_code}"
    return TransportError(slug, f"the SuperLink refuses: {told}", hint="fedtune server status")
