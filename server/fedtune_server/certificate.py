"""The coordinator's own certificates: until when they are good, for which hosts, and how they are made anew.

Two run out: the certificate that the TLS server shows (a year), and the authority's (ten years). A renewed authority
has the same key, so what it signed before stays good; sites take its newer certificate with their next grant. Until
then a site goes by the name constraints of the older one, and refuses a certificate that names even one host outside
them (RFC 5280, 4.2.1.10). So a new host is certified when every site has an authority that permits it (`agreed`).
Unlocking the authority is the caller's. Knows no site and no settings.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from cryptography import x509

from fedtune.pki.authority import COORDINATOR_FILE, Authority, Secret, read_authority
from fedtune.pki.certificates import is_due
from fedtune.pki.files import read_private
from fedtune.pki.names import host


@dataclass(frozen=True, slots=True)
class Standing:
    """The two certificates as they are on disk; `coordinator` is None where there is none that can be read."""

    coordinator: x509.Certificate | None
    authority: x509.Certificate

    @property
    def certified(self) -> tuple[str, ...]:
        """The hosts that the coordinator's certificate names."""
        return () if self.coordinator is None else _named(self.coordinator)

    @property
    def hosts(self) -> tuple[str, ...]:
        """The hosts that it names or may come to name."""
        return tuple(dict.fromkeys([*self.certified, *_permitted(self.authority)]))

    def coordinator_due(self, hosts: Iterable[str], now: datetime) -> str:
        """Say why a new certificate is needed, nothing where none is."""
        if self.coordinator is None:
            return "there is none that can be read"
        if is_due(self.coordinator, now):
            return f"it is good until {self.coordinator.not_valid_after_utc:%Y-%m-%d}"
        return _lacking(set(hosts) - set(self.certified), "it does not name")

    def authority_due(self, hosts: Iterable[str], now: datetime) -> str:
        """Say why the authority needs a new certificate, nothing where it needs none."""
        if is_due(self.authority, now):
            return f"it is good until {self.authority.not_valid_after_utc:%Y-%m-%d}"
        permitted = _permitted(self.authority)
        return _lacking({name for name in hosts if not _covers(permitted, name)}, "it may not certify")


def read_standing(folder: Path) -> Standing:
    """Read the certificates of an authority's folder. Errors: `enrolment.missing`, `enrolment.damaged`."""
    return Standing(_coordinator(folder / COORDINATOR_FILE), read_authority(folder))


def agreed(hosts: Iterable[str], trusted: Collection[x509.Certificate]) -> tuple[str, ...]:
    """Return the hosts that all these certificates of the authority permit."""
    permitted = [_permitted(certificate) for certificate in trusted]
    return tuple(name for name in hosts if all(_covers(names, name) for names in permitted))


def renew_authority(folder: Path, secret: Secret, hosts: Iterable[str], now: datetime) -> Authority:
    """Unlock the authority, and give it a new certificate if it is due or must permit more hosts.

    A kill leaves the old one or the new one. Errors: those of `Authority.load`, `enrolment.bad-host`, of writing.
    """
    authority, wanted = Authority.load(folder, secret), tuple(hosts)
    if Standing(None, authority.certificate).authority_due(wanted, now):
        permitted = dict.fromkeys([*_permitted(authority.certificate), *wanted])
        authority = authority.renewed(permitted, now)
        authority.save(folder, secret)
    return authority


def _coordinator(path: Path) -> x509.Certificate | None:
    try:
        return x509.load_pem_x509_certificate(read_private(path) or b"")
    except ValueError:
        return None


def _named(certificate: x509.Certificate) -> tuple[str, ...]:
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return tuple(str(name.value) for name in names)


def _permitted(authority: x509.Certificate) -> tuple[str, ...]:
    """Return the hosts that an authority may certify a coordinator for; a name stands for those below it."""
    subtrees = authority.extensions.get_extension_for_class(x509.NameConstraints).value.permitted_subtrees or ()
    hosts = [name.value for name in subtrees if isinstance(name, x509.DNSName | x509.IPAddress)]
    return tuple(str(value).partition("/")[0] for value in hosts)  # an address stands there as a network of one


def _covers(permitted: tuple[str, ...], name: str) -> bool:
    if isinstance(host(name), str):
        return any(f".{name}".endswith(f".{known}") for known in permitted)
    return str(host(name)) in permitted


def _lacking(hosts: set[str], what: str) -> str:
    return f"{what} {', '.join(sorted(hosts))}" if hosts else ""
