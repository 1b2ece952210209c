"""Who is at the other end of a TLS connection, and whether that certificate is still welcome.

A certificate was checked against the federation's authority when the connection was made. What changes afterwards is
asked at every request: the certificate may have been revoked, or have run out on a connection that is hours old. Knows
no HTTP and no Flower.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from fedtune.errors import TransportError

_MAX_FILE = 4_000_000
_KEY_DIGITS = 64
_IDENTIFIER = re.compile(r"[0-9a-f]{1,64}")


@dataclass(frozen=True, slots=True)
class Peer:
    """A client certificate: its serial number, the SHA-256 of its key (as `key_digest`), its end in Unix time.

    `name` is its first URI among the subject's alternative names, or empty.
    """

    name: str
    serial: str
    key: str
    expires: float

    @classmethod
    def from_der(cls, der: bytes) -> Peer:
        """Read a certificate that TLS has verified."""
        certificate = x509.load_der_x509_certificate(der)
        return cls(
            name=_first_uri(certificate),
            serial=f"{certificate.serial_number:x}",
            key=key_digest(certificate.public_key()),
            expires=certificate.not_valid_after_utc.timestamp(),
        )


def key_digest(key: CertificatePublicKeyTypes) -> str:
    """Return the SHA-256 of a key's SubjectPublicKeyInfo (RFC 5280, DER), in hexadecimal digits."""
    return hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


class Revocations:
    """A file of revoked certificates and keys, read again whenever it changes.

    One serial number or digest of a key a line, in hexadecimal digits; what follows a `#` is a remark. A file that is
    missing or that cannot be read as such is an error, `transport.no-revocations`: nobody is let in on a guess.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: tuple[int, int, int] | None = None
        self._revoked: frozenset[str] = frozenset()

    def any_of(self, *identifiers: str) -> bool:
        """Return whether a serial number or a key's digest is revoked now."""
        self._refresh()
        return not self._revoked.isdisjoint(identifiers)

    def _refresh(self) -> None:
        try:
            facts = self._path.stat()
            seen = (facts.st_mtime_ns, facts.st_size, facts.st_ino)
            if seen != self._seen:
                self._revoked = _identifiers(self._path)
                self._seen = seen
        except (OSError, ValueError) as error:
            self._seen = None
            hint = "write it anew: fedtune server enrol list"
            raise TransportError("no-revocations", f"{self._path} cannot be read", hint=hint) from error


def _identifiers(path: Path) -> frozenset[str]:
    with path.open("rb") as file:
        raw = file.read(_MAX_FILE + 1)
    if len(raw) > _MAX_FILE:
        raise ValueError("too large")
    words = [line.partition("#")[0].strip().lower() for line in raw.decode().splitlines()]
    if any(word and not _IDENTIFIER.fullmatch(word) for word in words):
        raise ValueError("not hexadecimal")
    return frozenset(word if len(word) == _KEY_DIGITS else word.lstrip("0") for word in words if word)


def _first_uri(certificate: x509.Certificate) -> str:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return ""
    return next(iter(names.get_values_for_type(x509.UniformResourceIdentifier)), "")
