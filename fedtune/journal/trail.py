"""What a journal says, a line of plain words for each record, for people who answer for a site's data.

Names come from coordinators and operators and are printed so that a terminal shows them and acts on none. Knows no
signature: records are those of `fedtune.journal.chain`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from fedtune.display import bytes_text, printable
from fedtune.journal import entries as e
from fedtune.journal.chain import Record
from fedtune.privacy.accounting import Event


@dataclass(frozen=True, slots=True)
class Row:
    """One record in words; `time` is UTC."""

    sequence: int
    time: str
    kind: str
    text: str


def describe(records: Iterable[Record]) -> Iterator[Row]:
    """Yield a row for each record of a journal, from its first on: later records speak of earlier ones."""
    names = _Names()
    for record in records:
        text = _TEXTS[type(record.entry)](names, record.sequence, record.entry)
        yield Row(record.sequence, record.time, record.entry.kind, printable(text).replace("\n", r"\n"))


@dataclass(slots=True)
class _Names:
    """What earlier records call data sets, grants, studies and rounds."""

    data: dict[int, str] = field(default_factory=dict)
    grants: dict[int, str] = field(default_factory=dict)
    studies: dict[str, str] = field(default_factory=dict)
    rounds: dict[int, str] = field(default_factory=dict)

    def study(self, plan: str) -> str:
        return self.studies.get(plan, f"plan {_short(plan)}")


def _short(digest: str) -> str:
    return f"{digest[:12]}…"


def _created(_names: _Names, _number: int, entry: e.SiteCreated) -> str:
    return f"the journal of site {entry.site} begins; it signs with the key {_short(entry.public_key)}"


def _rotated(_names: _Names, _number: int, entry: e.KeyRotated) -> str:
    return f"the site signs with another key from here on: {_short(entry.public_key)}"


def _adopted(_names: _Names, _number: int, entry: e.PolicyAdopted) -> str:
    return f"the site acts by another policy from here on ({_short(entry.sha256)})"


def _registered(names: _Names, number: int, entry: e.DataRegistered) -> str:
    names.data[number] = entry.name
    shared = ", ".join(str(join) for join in entry.joins)
    budget = f"; it shares its budget with the data of record {shared}" if shared else ""
    content = f"content {_short(entry.fingerprint)}"
    return f"data set {entry.name} is registered: about {entry.units:,} units ({entry.unit}), {content}{budget}"


def _given(names: _Names, number: int, entry: e.ConsentGiven) -> str:
    names.grants[number] = f"{names.data.get(entry.data, '?')} for {entry.purpose}"
    most = "as far as the policy allows" if entry.epsilon is None else f"up to ε = {entry.epsilon:g}"
    end = "without an end" if entry.expires is None else f"until {entry.expires}"
    return f"consent to use data set {names.grants[number]}, {most}, {end}"


def _revoked(names: _Names, _number: int, entry: e.ConsentRevoked) -> str:
    return f"consent is withdrawn to use {names.grants.get(entry.grant, '?')} (record {entry.grant}): {entry.reason}"


def _consented(names: _Names, _number: int, entry: e.RecordsConsented) -> str:
    return f"of data set {names.data.get(entry.data, '?')}, about {entry.units:,} units take part from here on"


def _approved(names: _Names, _number: int, entry: e.PlanApproved) -> str:
    return f"{entry.by} agrees to {names.study(entry.plan)}"


def _accepted(names: _Names, _number: int, entry: e.PlanAccepted) -> str:
    names.studies[entry.plan] = f"study {entry.name}"
    return f"the site takes part in study {entry.name} (plan {_short(entry.plan)})"


def _refused(_names: _Names, _number: int, entry: e.PlanRefused) -> str:
    reasons = ", ".join(entry.reasons)
    return f"the site does not take part in study {entry.name} (plan {_short(entry.plan)}): {reasons}"


def _reserved(names: _Names, number: int, entry: e.Reserved) -> str:
    names.rounds[number] = f"round {entry.round} of {names.study(entry.plan)}"
    if entry.purpose == "metrics":
        names.rounds[number] += " (metrics)"
    cost = _cost(entry.mechanism())
    return f"{names.rounds[number]} is charged to data set {names.data.get(entry.data, '?')}: {cost}"


def _cost(event: Event | None) -> str:
    if event is None:
        return "NOT PRIVATE, nothing bounds what it reveals"
    return (
        f"{event.steps} steps with noise {event.noise_multiplier:g} ({event.noise}), rate {event.sampling_rate:g}, "
        f"clip norm {event.clip_norm:g}, for each {event.unit}"
    )


def _committed(names: _Names, _number: int, entry: e.Committed) -> str:
    what = names.rounds.get(entry.reserved, "?")
    return f"{what} has its result: {bytes_text(entry.size)}, SHA-256 {_short(entry.payload)}"


def _sent(names: _Names, _number: int, entry: e.Sent) -> str:
    again = ", once more" if entry.again else ""
    return f"the result of {names.rounds.get(entry.reserved, '?')} is handed to the transport{again}"


def _witnessed(_names: _Names, _number: int, entry: e.HeadWitnessed) -> str:
    return f"a coordinator ({_short(entry.witness)}) has confirmed the journal up to record {entry.sequence}"


def _released(names: _Names, _number: int, entry: e.Released) -> str:
    return f"the adapter of {names.study(entry.plan)} is released (manifest {_short(entry.manifest)})"


def _clock(_names: _Names, _number: int, entry: e.ClockSet) -> str:
    return f"a person confirms the clock, although it stands before {entry.before}"


_TEXTS: dict[type[e.Entry], Callable[[_Names, int, Any], str]] = {
    e.SiteCreated: _created,
    e.KeyRotated: _rotated,
    e.PolicyAdopted: _adopted,
    e.DataRegistered: _registered,
    e.ConsentGiven: _given,
    e.ConsentRevoked: _revoked,
    e.RecordsConsented: _consented,
    e.PlanApproved: _approved,
    e.PlanAccepted: _accepted,
    e.PlanRefused: _refused,
    e.Reserved: _reserved,
    e.Committed: _committed,
    e.Sent: _sent,
    e.HeadWitnessed: _witnessed,
    e.Released: _released,
    e.ClockSet: _clock,
}
