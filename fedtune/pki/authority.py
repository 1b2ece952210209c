"""A federation's authority: its certificate and its key, which is needed to enrol and to renew, never to run.

One file, `authority.pem`: the certificate, then the key as PKCS8 (RFC 5958), encrypted. The password of the PKCS8 is
not what a person types: OpenSSL derives the encryption key with 2,048 rounds of PBKDF2, which a stolen file would not
withstand. It is the hexadecimal digits of

    scrypt(passphrase in Unicode NFC, salt = TEXT, n = 2¹⁷, r = 8, p = 1, 32 bytes)   or
    HKDF-SHA256(32-byte key, no salt, info = TEXT, 32 bytes)      TEXT = `fedtune authority v1`, newline, FEDERATION

so `openssl pkey -in authority.pem -passin pass:DIGITS` opens it without this code. `ca.pem` is the certificate alone,
for whoever verifies. `coordinator.pem` is a coordinator's TLS certificate and key in one file, so that a kill never
leaves a pair that does not match.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Final, Self

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)

from fedtune.errors import EnrolmentError
from fedtune.pki import certificates
from fedtune.pki.certificates import Issuer, federation_of, is_due
from fedtune.pki.files import read_private, write_private
from fedtune.pki.keys import new_tls_key, pem_key

LABEL: Final = "fedtune authority v1"
SHORTEST: Final = 12
KEY_BYTES: Final = 32
AUTHORITY_FILE, CA_FILE, COORDINATOR_FILE = "authority.pem", "ca.pem", "coordinator.pem"


@dataclass(frozen=True, slots=True)
class Secret:
    """What unlocks an authority: a passphrase of a person, or 32 random bytes. `repr` shows neither."""

    data: bytes = field(repr=False)
    is_key: bool

    @classmethod
    def passphrase(cls, text: str) -> Self:
        """Take a passphrase. Error: `enrolment.bad-secret` for text that is not UTF-8."""
        try:
            return cls(unicodedata.normalize("NFC", text).encode(), is_key=False)
        except UnicodeEncodeError:
            raise EnrolmentError("bad-secret", "the passphrase is not UTF-8 text", hint=_LONGER) from None

    @classmethod
    def key(cls, data: bytes) -> Self:
        """Take a random key. Error: `enrolment.bad-secret` unless it has 32 bytes."""
        if len(data) != KEY_BYTES:
            hint = "a new key: (umask 077; head -c 32 /dev/urandom > FILE)"
            raise EnrolmentError("bad-secret", f"the key has {len(data)} bytes, not {KEY_BYTES}", hint=hint)
        return cls(data, is_key=True)

    def check(self) -> None:
        """Refuse a new passphrase that is too short, `enrolment.bad-secret`; an old one is tried as it is."""
        if not self.is_key and len(self.data.decode()) < SHORTEST:
            raise EnrolmentError("bad-secret", f"the passphrase has fewer than {SHORTEST} characters", hint=_LONGER)

    def password(self, federation: str) -> bytes:
        """Return what encrypts the PKCS8; for a passphrase it takes 128 MiB and some tenths of a second."""
        text = f"{LABEL}\n{federation}".encode()
        if self.is_key:
            return HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=None, info=text).derive(self.data).hex().encode()
        return Scrypt(salt=text, length=KEY_BYTES, n=2**17, r=8, p=1).derive(self.data).hex().encode()


@dataclass(frozen=True, slots=True)
class Authority:
    """An unlocked authority; it issues certificates and remembers none of them."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey = field(repr=False)

    @classmethod
    def create(cls, federation: str, hosts: Iterable[str], now: datetime) -> Self:
        """Make an authority for sites of a federation and for a coordinator at these hosts, or below these domains."""
        key = ec.generate_private_key(ec.SECP384R1())
        return cls(certificates.authority_certificate(federation, hosts, key, now), key)

    @property
    def federation(self) -> str:
        """The federation whose authority this is."""
        return federation_of(self.certificate)

    def renewed(self, hosts: Iterable[str], now: datetime) -> Authority:
        """Return it with a new certificate of the same key and name; what it issued before stays valid."""
        certificate = certificates.authority_certificate(self.federation, hosts, self.key, now)
        return Authority(certificate, self.key)

    def certify_site(self, site: str, public_key: ec.EllipticCurvePublicKey, now: datetime) -> x509.Certificate:
        """Issue a client certificate. Error: `enrolment.authority-expired`."""
        return certificates.site_certificate(Issuer(self.certificate, self.key), site, public_key, now)

    def certify_coordinator(
        self, hosts: Iterable[str], public_key: ec.EllipticCurvePublicKey, now: datetime
    ) -> x509.Certificate:
        """Issue a server certificate. Errors: `enrolment.bad-host`, `enrolment.authority-expired`."""
        return certificates.coordinator_certificate(Issuer(self.certificate, self.key), hosts, public_key, now)

    def save(self, folder: Path, secret: Secret) -> None:
        """Write `authority.pem` and `ca.pem`. Errors: `enrolment.bad-secret`, those of `write_private`."""
        secret.check()
        encryption = BestAvailableEncryption(secret.password(self.federation))
        key = self.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption)
        write_private(folder / AUTHORITY_FILE, [certificates.pem(self.certificate).encode(), key])
        write_private(folder / CA_FILE, [certificates.pem(self.certificate).encode()])

    @classmethod
    def load(cls, folder: Path, secret: Secret) -> Self:
        """Unlock what `save` wrote, and write `ca.pem` again where a kill has kept it from being written.

        Errors: `enrolment.missing`, `enrolment.wrong-secret`, `enrolment.damaged`, `enrolment.bad-certificate`,
        `enrolment.permissions`.
        """
        path = folder / AUTHORITY_FILE
        certificate, encrypted = _parts(path)
        try:
            key = load_pem_private_key(encrypted, secret.password(federation_of(certificate)))
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            hint = "give the passphrase or the key file that the federation was made with"
            raise EnrolmentError("wrong-secret", f"{path} does not open with it", hint=hint) from error
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
            raise _damaged(path)
        certificates.check_signed(certificate, certificate)
        spelled = certificates.pem(certificate).encode()
        if read_private(folder / CA_FILE) != spelled:
            write_private(folder / CA_FILE, [spelled])
        return cls(certificate, key)


