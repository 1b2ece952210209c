"""The sites of one study as they are enrolled now, and the envelopes in which they are spoken to.

A node is known by the key that its site was granted; its own word for who it is counts for nothing. In a simulation
there is no fleet: nodes are parts of one process, and say their names. Knows no round and no reply.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping

from flwr.app import RecordDict

from fedtune.envelopes.endpoint import Endpoint
from fedtune.flower.sealed import open_answer, seal_requests

_FRESH_SECONDS = 1.0


class Fleet:
    """The sites that a study names; `load` returns the sites of all registered nodes, asked once a second at most.

    A site that was revoked, or that nobody has registered yet, is in no answer.
    """

    def __init__(
        self, endpoint: Endpoint, study: str, sites: Collection[str], load: Callable[[], Mapping[int, str]]
    ) -> None:
        self._endpoint, self._study, self._load = endpoint, study, load
        self.sites = tuple(sorted(sites))
        self._known: dict[int, str] = {}
        self._until = 0.0

    def nodes(self) -> dict[int, str]:
        """Return the study's sites by node."""
        if time.monotonic() >= self._until:
            found = self._load()
            peers = self._endpoint.peers
            self._known = {node: site for node, site in found.items() if site in self.sites and peers.is_active(site)}
            self._until = time.monotonic() + _FRESH_SECONDS
        return dict(self._known)

    def seal(self, kind: str, number: int, contents: Mapping[int, RecordDict], life: float) -> dict[int, RecordDict]:
        """Return the contents in envelopes to the sites of these nodes, without those that are no site's any more."""
        known = self.nodes()
        to = {known[node]: (node, content) for node, content in contents.items() if node in known}
        where = (self._study, number, kind.rpartition(".")[2])
        sealed = seal_requests(self._endpoint, where, {site: content for site, (_, content) in to.items()}, life)
        return {to[site][0]: content for site, content in sealed.items()}

    def open(self, node: int, content: RecordDict) -> RecordDict:
        """Return what a node's site has signed as its answer to the newest request, or refuse it: `envelope.*`."""
        site = self.nodes().get(node, "")
        return open_answer(self._endpoint, content, site, self._study).content
