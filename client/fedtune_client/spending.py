"""What a site has spent on a study: an append-only file of mechanism events, on disk before any record is read.

A crash leaves the round charged. With seeded noise a repeated round draws the same sample and the same noise from the
same adapter, so it releases nothing new and counts once; with secure noise every attempt counts.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedtune.errors import PrivacyError, RunError
from fedtune.privacy.accounting import Event, merge
from fedtune.run.files import append_line, cut_torn_line, make_folder, read_lines


@dataclass(frozen=True, slots=True)
class Reservation:
    """Proof that a round's event is on disk; a round is trained only against one."""

    round: int
    event: Event | None


@dataclass(frozen=True, slots=True)
class SpendingLog:
    """The events of one site in one study, in `path`."""

    path: Path

    def reserve(self, number: int, event: Event | None) -> Reservation:
        """Write the round's whole cost, flushed to disk, before training; without privacy there is nothing to write."""
        if event is not None:
            make_folder(self.path.parent)
            self.spent()  # a log that cannot be read is not one to add to
            cut_torn_line(self.path)
            append_line(self.path, json.dumps({"round": number, "event": event.to_dict()}, sort_keys=True))
        return Reservation(number, event)

    def spent(self) -> tuple[Event, ...]:
        """Return all events, merged.

        Error: `run.damaged` when a line before the last is not what `reserve` wrote.
        """
        charged = set()
        for attempt, line in enumerate(read_lines(self.path)):
            number, event = self._entry(line)
            charged.add((number, event, 0 if event.noise == "seeded" else attempt))
        return merge(event for _, event, _ in charged)

    def _entry(self, line: Any) -> tuple[int, Event]:
        try:
            return int(line["round"]), Event.from_dict(line["event"])
        except (KeyError, TypeError, ValueError, PrivacyError) as error:
            hint = "restore it from a backup"
            raise RunError("damaged", f"{self.path} holds a line that is not a round's event", hint=hint) from error
