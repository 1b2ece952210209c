"""The chain of signed records: a state machine without I/O that accepts one line after another, or refuses.

A record is one line, `{"body":BODY,"signature":"HEX"}`. BODY is canonical JSON (RFC 8785) of `entry`, `kind`,
`previous`, `sequence` and `time`; `previous` is the SHA-256 of the whole line before it (64 zeros in the first), and
the signature is Ed25519 (RFC 8032) over the context label and BODY's bytes. The rules:

1. the first record is `site-created` and is signed by the key that it names, which is the key asked for, if any is;
2. sequence numbers count from 0 without a gap, and `previous` is the hash of the line before;
3. the signature verifies under the key in force; `key-rotated` puts another in force, which has signed the old one;
4. times never go back, but after `clock-set`;
5. the bytes are exactly those of the form above: no other spelling of the same record is accepted.

Whoever holds the key can write another history, and a cut at a record's end leaves a valid chain: only witnessed heads
(`fedtune.journal.witness`) show either.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import rfc8785
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedtune.errors import JournalError
from fedtune.journal.canonical import read_canonical
from fedtune.journal.entries import ClockSet, Entry, KeyRotated, SiteCreated, read_entry

CONTEXT = b"fedtune journal v1\n"
ROTATION = b"fedtune key rotation v1\n"
NOTHING = "0" * 64
_OPEN, _BETWEEN, _CLOSE = b'{"body":', b',"signature":"', b'"}'
_SIGNATURE = 128
_TAIL = len(_BETWEEN) + _SIGNATURE + len(_CLOSE)
_BEYOND = re.compile(rb'"signature":"[0-9a-f]{128}"\}[^\n]', re.DOTALL)


@dataclass(frozen=True, slots=True)
class Record:
    """One accepted line: its number, when it was written (UTC), what it says and its SHA-256."""

    sequence: int
    time: str
    entry: Entry
    digest: str


@dataclass(frozen=True, slots=True)
class Chain:
    """How far a journal has been accepted: the next number, the last line's hash and time, and the key in force.

    `site` is the hash of the first record: a site's identity, which no rotation and no renaming changes.
    """

    length: int = 0
    digest: str = NOTHING
    time: str = ""
    site: str = ""
    public_key: str = ""

    def accept(self, line: bytes) -> tuple[Chain, Record]:
        """Return the chain after a line (without its newline) and what the line says.

        Errors: `journal.tampered` with the record's number, whatever rule it breaks; `journal.unknown-entry` for what
        the site has signed and this version cannot read.
        """
        content, raw, signature = _split(line, self.length)
        key = self.public_key or _first_key(content)
        _verify(key, CONTEXT + raw, signature, self.length)
        record = self._record(content, hashlib.sha256(line).hexdigest())
        if isinstance(record.entry, SiteCreated) and record.entry.public_key != key:
            raise tampered(self.length, "it names another key than the one that signs")
        if isinstance(record.entry, KeyRotated):
            _verify(record.entry.public_key, rotation_statement(key), record.entry.proof, self.length)
            key = record.entry.public_key
        site = self.site or record.digest
        return Chain(self.length + 1, record.digest, record.time, site, key), record

    def extend(self, entry: Entry, time: str, signer: Ed25519PrivateKey) -> bytes:
        """Return the line that says `entry` next, signed; it is what `accept` accepts."""
        body: dict[str, Any] = {
            "entry": entry.model_dump(mode="json"),
            "kind": entry.kind,
            "previous": self.digest,
            "sequence": self.length,
            "time": time,
        }
        raw = rfc8785.dumps(body)
        return _OPEN + raw + _BETWEEN + signer.sign(CONTEXT + raw).hex().encode() + _CLOSE

    def _record(self, content: dict[str, Any], digest: str) -> Record:
        if set(content) != {"entry", "kind", "previous", "sequence", "time"}:
            raise tampered(self.length, "its fields are not a record's")
        if content["sequence"] != self.length or type(content["sequence"]) is not int:
            raise tampered(self.length, "it has another record's number")
        if content["previous"] != self.digest:
            raise tampered(self.length, "it does not follow from the record before it")
        entry = read_entry(content["kind"], content["entry"])
        if isinstance(entry, SiteCreated) != (self.length == 0):
            raise tampered(self.length, "a journal begins with the site's creation, once")
        time = content["time"]
        if not _is_moment(time) or (time < self.time and not isinstance(entry, ClockSet)):
            raise tampered(self.length, "its time is before that of the record before it")
        return Record(self.length, time, entry, digest)


def moment(now: datetime) -> str:
    """Spell a time in UTC with microseconds, so that text and time sort alike: `2026-11-22T04:05:06.000007Z`."""
    return now.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def rotation_statement(old_key: str) -> bytes:
    """Return what a new key signs to show that its holder takes over from the old one."""
    return ROTATION + bytes.fromhex(old_key)


def public_hex(key: Ed25519PrivateKey) -> str:
    """Return the public half, 64 hexadecimal digits."""
    return key.public_key().public_bytes_raw().hex()


def tampered(sequence: int, problem: str) -> JournalError:
    """Return the error for a record that is not what its site wrote."""
    return JournalError(
        "tampered",
        f"record {sequence} of the journal is damaged or forged: {problem}",
        hint="nothing is spent until it is restored: fedtune audit verify FILE shows how far it is intact",
    )


def is_torn(tail: bytes, sequence: int) -> bool:
    """Whether bytes without a line end are a write that was cut short; False for a record that lacks its line end only.

    Error: `journal.tampered` where something follows a record, which no interrupted write leaves.
    """
    if _BEYOND.search(tail):
        raise tampered(sequence, "something follows it on its line")
    try:
        _split(tail, sequence)
    except JournalError:
        return True
    return False


def _split(line: bytes, sequence: int) -> tuple[dict[str, Any], bytes, str]:
    if not (line.startswith(_OPEN) and line.endswith(_CLOSE) and line[-_TAIL:].startswith(_BETWEEN)):
        raise tampered(sequence, "it is not one record")
    raw, signature = line[len(_OPEN) : -_TAIL], line[-_TAIL + len(_BETWEEN) : -len(_CLOSE)]
    if signature.strip(b"0123456789abcdef"):
        raise tampered(sequence, "its signature is not written in hexadecimal digits")
    try:
        content = read_canonical(raw)
    except (ValueError, RecursionError) as error:
        raise tampered(sequence, "it is not JSON in canonical form") from error
    if not isinstance(content, dict):
        raise tampered(sequence, "it is not a JSON object")
    return content, raw, signature.decode()


def _verify(public_key: str, message: bytes, signature: str, sequence: int) -> None:
    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(public_key)).verify(bytes.fromhex(signature), message)
    except (InvalidSignature, ValueError) as error:
        raise tampered(sequence, "its signature is not the site's") from error


def _first_key(content: dict[str, Any]) -> str:
    """Return the key that a first record claims to be signed by."""
    entry = content.get("entry")
    key = entry.get("public_key") if isinstance(entry, dict) else None
    return key if isinstance(key, str) else ""


def _is_moment(text: object) -> bool:
    try:
        return isinstance(text, str) and moment(datetime.fromisoformat(text)) == text
    except ValueError:
        return False
