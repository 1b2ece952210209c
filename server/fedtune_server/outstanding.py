"""Who still owes an answer to one question: a state machine of nodes and message ids, without clock and without I/O.

A node is asked, and then answers, is lost (its process or the way to it is gone), is asked again once it is back, or is
given up. Times are seconds of any one clock. Knows no content.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

_PAUSE = 1.0  # seconds before a lost node is asked again


@dataclass(slots=True)
class _Lost:
    """A node that cannot be reached: since when, why, and when it was lost last."""

    since: float
    code: str
    last: float


@dataclass(slots=True)
class Outstanding:
    """The nodes of one question; `reconnect` is how many seconds a lost one is waited for, 0 for not at all.

    A node that is lost again after it was asked again has been lost since the first time, so that one that dies of the
    question itself cannot hold up the others for longer.
    """

    reconnect: float
    _asked: dict[str, int] = field(default_factory=dict)
    _lost: dict[int, _Lost] = field(default_factory=dict)

    @property
    def messages(self) -> Mapping[str, int]:
        """The node of each message that is on its way."""
        return self._asked

    @property
    def nodes(self) -> list[int]:
        """Every node that still owes an answer."""
        waiting = set(self._asked.values())
        return [*self._asked.values(), *(node for node in self._lost if node not in waiting)]

    def __bool__(self) -> bool:
        """Whether anybody owes an answer."""
        return bool(self.nodes)

    def asked(self, messages: Iterable[tuple[str, int]]) -> None:
        """Note messages that were sent."""
        self._asked.update(messages)

    def answered(self, message: str) -> int | None:
        """Take a message from the list; return its node, or None for one that nobody waits for."""
        return self._asked.pop(message, None)

    def done(self, node: int) -> None:
        """Note that a node has given its answer."""
        self._lost.pop(node, None)

    def lost(self, node: int, code: str, now: float) -> bool:
        """Note that a node was not reached; return whether it is waited for."""
        known = self._lost.get(node)
        since = now if known is None else known.since
        if now - since >= self.reconnect:
            self._lost.pop(node, None)
            return False
        self._lost[node] = _Lost(since, code, now)
        return True

    def due(self, now: float) -> list[int]:
        """Return the lost nodes that may be asked again, each at most once in a second, if they can be reached."""
        waiting = set(self._asked.values())
        found = [n for n, lost in self._lost.items() if n not in waiting and now - lost.last >= _PAUSE]
        for node in found:
            self._lost[node].last = now
        return found

    def given_up(self, now: float) -> list[tuple[int, str]]:
        """Take the nodes that were lost for too long from the list, with the code of why they were."""
        waiting = set(self._asked.values())
        over = [
            (node, lost.code)
            for node, lost in self._lost.items()
            if node not in waiting and now - lost.since >= self.reconnect
        ]
        for node, _ in over:
            del self._lost[node]
        return over