def read_authority(folder: Path) -> x509.Certificate:
    """Return the authority's certificate; it needs no secret. Errors: `enrolment.missing`, `enrolment.damaged`."""
    return _parts(folder / AUTHORITY_FILE)[0]


def write_coordinator(folder: Path, authority: Authority, hosts: Iterable[str], now: datetime) -> x509.Certificate:
    """Make a TLS key for a coordinator and certify it, both in `coordinator.pem`; an older one is replaced.

    The key is not encrypted: a service that starts by itself could only keep the password beside it.
    """
    key = new_tls_key()
    certificate = authority.certify_coordinator(hosts, key.public_key(), now)
    write_private(folder / COORDINATOR_FILE, [certificates.pem(certificate).encode(), pem_key(key)])
    return certificate


def coordinator_is_due(folder: Path, now: datetime) -> bool:
    """Whether `coordinator.pem` is missing, or has less than a third of its life left."""
    path = folder / COORDINATOR_FILE
    return read_private(path) is None or is_due(_parts(path)[0], now)


def _parts(path: Path) -> tuple[x509.Certificate, bytes]:
    raw = read_private(path)
    if raw is None:
        raise EnrolmentError("missing", f"there is no {path}", hint="make the federation first: fedtune server init")
    end = raw.find(b"-----END CERTIFICATE-----\n") + len(b"-----END CERTIFICATE-----\n")
    try:
        return certificates.read_pem(raw[:end].decode()), raw[end:]
    except (UnicodeDecodeError, EnrolmentError) as error:
        raise _damaged(path) from error


def _damaged(path: Path) -> EnrolmentError:
    return EnrolmentError("damaged", f"{path} is damaged", hint="restore it from a backup")


_LONGER = "take several random words, or a key file"
