"""The coordinator as witness of its sites' journals: it countersigns their heads and keeps every receipt.

A journal that was put back to an earlier copy has forgotten what the site spent since, and looks intact. Who finds out:

1. The coordinator sees heads and never a journal. `judge` refuses one that its key has not signed, that stands before
   the newest receipt, that has its number and another hash, or that is of another journal than this name had at first.
2. Whether a *longer* journal extends the newest receipt only the site can tell. It gets that receipt with every
   instruction, before it spends anything, so a head is countersigned where it answers the newest receipt, or is a
   site's first; otherwise a journal that was put back and then outgrew the receipt would be taken for its continuation.
3. A new key is taken on the site's word as long as the journal is the same: the old key's consent to it stands in the
   journal. That a node is who it says is for the transport to show.

A site that lies in 2 is found by an audit, since all receipts are kept and no journal contains two branches. Knows no
message and no round.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedtune.errors import FedtuneError, JournalError, WitnessError
from fedtune.journal.chain import public_hex
from fedtune.journal.witness import Head, Receipt
from fedtune.run.files import append_line, cut_torn_line, disk_errors

_REASONS = {
    "forged": ("is not signed by the key that it names", "the site's journal and vault do not belong together"),
    "other-site": (
        "is of another journal than the one first seen under this name",
        "restore the site's own journal; a site that begins anew needs another name",
    ),
    "shared-journal": (
        "is of a journal that another site shows",
        "give each site a folder of its own: fedtune client init",
    ),
    "rolled-back": ("stands before the newest that was witnessed", "restore the newest copy of the site's journal"),
    "forked": (
        "has the number of the newest that was witnessed and other content",
        "restore the newest copy of the site's journal, and let one client write it",
    ),
}


def judge(newest: Receipt | None, head: Head) -> str:
    """Return why a head cannot stand after a site's newest receipt, as a code, or an empty string when it can."""
    try:
        head.check()
    except JournalError:
        return "witness.forged"
    if newest is None:
        return ""
    known = newest.head
    if head.site != known.site:
        return "witness.other-site"
    if head.sequence < known.sequence:
        return "witness.rolled-back"
    if head.sequence == known.sequence and (head.digest, head.public_key) != (known.digest, known.public_key):
        return "witness.forked"
    return ""


class Witness:
    """The receipts of one coordinator, in `folder/heads.jsonl`: `{"name":SITE,"receipt":RECEIPT}`, newest last.

    One file for all sites, so that a round costs one flush. Receipts are collected in memory, and `newest` hands none
    out that is not on disk; those that a kill loses were never sent.
    """

    def __init__(self, folder: Path, key: Ed25519PrivateKey) -> None:
        """Read the receipts of an earlier process; an incomplete last line is cut, other damage is `witness.damaged`.

        Error: `witness.other-key` when they were signed by another key.
        """
        self._folder, self._file, self._key = folder, folder / "heads.jsonl", key
        self._newest: dict[str, Receipt] = {}
        self._name_of: dict[str, str] = {}  # by the journal's identity
        self._unsaved: list[str] = []
        cut_torn_line(self._file)
        for name, receipt in dict(self._lines()).items():  # the last of each name
            self._keep(name, self._own(receipt))

    @property
    def public_key(self) -> str:
        """The key that countersigns, 64 hexadecimal digits."""
        return public_hex(self._key)

    def newest(self, name: str) -> Receipt | None:
        """Return a site's newest receipt, which is on disk by then, or None for a site that has none."""
        self.save()
        return self._newest.get(name)

    def meet(self, name: str, head: Head) -> None:
        """Judge the head with which a site introduces itself, and countersign its first.

        A later one was not shown the newest receipt yet, so it is judged and not countersigned. Errors: as `accept`.
        """
        if name in self._newest:
            self._check(name, head)
        else:
            self.accept(name, head)

    def accept(self, name: str, head: Head) -> Receipt:
        """Countersign a head that answers an instruction with the newest receipt.

        Errors: `witness.forged`, `witness.rolled-back`, `witness.forked`, `witness.other-site`, and
        `witness.shared-journal` when the same journal is shown under two names; nothing is countersigned then.
        """
        self._check(name, head)
        known = self._newest.get(name)
        if known is not None and known.head.sequence == head.sequence:
            return known
        receipt = Receipt.of(head, self._key)
        self._unsaved.append(json.dumps({"name": name, "receipt": receipt.to_dict()}, sort_keys=True))
        self._keep(name, receipt)
        return receipt

    def save(self) -> None:
        """Put the receipts that are not on disk yet there, with one flush; costs nothing when there are none."""
        if self._unsaved:
            append_line(self._file, "\n".join(self._unsaved))
            self._unsaved.clear()

    def export(self) -> None:
        """Write what each site may be given, `heads/SITE.jsonl`: its own receipts, one a line, oldest first."""
        self.save()
        of_site = defaultdict(list)
        for name, receipt in self._lines():
            of_site[name].append(json.dumps(receipt, sort_keys=True) + "\n")
        folder = self._folder / "heads"
        with disk_errors(folder):
            folder.mkdir(exist_ok=True)
            for name, lines in of_site.items():
                (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")

    def _check(self, name: str, head: Head) -> None:
        code = judge(self._newest.get(name), head)
        if not code and self._name_of.get(head.site, name) != name:
            code = "witness.shared-journal"
        if code:
            slug = code.removeprefix("witness.")
            problem, hint = _REASONS[slug]
            raise WitnessError(slug, f"the head of {name}'s journal, record {head.sequence}, {problem}", hint=hint)

    def _keep(self, name: str, receipt: Receipt) -> None:
        self._newest[name] = receipt
        self._name_of[receipt.head.site] = name

    def _lines(self) -> Iterator[tuple[str, dict[str, Any]]]:
        if not self._file.exists():
            return
        with disk_errors(self._file), self._file.open("rb") as file:
            for line in file:
                try:
                    value = json.loads(line)
                    yield value["name"], value["receipt"]
                except (ValueError, TypeError, KeyError) as error:
                    raise self._damaged() from error

    def _own(self, value: dict[str, Any]) -> Receipt:
        try:
            receipt = Receipt.from_dict(value)
            receipt.check()
        except FedtuneError as error:
            raise self._damaged() from error
        if receipt.witness != self.public_key:
            hint = "restore the coordinator's key, or begin with a new folder"
            raise WitnessError("other-key", f"{self._file} was signed by another coordinator's key", hint=hint)
        return receipt

    def _damaged(self) -> WitnessError:
        hint = "restore it from a backup: without it nobody can tell whether a site's journal was put back"
        return WitnessError("damaged", f"{self._file} holds a line that is not a receipt", hint=hint)
