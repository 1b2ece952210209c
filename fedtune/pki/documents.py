"""The papers of enrolment: JSON in one spelling, of bounded size, each signed as a whole. Knows no file and no clock.

    {"body":BODY,"kind":KIND,"signature":HEX,"version":1} and a newline, canonical (RFC 8785)

The signature is Ed25519 (RFC 8032) over `fedtune KIND v1`, a newline and BODY's bytes. It is checked before a field of
BODY is believed, and what is not exactly the bytes that `write` makes is refused, so there is one file for one content.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Annotated, Any, ClassVar, Final, TypeVar

import rfc8785
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from fedtune.errors import EnrolmentError
from fedtune.journal.canonical import read_canonical
from fedtune.journal.chain import moment

VERSION: Final = 1
MOST_BYTES: Final = 1 << 17  # a request with a hundred key rotations has 60 kB
_SIGNATURE = re.compile(r"[0-9a-f]{128}")
_FIELDS = {"body", "kind", "signature", "version"}
Sign = Callable[[bytes], str]  # a statement to the hexadecimal digits of its Ed25519 signature


def _exact_moment(text: str) -> str:
    if moment(datetime.fromisoformat(text)) != text:
        raise ValueError("not a time in UTC with microseconds")
    return text


Id = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
Serial = Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]
Pem = Annotated[
    str, Field(max_length=8192, pattern=r"^-----BEGIN [A-Z ]+-----\n[A-Za-z0-9+/=\n]+-----END [A-Z ]+-----\n$")
]
Instant = Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z$"), AfterValidator(_exact_moment)]


class Strict(BaseModel):
    """Data from elsewhere: exact types, no field more, no field less."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, hide_input_in_errors=True)


class Document(Strict):
    """The body of a paper; `kind` is how files spell it."""

    kind: ClassVar[str]

    @property
    def statement(self) -> bytes:
        """What is signed."""
        return _statement(self.kind, rfc8785.dumps(self.model_dump(mode="json")))


D = TypeVar("D", bound=Document)


def write(document: Document, sign: Sign) -> bytes:
    """Return the file of a paper."""
    content: dict[str, Any] = {"kind": document.kind, "version": VERSION, "signature": sign(document.statement)}
    return rfc8785.dumps({**content, "body": document.model_dump(mode="json")}) + b"\n"


def read(model: type[D], raw: bytes, signer: str | Callable[[dict[str, Any]], str]) -> D:
    """Return what a paper says, signed by `signer`: a public key (hexadecimal), or how the body leads to it.

    Errors: `enrolment.too-large`, `enrolment.malformed`, `enrolment.unknown-version`, `enrolment.forged`.
    """
    content = _content(model.kind, raw)
    body, signature = content["body"], content["signature"]
    key = signer if isinstance(signer, str) else signer(body)
    if not is_signed(key, _statement(model.kind, rfc8785.dumps(body)), signature):
        hint = "ask who sent it to send it again, by a way that leaves files as they are"
        raise EnrolmentError("forged", f"this {model.kind} is not signed by the key that it should be", hint=hint)
    try:
        return model.model_validate_json(rfc8785.dumps(body))
    except (ValidationError, RecursionError) as error:
        raise malformed(model.kind, _first(error)) from error


def is_signed(public_key: object, statement: bytes, signature: object) -> bool:
    """Whether an Ed25519 signature in lower-case hexadecimal digits is this key's over a statement."""
    if not (isinstance(public_key, str) and isinstance(signature, str) and _SIGNATURE.fullmatch(signature)):
        return False  # `fromhex` alone takes white space and capitals
    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(public_key)).verify(bytes.fromhex(signature), statement)
    except (InvalidSignature, ValueError):
        return False
    return True


def fingerprint(data: bytes) -> str:
    """Return the first 128 bits of SHA-256 in groups of four digits, for people to compare by telephone.

    Who wants another file of the same fingerprint has to try 2¹²⁸, since the first one is given.
    """
    digits = hashlib.sha256(data).hexdigest()[:32]
    return " ".join(digits[start : start + 4] for start in range(0, 32, 4))


def instant(text: str) -> datetime:
    """Return the time that an `Instant` names."""
    return datetime.fromisoformat(text).astimezone(UTC)


def malformed(kind: str, problem: str) -> EnrolmentError:
    """Return the error for a file that no fedtune has written as it stands."""
    hint = "ask who sent it to send it again, by a way that leaves files as they are"
    return EnrolmentError("malformed", f"this is not a {kind} as fedtune writes it: {problem}", hint=hint)


def _statement(kind: str, body: bytes) -> bytes:
    return b"fedtune " + kind.encode() + b" v1\n" + body


def _content(kind: str, raw: bytes) -> dict[str, Any]:
    """Return the outer object of a paper of this kind, its body an object still to be checked."""
    if len(raw) > MOST_BYTES:
        raise EnrolmentError("too-large", f"a {kind} has at most {MOST_BYTES} bytes, this file more", hint=_WHICH)
    try:
        content = read_canonical(raw.removesuffix(b"\n")) if raw.endswith(b"\n") else None
    except (ValueError, RecursionError) as error:
        raise malformed(kind, "it is not JSON in canonical form") from error
    if not isinstance(content, dict) or set(content) != _FIELDS or not isinstance(content["body"], dict):
        raise malformed(kind, "it does not have a signed paper's fields")
    if type(content["version"]) is not int or content["version"] != VERSION:
        message = f"this {kind} is of another version than {VERSION}"
        raise EnrolmentError("unknown-version", message, hint="read it with the fedtune that its sender has")
    if content["kind"] != kind:
        raise malformed(kind, "it is a paper of another kind")
    return content


def _first(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return "it is nested too deeply"
    first: Any = error.errors(include_url=False, include_input=False)[0]
    return f"{'.'.join(map(str, first['loc'])) or 'it'}: {first['msg']}"


_WHICH = "give the file that fedtune wrote"
