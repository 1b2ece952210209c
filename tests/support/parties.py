"""A coordinator and sites that write to each other in envelopes, with clocks and memories that a test can turn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedtune.envelopes.endpoint import Endpoint
from fedtune.envelopes.envelope import COORDINATOR, Direction, Header
from fedtune.envelopes.nonces import Change, MemoryNonces, Nonces, Role
from fedtune.envelopes.peers import Known, PeerKey, Peers
from fedtune.envelopes.streams import Stream
from fedtune.errors import EnvelopeError
from fedtune.journal.chain import public_hex

FEDERATION = "banks"
STUDY, OTHER_STUDY = "a" * 64, "b" * 64
BODY = "c" * 64
NOON = 1_800_000_000_000  # milliseconds since 1970


def new_key() -> Ed25519PrivateKey:
    return Ed25519PrivateKey.generate()


@dataclass
class Forgetful:
    """A memory that keeps nothing of what it receives: the control for what numbers are for."""

    began: int = 0
    sent: MemoryNonces = field(default_factory=lambda: MemoryNonces(lambda: 0))

    def read(self, role: Role, stream: Stream) -> bytes | None:
        return self.sent.read(role, stream) if role == "sender" else None

    def swap(self, changes: Sequence[Change]) -> bool:
        return all(change.role == "receiver" for change in changes) or self.sent.swap(changes)


@dataclass
class Federation:
    """Parties by name, each with a key and a memory; `known` is what all are told of keys, `now` their one clock."""

    now: int = NOON
    keys: dict[str, Ed25519PrivateKey] = field(default_factory=dict)
    known: Known = field(default_factory=dict)
    memories: dict[str, Nonces] = field(default_factory=dict)

    def join(self, name: str, memory: Nonces | None = None) -> Endpoint:
        """Return the end of a party, new or come back."""
        if name not in self.keys:
            self.keys[name] = new_key()
            self.known = {**self.known, name: (PeerKey(public_hex(self.keys[name])),)}
        memory = memory or self.memories.get(name) or MemoryNonces(lambda: self.now)
        self.memories[name] = memory
        return Endpoint(name, FEDERATION, self.keys[name], Peers(lambda: self.known), memory, clock=lambda: self.now)

    def header(self, sender: str = COORDINATOR, direction: Direction = "request", **changes: object) -> Header:
        """Return the header of a good message between the coordinator and bank-1."""
        fields = {
            "federation": FEDERATION,
            "study": STUDY,
            "round": 1,
            "sender": sender,
            "receiver": "bank-1" if sender == COORDINATOR else COORDINATOR,
            "sequence": self.now,
            "direction": direction,
            "kind": "train",
            "issued": self.now,
            "expires": self.now + 60_000,
            "reply_to": "",
            "body": BODY,
            "key": public_hex(self.keys[sender]),
        }
        return Header(**{**fields, **changes})  # type: ignore[arg-type]


def code_of(action: Callable[[], object]) -> str:
    """Return the code with which an action is refused, or "" when it is not."""
    try:
        action()
    except EnvelopeError as error:
        return error.code
    return ""


def refused(action: Callable[[], object]) -> str:
    """Return the code with which an action is refused; one that is not fails the test."""
    with pytest.raises(EnvelopeError) as caught:
        action()
    assert caught.value.hint, caught.value.code
    return caught.value.code
