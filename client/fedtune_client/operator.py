"""What a site's operator decides: adopt a policy, grant and revoke a data set, approve a plan, change the key.

Each is one signed record; nothing here reads a record of data but `grant`, which has to know what it grants. Commands
are thin over these functions.
"""

from __future__ import annotations

from datetime import UTC, datetime

from fedtune.config.plan import StudyPlan
from fedtune.data.opt_in import allowed_rows
from fedtune.errors import ConsentError, PolicyError
from fedtune.journal.chain import moment, public_hex, rotation_statement
from fedtune.journal.entries import (
    ClockSet,
    ConsentGiven,
    ConsentRevoked,
    DataRegistered,
    KeyRotated,
    PlanApproved,
    PolicyAdopted,
)
from fedtune.run.files import write_whole
from fedtune_client.facts import open_table
from fedtune_client.folder import OpenSite
from fedtune_client.policy.schema import DataPolicy, Policy
from fedtune_client.populations import register
from fedtune_client.records import rule_of
from fedtune_client.vault import add_signing_key, signing_key


def adopted_policy(site: OpenSite) -> Policy | None:
    """Return the policy in force, None before the first was adopted."""
    with site.journal as journal:
        found = journal.state.policy
    return None if found is None else Policy.model_validate(found.policy)


def adopt(site: OpenSite, policy: Policy) -> bool:
    """Put a policy in force; return False when it is in force already."""
    with site.journal as journal:
        known = journal.state.policy
        if known is not None and known.sha256 == policy.sha256:
            return False
        journal.append(PolicyAdopted(sha256=policy.sha256, policy=policy.model_dump(mode="json")))
    return True


def grant(site: OpenSite, name: str, purpose: str, epsilon: float | None, expires: datetime | None) -> int:
    """Register what a data set holds now, let it serve a purpose up to an ε until a moment; return the grant's number.

    Errors: `policy.not-adopted`; `consent.outside-policy` for a data set or purpose that the policy does not name, or
    an ε above its lifetime cap; `consent.expired` for a moment that has passed; those of reading the data and of its
    consent rule, which must be one that can be applied.
    """
    allowed = _allowed(site, name, purpose, epsilon)
    now = datetime.now(UTC)
    if expires is not None and expires <= now:
        raise ConsentError("expired", f"a grant until {moment(expires)} is over already", hint="name a later moment")
    table = open_table(site.facts, name).table
    rule = rule_of(allowed, site.folder.path)
    if rule is not None:
        allowed_rows(table, rule)
    with site.journal as journal:
        known = dict(journal.state.spending.data)
    entry = register(site.folder.populations, table, name, unit_of(allowed), site.pseudonym_key, known)
    with site.journal as journal:
        if known.keys() != journal.state.spending.data.keys():  # another grant came between: it may share units
            known = journal.state.spending.data
            entry = register(site.folder.populations, table, name, unit_of(allowed), site.pseudonym_key, known)
        number = _registered(site, entry)
        until = None if expires is None else moment(expires)
        given = ConsentGiven(
            data=number, fingerprint=entry.fingerprint, purpose=purpose, epsilon=epsilon, expires=until
        )
        (record,) = journal.append(given)
    return record.sequence


def revoke(site: OpenSite, grant_number: int, reason: str) -> None:
    """End a grant now; a round that is in training ends, none begins. Error: `consent.no-grant`."""
    with site.journal as journal:
        state = journal.state
        if grant_number not in state.grants or grant_number in state.revoked:
            hint = "fedtune client consent list"
            raise ConsentError("no-grant", f"there is no grant {grant_number} in force", hint=hint)
        journal.append(ConsentRevoked(grant=grant_number, reason=reason))


def approve(site: OpenSite, plan: StudyPlan, by: str) -> bool:
    """Agree to a plan by its hash; return False when that was done before."""
    with site.journal as journal:
        if plan.sha256 in journal.state.approved:
            return False
        journal.append(PlanApproved(plan=plan.sha256, by=by))
    return True


def rotate_key(site: OpenSite) -> str:
    """Put a new signing key in force and return its public half; the old one stays in the vault, to read old records.

    A kill between the vault and the journal leaves a key that is not in force, which the next rotation takes up.
    """
    with site.journal as journal:
        newest = signing_key(site.vault)
        old = journal.chain.public_key
        signer = newest if public_hex(newest) != old else add_signing_key(site.vault)
        proof = signer.sign(rotation_statement(old)).hex()
        journal.rotate(signer, KeyRotated(public_key=public_hex(signer), proof=proof))
    write_whole(site.folder.public_key_file, (public_hex(signer) + "\n").encode())
    return public_hex(signer)


def accept_clock(site: OpenSite) -> None:
    """Confirm the clock although it stands before the journal's last record."""
    with site.journal as journal:
        journal.append(ClockSet(before=journal.chain.time))


def unit_of(data: DataPolicy) -> str:
    """Return the unit whose ids identify a data set's people: the first column that the policy names, else records."""
    return next((unit for unit in data.units if unit != "record"), "record")


def _allowed(site: OpenSite, name: str, purpose: str, epsilon: float | None) -> DataPolicy:
    policy = adopted_policy(site)
    if policy is None:
        raise PolicyError("not-adopted", "the site has adopted no policy", hint="fedtune client policy adopt")
    allowed = policy.data.get(name)
    hint = "change policy.yaml, then fedtune client policy adopt"
    if allowed is None:
        raise ConsentError("outside-policy", f"the policy does not name a data set {name}", hint=hint)
    if purpose not in allowed.purposes:
        named = ", ".join(allowed.purposes) or "none"
        raise ConsentError("outside-policy", f"the policy lets {name} serve {named}, not {purpose}", hint=hint)
    if epsilon is not None and epsilon > allowed.lifetime_epsilon:
        text = f"the policy allows {name} ε = {allowed.lifetime_epsilon:g} over its lifetime, not {epsilon:g}"
        raise ConsentError("outside-policy", text, hint=hint)
    return allowed


def _registered(site: OpenSite, entry: DataRegistered) -> int:
    """Return the registration of this content and its people under this name, added if it is not there.

    A policy that names another unit since identifies other people in the same content, and so is another registration.
    """
    spending = site.journal.state.spending
    latest = spending.latest(entry.name)
    if latest is not None and _same(spending.data[latest], entry):
        return latest
    (record,) = site.journal.append(entry)
    return record.sequence


def _same(known: DataRegistered, entry: DataRegistered) -> bool:
    return (known.fingerprint, known.unit, known.population) == (entry.fingerprint, entry.unit, entry.population)
