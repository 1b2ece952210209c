"""What a journal can say: one frozen model a kind, and nothing else.

No entry holds text of a record, a label or the content of a file; what identifies data is a hash, and counts are
rounded. An entry that names another does so by that record's sequence number. Knows no signature and no file.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedtune.errors import FedtuneError, JournalError
from fedtune.privacy.accounting import Event

Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Signature = Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]
SiteName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Text = Annotated[str, Field(max_length=1000)]
Sequence = Annotated[int, Field(ge=0, lt=2**53)]
Moment = Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{6})?Z$")]
Purpose = Literal["training", "metrics"]


class Entry(BaseModel):
    """One statement of a site; `kind` is how the journal spells it."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
    kind: ClassVar[str]


class SiteCreated(Entry):
    """The site begins, with the key that signs from here on."""

    kind = "site-created"
    site: SiteName
    public_key: Hash


class KeyRotated(Entry):
    """A new key signs every later record; `proof` is its signature over the old key, so nobody adopts a foreign key."""

    kind = "key-rotated"
    public_key: Hash
    proof: Signature


class PolicyAdopted(Entry):
    """The site acts by this policy from here on; `policy` is the whole text as data, `sha256` that of its JCS form."""

    kind = "policy-adopted"
    sha256: Hash
    policy: dict[str, Any]


class DataRegistered(Entry):
    """A data set by its content; `joins` are earlier registrations whose units it may share."""

    kind = "data-registered"
    name: SiteName
    fingerprint: Hash
    unit: Text
    units: int = Field(ge=0)
    population: Hash
    joins: tuple[Sequence, ...] = Field(strict=False)


class ConsentGiven(Entry):
    """A registered data set may serve a purpose, up to an ε (None: whatever the policy allows), until a moment."""

    kind = "consent-given"
    data: Sequence
    fingerprint: Hash
    purpose: SiteName
    epsilon: float | None = Field(gt=0)
    expires: Moment | None


class ConsentRevoked(Entry):
    """A grant ends now."""

    kind = "consent-revoked"
    grant: Sequence
    reason: Text


class RecordsConsented(Entry):
    """Which records of a data set take part from here on: the hash of the rule and its source, and a rounded count."""

    kind = "records-consented"
    data: Sequence
    source: Hash
    units: int = Field(ge=0)


class PlanApproved(Entry):
    """A person agrees to a plan."""

    kind = "plan-approved"
    plan: Hash
    by: Text


class PlanAccepted(Entry):
    """The site takes part in a study, under the policy of that hash."""

    kind = "plan-accepted"
    plan: Hash
    name: SiteName
    policy: Hash


class PlanRefused(Entry):
    """The site does not take part, for all these reasons (codes)."""

    kind = "plan-refused"
    plan: Hash
    name: SiteName
    reasons: tuple[Text, ...] = Field(strict=False)


class Reserved(Entry):
    """What a round can spend at most, charged before a record is drawn; `event` is None for a study without privacy.

    `input` is the hash of what the round starts from, `data` the registration it reads, `grant` the consent for it.
    """

    kind = "reserve"
    plan: Hash
    round: int = Field(ge=0)
    purpose: Purpose
    input: Hash
    data: Sequence
    grant: Sequence
    event: dict[str, Any] | None

    def mechanism(self) -> Event | None:
        """Return the event; JSON has one kind of number, so its floats are made floats again."""
        if self.event is None:
            return None
        floats = {name: float(self.event[name]) for name in _FLOATS if isinstance(self.event.get(name), int)}
        return Event.from_dict({**self.event, **floats})


class Committed(Entry):
    """A reserved round has produced what will be sent: its hash and size in bytes."""

    kind = "commit"
    reserved: Sequence
    payload: Hash
    size: int = Field(ge=0)


class Sent(Entry):
    """A committed payload is handed to the transport; `again` when the coordinator asked once more."""

    kind = "update-sent"
    reserved: Sequence
    again: bool


class HeadWitnessed(Entry):
    """A coordinator has countersigned the record at `sequence`; all of its receipt, so that anybody can check it."""

    kind = "head-witnessed"
    sequence: Sequence
    digest: Hash
    head_signature: Signature
    witness: Hash
    signature: Signature


class Released(Entry):
    """A study's adapter was released with this manifest."""

    kind = "release"
    plan: Hash
    manifest: Hash


class ClockSet(Entry):
    """A person confirms the clock although it stands before an earlier record's time."""

    kind = "clock-set"
    before: Moment


_FLOATS = ("noise_multiplier", "sampling_rate", "clip_norm")
KINDS: dict[str, type[Entry]] = {
    entry.kind: entry
    for entry in (
        SiteCreated,
        KeyRotated,
        PolicyAdopted,
        DataRegistered,
        ConsentGiven,
        ConsentRevoked,
        RecordsConsented,
        PlanApproved,
        PlanAccepted,
        PlanRefused,
        Reserved,
        Committed,
        Sent,
        HeadWitnessed,
        Released,
        ClockSet,
    )
}


def read_entry(kind: object, fields: object) -> Entry:
    """Return the entry of a kind, or refuse what no journal says: `journal.unknown-entry`."""
    model = KINDS.get(kind) if isinstance(kind, str) else None
    if model is None or not isinstance(fields, dict):
        raise JournalError("unknown-entry", "a record is of no known kind", hint="read it with a newer fedtune")
    try:
        entry = model.model_validate(fields)
        if isinstance(entry, Reserved):
            hash(entry.mechanism())  # an event that cannot be composed is none
    except (ValidationError, FedtuneError, ValueError, TypeError, OverflowError) as error:
        raise JournalError("unknown-entry", f"a record of kind {kind} does not have its fields") from error
    return entry
