"""An authority of this moment: TLS asks the machine's clock."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from fedtune.pki.authority import Authority
from fedtune.pki.keys import new_tls_key
from tests.support.enrolments import FEDERATION, HOSTS
from tests.support.handshakes import Pair, client_context, handshake, server_context


@dataclass(frozen=True, slots=True)
class Lab:
    """An authority, and a listener of its coordinator that clients try."""

    folder: Path
    authority: Authority
    now: datetime

    def site(
        self, name: str = "hospital-a", *, authority: Authority | None = None, ago: timedelta = timedelta()
    ) -> Pair:
        key = new_tls_key()
        return (authority or self.authority).certify_site(name, key.public_key(), self.now - ago), key

    def coordinator(self, *hosts: str, ago: timedelta = timedelta()) -> Pair:
        key = new_tls_key()
        return self.authority.certify_coordinator(hosts or HOSTS, key.public_key(), self.now - ago), key

    def connect(self, client: Pair | None, server: Pair | None = None, host: str = "localhost") -> bytes:
        """Return the client's certificate as the listener sees it, or raise `ssl.SSLError`."""
        listener = server_context(self.folder, server or self.coordinator(), self.authority.certificate)
        return handshake(listener, client_context(self.folder, client, self.authority.certificate), host)


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    now = datetime.now(UTC)
    return Lab(tmp_path, Authority.create(FEDERATION, HOSTS, now - timedelta(days=1000)), now)
