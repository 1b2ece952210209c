"""A coordinator and sites that enrol with it, on a clock that tests set: real folders, vaults, journals and papers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedtune.errors import EnrolmentError
from fedtune.pki.authority import Authority
from fedtune.pki.invitations import LIFE
from fedtune_client import enrolment as joining
from fedtune_client import operator
from fedtune_client.folder import OpenSite, SiteFolder, begin
from fedtune_client.vault import Key
from fedtune_server.enrolment import Enrolment

FEDERATION = "hospitals-00112233aabbccdd"
ADDRESS = "localhost:8443"
HOSTS = ("localhost", "127.0.0.1")
START = datetime(2026, 11, 22, 12, tzinfo=UTC)
KEY = Key(bytes(range(32)))


@dataclass(slots=True)
class Now:
    """The clock of everybody in a test."""

    time: datetime = START

    def __call__(self) -> datetime:
        return self.time

    def later(self, **span: float) -> None:
        self.time += timedelta(**span)


@dataclass(slots=True)
class Coordinator:
    """A coordinator with its authority unlocked."""

    folder: Path
    now: Now = field(default_factory=Now)
    federation: str = FEDERATION
    hosts: Iterable[str] = HOSTS
    key: Ed25519PrivateKey = field(default_factory=Ed25519PrivateKey.generate)
    authority: Authority = field(init=False)
    enrolment: Enrolment = field(init=False)

    def __post_init__(self) -> None:
        self.authority = Authority.create(self.federation, self.hosts, self.now())
        self.enrolment = Enrolment.found(self.folder, self.federation, self.key, self.now)

    def invite(self, name: str, life: timedelta = LIFE) -> bytes:
        return self.enrolment.invite(name, ADDRESS, self.authority.certificate, life)

    def approve(self, request: bytes) -> bytes:
        return self.enrolment.approve(request, self.authority)

    def restarted(self) -> Enrolment:
        """What another process finds."""
        return Enrolment.open(self.folder, self.key, self.now)


@dataclass(slots=True)
class Site:
    """A site in a folder of its own."""

    open: OpenSite
    now: Now

    @classmethod
    def make(cls, folder: Path, name: str, now: Now) -> Site:
        return cls(begin(SiteFolder(folder), name, KEY, now), now)

    def answer(self, invitation: bytes) -> bytes:
        return joining.answer(self.open, invitation, self.now())

    def accept(self, grant: bytes, federation: str = FEDERATION) -> None:
        joining.accept(self.open, grant, federation, self.now())

    def renew(self, *, new_node: bool = False) -> bytes:
        return joining.renew(self.open, FEDERATION, self.now(), new_node=new_node)

    def rotate(self) -> str:
        return operator.rotate_key(self.open)

    @property
    def credentials(self) -> joining.Credentials:
        return joining.credentials(self.open.vault, FEDERATION)


def enrol(coordinator: Coordinator, site: Site) -> None:
    """Let a site join by the whole exchange."""
    site.accept(coordinator.approve(site.answer(coordinator.invite(site.open.facts.name))))


MakeSite = Callable[..., Site]


def refusal(act: Callable[[], object]) -> str:
    """Return the code with which an act is refused, with a hint."""
    with pytest.raises(EnrolmentError) as refused:
        act()
    assert refused.value.hint
    return refused.value.code.removeprefix("enrolment.")
