"""A coordinator and three banks that send each other sealed messages, and ways to take messages apart."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, RecordDict

from fedtune.envelopes.endpoint import Endpoint
from fedtune.envelopes.envelope import Envelope
from fedtune.flower.body import body_digest
from fedtune.flower.messages import Instruction, Update, decode_instruction, encode_instruction, encode_reply
from fedtune.flower.sealed import ENVELOPE, Opened, open_answer, open_request, seal_answer, seal_requests
from fedtune.journal.witness import Head
from tests.support.journals import MemoryJournal
from tests.support.parties import COORDINATOR, STUDY, Federation

SITES = ("bank-1", "bank-2", "bank-3")
JOURNALS = {name: MemoryJournal.create(name) for name in SITES}


def instruction(study: str, number: int, value: float = 1.0) -> RecordDict:
    return encode_instruction(Instruction(study, number, {"w": np.full(3, value, np.float32)}))


def update(study: str, site: str, number: int, value: float = 1.0) -> RecordDict:
    state = {"w": np.full(3, value, np.float32)}
    return encode_reply(Update(study, site, number, state, (), Head.of(JOURNALS[site])))  # type: ignore[arg-type]


def ask(
    end: Endpoint, study: str = STUDY, number: int = 1, kind: str = "train", sites: tuple[str, ...] = SITES
) -> dict[str, RecordDict]:
    """Seal one instruction a site."""
    contents = {site: instruction(study, number, at) for at, site in enumerate(sites)}
    return seal_requests(end, (study, number, kind), contents, 600.0)


def same(one: RecordDict, other: RecordDict) -> bool:
    return body_digest(one) == body_digest(other)


def envelope(content: RecordDict) -> Envelope:
    record: Any = content[ENVELOPE]
    return Envelope(record["header"], record["signature"])


def with_envelope(content: RecordDict, other: Envelope) -> RecordDict:
    return RecordDict({**content, ENVELOPE: ConfigRecord({"header": other.raw, "signature": other.signature})})


def with_body(content: RecordDict, other: RecordDict) -> RecordDict:
    return RecordDict({**{name: r for name, r in other.items() if name != ENVELOPE}, ENVELOPE: content[ENVELOPE]})


@dataclass
class World(Federation):
    """The coordinator, three sites, and what each has acted on."""

    acts: list[tuple[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.ends = {name: self.join(name) for name in (COORDINATOR, *SITES)}

    @property
    def coordinator(self) -> Endpoint:
        return self.ends[COORDINATOR]

    def open(self, site: str, content: RecordDict, study: str = STUDY, kind: str = "train") -> Opened:
        """Let a site take a request, and act on it unless it acted before."""
        opened = open_request(self.ends[site], content, COORDINATOR, study, kind)
        decode_instruction(opened.content, study)
        if not opened.taken.again:
            self.acts.append((site, opened.taken.digest))
        return opened

    def serve(self, site: str, content: RecordDict, study: str = STUDY, kind: str = "train") -> RecordDict:
        """Let a site take a request and answer it."""
        opened = self.open(site, content, study, kind)
        return seal_answer(self.ends[site], opened, update(study, site, opened.header.round))

    def take(self, site: str, content: RecordDict, study: str = STUDY) -> Opened:
        """Let the coordinator take a site's answer."""
        return open_answer(self.coordinator, content, site, study)

    def restart(self, name: str) -> None:
        """Let a party come back with its memory."""
        self.ends[name] = self.join(name)
