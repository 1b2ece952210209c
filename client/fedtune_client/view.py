"""A site's journal for whoever may read the folder: without a secret, without the lock, and nothing is written.

Every record is checked as at an opening, against the public key and the receipts beside it. An incomplete last record
is left out: a site that is running may be writing it. Views need only the journal; where there is no `site.yaml` it is
found by its name's ending.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from fedtune.errors import ConfigError, JournalError
from fedtune.journal.chain import Chain, Record, is_torn
from fedtune.journal.entries import KeyRotated, SiteCreated
from fedtune.journal.journal import Journal
from fedtune.journal.ledger import Ledger
from fedtune.journal.receipts import compare, read_receipts, size_of
from fedtune.journal.state import SiteState
from fedtune_client.folder import SiteFolder
from fedtune_client.policy.schema import Policy


@dataclass(frozen=True, slots=True)
class SiteView:
    """What a journal says: its records in order and their sums; `size` is how many bytes of the file they take.

    `key_checked` is False where no `public.key` lies beside the journal, and the key that it names itself is believed.
    """

    folder: SiteFolder
    path: Path
    records: tuple[Record, ...]
    state: SiteState
    chain: Chain
    size: int
    key_checked: bool

    @property
    def policy(self) -> Policy | None:
        """The policy in force, None before the first was adopted."""
        found = self.state.policy
        return None if found is None else Policy.model_validate(found.policy)

    @property
    def ledger(self) -> Ledger:
        """The ledger of these records; it can say what a charge would come to, and charge nothing."""
        journal = Journal(self.path, _no_key)
        journal.state = self.state
        return Ledger(journal)


def find_journal(folder: SiteFolder) -> Path:
    """Return the journal in a site's folder. Errors: `config.no-site`; those of `site.yaml` if there are more."""
    found = sorted(folder.path.glob("*.journal"))
    if len(found) > 1:
        found = [path for path in found if path == folder.journal_file(folder.facts().name)]
    if not found:
        hint = "fedtune client init NAME makes one; --site DIR or FEDTUNE_SITE says where it is"
        raise ConfigError("no-site", f"{folder.path} is not a site's folder: it has no journal", hint=hint)
    return found[0]


def view(folder: SiteFolder) -> SiteView:
    """Read and check a site's journal.

    Errors: `config.no-site`; `journal.tampered`, `journal.inconsistent`, `journal.rolled-back` (by the site's own
    receipts), `journal.other-key` where `public.key` is none of the site's, `journal.missing`, `journal.unreadable`.
    """
    path = find_journal(folder)
    receipts = folder.heads_file if folder.heads_file.exists() else None
    until = size_of(receipts)  # before the journal is read: later receipts may be for later records
    chain, state, records, size = Chain(), SiteState(), list[Record](), 0
    for line in _lines(path):
        if not line.endswith(b"\n") and is_torn(line, chain.length):
            break
        chain, record = chain.accept(line.removesuffix(b"\n"))
        state.apply(record)
        records.append(record)
        size += len(line)
    if not records:
        raise JournalError("missing", f"{path} holds no record", hint="begin again: fedtune client init NAME")
    keys = {record.entry.public_key for record in records if isinstance(record.entry, SiteCreated | KeyRotated)}
    key_checked = _check_key(folder, keys)
    digests = bytearray(b"".join(bytes.fromhex(record.digest) for record in records))
    missing = compare(read_receipts(receipts, until), None, (chain.site, keys), digests).missing
    if missing:
        hint = "restore the newest copy of the journal; what was spent since an old copy would be forgotten"
        raise JournalError("rolled-back", f"{path}: {missing}", hint=hint)
    return SiteView(folder, path, tuple(records), state, chain, size, key_checked)


def _lines(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            yield from file
    except OSError as error:
        hint = "ask the user that runs the site, or run this as that user"
        raise JournalError("unreadable", f"{path} cannot be read ({error.strerror or error})", hint=hint) from error


def _check_key(folder: SiteFolder, keys: set[str]) -> bool:
    """Compare with `public.key`; a rotation that was cut short has left an earlier one there, which vouches as well."""
    if not folder.public_key_file.exists():
        return False
    known = folder.public_key_file.read_text(encoding="ascii", errors="replace").strip().lower()
    if known not in keys:
        raise JournalError(
            "other-key",
            f"{folder.public_key_file} holds a key that never was the journal's",
            hint="put the right journal and key together; fedtune audit verify FILE says which keys a journal has",
        )
    return True


def _no_key(_public_key: str) -> NoReturn:
    raise JournalError("closed", "the journal is only read here", hint="open the site to write")
