"""Vault, journal and the memory of messages: can they be opened, are they whole."""

from __future__ import annotations

from collections.abc import Iterator

from fedtune.envelopes.nonces import FileNonces
from fedtune_client.doctor.finding import Level, Subject, checked
from fedtune_client.supervision import told

Said = Iterator[tuple[Level, str, str]]


@checked("journal")
def journal(subject: Subject) -> Said:
    """Whether every record is whole, and how much of it a coordinator has countersigned."""
    seen = subject.seen
    if seen is None:
        return
    witnessed, last = seen.state.witnessed, seen.chain.length - 1
    if witnessed is None:
        known = "no coordinator has countersigned it yet"
    else:
        known = f"countersigned up to record {witnessed.sequence} of {last}"
    yield "ok", f"{seen.chain.length:,} records, each signed and in its place; {known}", ""
    if not seen.key_checked:
        hint = f"put the key that the site told its auditor into {subject.folder.public_key_file}"
        yield "warn", "there is no public.key beside the journal: the key that it names itself was believed", hint


@checked("messages")
def messages(subject: Subject) -> Said:
    """Whether the memory of messages can be read and written."""
    path = subject.folder.nonces
    if path.exists():
        FileNonces(path).close()
        yield "ok", "the numbers of messages are remembered", ""


@checked("client")
def client(subject: Subject) -> Said:
    """Whether the client runs, and where it tells its health."""
    found = told(subject.folder)
    if found is None:
        yield "ok", "the client does not run; start it with fedtune client up", ""
    else:
        yield "ok", f"the client runs; its health: http://127.0.0.1:{found.get('health', '?')}/ready", ""
