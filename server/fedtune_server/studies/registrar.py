"""Keeps Flower's registered nodes the same as the enrolled sites' node keys: who is enrolled may connect, nobody else.

The log of the enrolment decides. A renewed site may still run with the key of the grant before, which stands until the
renewal after; a revoked site's keys are removed. Knows no study.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from fedtune.errors import FedtuneError
from fedtune.flower.peer import key_digest
from fedtune.pki.keys import read_node_key

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

    from fedtune.flower.submission import NodeFacts
    from fedtune_server.enrolment import Enrolment
    from fedtune_server.enrolment_state import Member

logger = logging.getLogger("fedtune.registrar")
_EVERY = 60.0  # seconds until nodes are compared again although nothing has changed here
_SETTLED = {"transport.node-exists", "transport.no-node"}
NodeKeys = Mapping[str, tuple[str, "EllipticCurvePublicKey"]]


class Nodes(Protocol):
    """What is used of `fedtune.flower.submission.Control`."""

    def nodes(self) -> tuple[NodeFacts, ...]:
        """Return the registered nodes."""

    def register(self, public_key: EllipticCurvePublicKey, name: str) -> int:
        """Let a key's holder connect."""

    def unregister(self, node: int) -> None:
        """Remove a node."""


class Registrar:
    """One per coordinator; `tick` costs one look at a file while nothing changes."""

    def __init__(self, enrolment: Enrolment, steady: Callable[[], float] = time.monotonic) -> None:
        self._enrolment, self._steady = enrolment, steady
        self._log = enrolment.folder / "enrolment.log"
        self._seen: tuple[int, int, int] | None = None
        self._until = 0.0

    def tick(self, control: Nodes) -> None:
        """Register and remove what differs. Errors: those of `Control`, and `enrolment.damaged`."""
        seen = _stamp(self._log)
        if seen == self._seen and self._steady() < self._until:
            return
        wanted = node_keys(self._enrolment.members)
        found = {node.key: node for node in control.nodes()}
        for key in wanted.keys() - found.keys():
            site, public_key = wanted[key]
            if _done(partial(control.register, public_key, site)):
                logger.info("%s may connect", site)
        for key in found.keys() - wanted.keys():
            node = found[key]
            if _done(partial(control.unregister, node.number)):
                logger.info("%s may no longer connect with the key %s…", node.name, key[:12])
        self._seen, self._until = seen, self._steady() + _EVERY

    def look_again(self) -> None:
        """Forget that nothing was to be done: the SuperLink is another one now, and its state may be older."""
        self._seen = None


def node_keys(members: Collection[Member]) -> NodeKeys:
    """Return the node keys of all grants in standing by their digests, each with its site's name."""
    texts = [(member.site, grant.node_key) for member in members if member.revoked is None for grant in member.grants]
    read = [(site, read_node_key(text)) for site, text in dict.fromkeys(texts)]
    return {key_digest(key): (site, key) for site, key in read}


def _done(act: Callable[[], object]) -> bool:
    """Act, and return whether it was still to be done."""
    try:
        act()
    except FedtuneError as error:
        if error.code not in _SETTLED:
            raise
        return False
    return True


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        facts = path.stat()
    except OSError:
        return None
    return facts.st_mtime_ns, facts.st_size, facts.st_ino
