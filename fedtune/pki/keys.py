"""The keys of a site beside its signing key: one for TLS (ECDSA P-256), one for its Flower node (ECDSA P-384).

Makes, spells and proves them; knows no certificate and no file. A node's public key is spelled as OpenSSH does, because
Flower reads it so; a public key of either kind is named by the SHA-256 of its SubjectPublicKeyInfo.
"""

from __future__ import annotations

import hashlib
from typing import Final

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256, SHA384
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_der_private_key,
    load_ssh_public_key,
)

from fedtune.errors import EnrolmentError

MOST_PROOF: Final = 2 * 104  # hexadecimal digits of an ECDSA signature by a P-384 key, DER
_HASHES = {"secp256r1": SHA256, "secp384r1": SHA384}


def new_tls_key() -> ec.EllipticCurvePrivateKey:
    """Make a key for certificates of this site or coordinator."""
    return ec.generate_private_key(ec.SECP256R1())


def new_node_key() -> ec.EllipticCurvePrivateKey:
    """Make a key for a Flower node, on the curve that Flower's own keys are on."""
    return ec.generate_private_key(ec.SECP384R1())


def prove(key: ec.EllipticCurvePrivateKey, statement: bytes) -> str:
    """Sign a statement with ECDSA (FIPS 186-5) and the hash of the curve's strength."""
    return key.sign(statement, _algorithm(key.public_key())).hex()


def is_proved(key: ec.EllipticCurvePublicKey, statement: bytes, proof: str) -> bool:
    """Whether `prove` made this proof with the private half."""
    try:
        key.verify(bytes.fromhex(proof), statement, _algorithm(key))
    except (InvalidSignature, ValueError):
        return False
    return True


def node_text(key: ec.EllipticCurvePublicKey) -> str:
    """Spell a node's public key: `ecdsa-sha2-nistp384 BASE64`."""
    return key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


def read_node_key(text: str) -> ec.EllipticCurvePublicKey:
    """Return the key of a text; whatever `node_text` does not write is `enrolment.bad-key`."""
    try:
        key = load_ssh_public_key(text.encode())
    except (ValueError, UnsupportedAlgorithm) as error:
        raise _not_a_node_key() from error
    if not (isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name == "secp384r1" and node_text(key) == text):
        raise _not_a_node_key()
    return key


def node_file(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Spell a node's private key as the file that a SuperNode reads: OpenSSH, not encrypted."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())


def key_name(key: ec.EllipticCurvePublicKey) -> str:
    """Return the SHA-256 of a public key's SubjectPublicKeyInfo (DER), 64 hexadecimal digits."""
    return hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def pem_key(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Spell a private key as a TLS library reads it: PKCS8, PEM, not encrypted."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def private_text(key: ec.EllipticCurvePrivateKey) -> str:
    """Spell a private key for a place that is sealed as a whole: PKCS8, DER, hexadecimal digits."""
    return key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption()).hex()


def read_private_text(text: str) -> ec.EllipticCurvePrivateKey:
    """Return the key that `private_text` spelled. Error: `enrolment.bad-key`."""
    try:
        key = load_der_private_key(bytes.fromhex(text), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise EnrolmentError("bad-key", "a stored private key cannot be read", hint="restore the vault from an export")
    return key


def _algorithm(key: ec.EllipticCurvePublicKey) -> ec.ECDSA:
    return ec.ECDSA(_HASHES[key.curve.name]())


def _not_a_node_key() -> EnrolmentError:
    hint = "let the site write its request again: fedtune client init --invitation FILE"
    return EnrolmentError("bad-key", "the node's key is not ECDSA P-384 as OpenSSH spells it", hint=hint)
