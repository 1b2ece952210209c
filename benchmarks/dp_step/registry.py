"""The peers by name, in the order of the tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from benchmarks.dp_step.functorch_peer import Functorch
from benchmarks.dp_step.measure import attempt
from benchmarks.dp_step.models import Subject
from benchmarks.dp_step.opacus_peers import Ghost, Hooks
from benchmarks.dp_step.peers import NotPrivate, Peer, PlainPeft, Private, Terms

PEERS: dict[str, Callable[[Subject, Terms], Peer]] = {
    "peft": PlainPeft,
    "fedtune": Private,
    "fedtune_nonprivate": NotPrivate,
    "opacus_hooks": Hooks,
    "opacus_ghost": Ghost,
    "functorch": Functorch,
}


def opened(subject: Subject, terms: Terms, names: Sequence[str]) -> dict[str, Peer | str]:
    """Return the named peers, each on a twin of the model; a peer that refuses the model is its error as text."""
    twins = [(name, subject.twin()) for name in names]  # before any peer changes the model that is copied
    return {name: attempt(partial(PEERS[name], twin, terms)) for name, twin in twins}
