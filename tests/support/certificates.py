"""A federation's certificates and keys as a test wants them, made in a second; independent of `fedtune.pki`."""

from __future__ import annotations

import base64
import datetime as dt
import ipaddress
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

DAY = dt.timedelta(days=1)


@dataclass(frozen=True, slots=True)
class Credential:
    """A certificate with its key, also as PEM files."""

    certificate: x509.Certificate
    private: ec.EllipticCurvePrivateKey
    certificate_file: Path
    key_file: Path

    @property
    def serial(self) -> str:
        return f"{self.certificate.serial_number:x}"

    @property
    def der(self) -> bytes:
        return self.certificate.public_bytes(Encoding.DER)


@dataclass(frozen=True, slots=True)
class Authority:
    """A certificate authority in a folder."""

    folder: Path
    own: Credential

    @property
    def file(self) -> Path:
        return self.own.certificate_file

    @classmethod
    def make(cls, folder: Path, name: str = "authority") -> Authority:
        folder.mkdir(parents=True, exist_ok=True)
        key = ec.generate_private_key(ec.SECP256R1())
        subject = _name(name)
        certificate = (
            _builder(subject, key.public_key(), ends=3650 * DAY)
            .issuer_name(subject)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .sign(key, SHA256())
        )
        return cls(folder, _written(folder, name, certificate, key))

    def server(self, name: str = "server") -> Credential:
        """Issue a certificate for 127.0.0.1."""
        names: list[x509.GeneralName] = [x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        return self._issue(name, names, ExtendedKeyUsageOID.SERVER_AUTH)

    def site(self, name: str, *, ends: dt.timedelta = DAY) -> Credential:
        """Issue a client certificate."""
        names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(f"fedtune://test.internal/{name}")]
        return self._issue(name, names, ExtendedKeyUsageOID.CLIENT_AUTH, ends=ends)

    def _issue(
        self, name: str, names: list[x509.GeneralName], usage: x509.ObjectIdentifier, *, ends: dt.timedelta = DAY
    ) -> Credential:
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = (
            _builder(_name(name), key.public_key(), ends=ends)
            .issuer_name(self.own.certificate.subject)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            .sign(self.own.private, SHA256())
        )
        return _written(self.folder, name, certificate, key)


_P384_ORDER = int(
    "ffffffffffffffffffffffffffffffffffffffffffffffffc7634d81f4372ddf581a0db248b0a77aecec196accc52973", 16
)


def other_signature(signature: str) -> str:
    """Return the twin (r, n - s) of a base64 ECDSA signature by a P-384 key: as valid, and made without the key."""
    r, s = decode_dss_signature(base64.b64decode(signature))
    return base64.b64encode(encode_dss_signature(r, _P384_ORDER - s)).decode()


def node_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Write the key of a Flower node as OpenSSH does."""
    key = ec.generate_private_key(ec.SECP384R1())
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    path.chmod(0o600)
    return key


def _builder(subject: x509.Name, key: ec.EllipticCurvePublicKey, ends: dt.timedelta) -> x509.CertificateBuilder:
    now = dt.datetime.now(dt.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - 2 * DAY)
        .not_valid_after(now + ends)
    )


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _written(folder: Path, name: str, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> Credential:
    certificate_file, key_file = folder / f"{name}.pem", folder / f"{name}.key"
    certificate_file.write_bytes(certificate.public_bytes(Encoding.PEM))
    key_file.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    key_file.chmod(0o600)
    return Credential(certificate, key, certificate_file, key_file)
