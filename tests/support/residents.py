"""A real site that has joined a federation, and its coordinator's end of it: every message goes in its envelope."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedtune.config.machine import ENVIRONMENT_VARIABLE as MACHINE
from fedtune.config.plan import PLAN_KEY
from fedtune.envelopes.endpoint import Endpoint
from fedtune.envelopes.envelope import COORDINATOR
from fedtune.envelopes.nonces import MemoryNonces
from fedtune.envelopes.peers import Peers
from fedtune.flower.grid import InProcessGrid
from fedtune.flower.messages import Instruction, Refusal, Update, decode_update, encode_instruction
from fedtune.flower.sealed import open_answer, seal_requests
from fedtune_client import channel
from fedtune_client.app import app
from fedtune_client.folder import ENVIRONMENT_VARIABLE as SITE
from fedtune_client.vault.unlock import KEY_VARIABLE
from tests.support.enrolments import Coordinator, Now, Site, enrol
from tests.support.sites import NAME, SERVICE_KEY, RealSite, Study, make_site, make_study

if TYPE_CHECKING:
    from pathlib import Path

    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from flwr.app import Message, RecordDict


@dataclass(frozen=True, slots=True)
class Resident:
    """A site with its coordinator; `end` is the coordinator's memory of what it has asked."""

    site: RealSite
    coordinator: Coordinator
    end: Endpoint

    @classmethod
    def of(cls, site: RealSite, coordinator: Coordinator) -> Resident:
        """Begin the coordinator's end."""
        return cls(site, coordinator, end_of(coordinator))

    @property
    def study(self) -> Study:
        return self.site.study

    def joined(self) -> Site:
        """The site as its operator's commands open it."""
        return Site(self.site.open(), self.coordinator.now)

    def instruction(self, number: int = 1) -> RecordDict:
        return encode_instruction(Instruction(self.study.plan.sha256, number, self.study.download))

    def seal(self, number: int = 1, kind: str = "train", **changes: Any) -> RecordDict:
        """Return an instruction in the coordinator's envelope; `changes`: the study it names, the site, the end."""
        where = (changes.get("study", self.study.plan.sha256), number, kind.rpartition(".")[2])
        site = changes.get("site", "mercy")
        content = changes.get("content") or self.instruction(number)
        return seal_requests(changes.get("end", self.end), where, {site: content}, 600.0)[site]

    def send(self, content: RecordDict, kind: str = "train") -> Message:
        """Send a message as it is, and return the reply as it is."""
        with self.environment():
            grid = InProcessGrid(app, 1, {PLAN_KEY: self.study.plan.json_text})
            message = grid.create_message(content, kind, grid.get_node_ids()[0], "1", 600.0)
            (reply,) = grid.send_and_receive([message])
        return reply

    def ask(self, number: int = 1, kind: str = "train") -> RecordDict:
        """Ask as a coordinator does, and return what the site has signed."""
        reply = self.send(self.seal(number, kind), kind)
        assert not reply.has_error(), reply.error
        return open_answer(self.end, reply.content, "mercy", self.study.plan.sha256).content

    def train(self, number: int = 1) -> Update | Refusal:
        return decode_update(self.ask(number), self.study.plan.sha256)

    def refused(self, content: RecordDict, kind: str = "train") -> str:
        """Send a message that is not taken, and return the code of the unsigned error."""
        reply = self.send(content, kind)
        assert reply.has_error()
        return str(reply.error.reason)

    def restart(self) -> Resident:
        """Forget what this process knows of the site, as a new process does."""
        self.site.restart()
        channel._memory.cache_clear()
        return self

    def as_coordinator(self, key: Ed25519PrivateKey | None = None, federation: str = "") -> Endpoint:
        """Return an end with another key, or of another federation, and a memory of its own."""
        return end_of(self.coordinator, key, federation)

    @contextmanager
    def environment(self) -> Iterator[None]:
        """Name the folder and its key, as the executor does."""
        before = dict(os.environ)
        os.environ.update({SITE: str(self.site.path), KEY_VARIABLE: SERVICE_KEY})
        os.environ.pop(MACHINE, None)
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(before)


def make_resident(folder: Path, **policy: Any) -> Resident:
    """Make a site with data, policy, grant and base model, and let it join a federation."""
    study = make_study(folder)
    coordinator = Coordinator(folder / "coordinator", Now())
    site = make_site(folder / "site", study, **policy)
    point_at_all(site)
    enrol(coordinator, Site(site.open(), coordinator.now))
    channel.begin_memory(site.folder)
    return Resident.of(site.restart(), coordinator)


def end_of(coordinator: Coordinator, key: Ed25519PrivateKey | None = None, federation: str = "") -> Endpoint:
    """Return a coordinator's end of its streams."""
    peers = Peers(coordinator.enrolment.known)
    own = federation or coordinator.federation
    return Endpoint(COORDINATOR, own, key or coordinator.key, peers, MemoryNonces(lambda: 0))


def point_at_all(site: RealSite, **models: str) -> None:
    """Say in `site.yaml` where data and base model are."""
    folders = models or {"encoder": site.study.bench.machine.model_folder}
    lines = [f"  {name}: {folder}\n" for name, folder in folders.items()]
    data = f"data:\n  {NAME}:\n    path: {site.data}\n"
    (site.path / "site.yaml").write_text(f"name: mercy\n{data}models:\n{''.join(lines)}device: cpu\nthreads: 1\n")
