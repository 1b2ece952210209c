"""Whether a site takes part in a study, with every reason against it; and what a round may use if it does.

Decides from the plan, the adopted policy and the journal's views alone: no record is read. Knows no file.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from datetime import datetime

from fedtune.config.plan import StudyPlan
from fedtune.data.units import RECORD
from fedtune.errors import ConsentError, FedtuneError, PolicyError, PrivacyError
from fedtune.journal.ledger import Cap, Ledger
from fedtune.journal.spending import Spent
from fedtune.journal.state import SiteState
from fedtune.privacy.accounting import Event
from fedtune_client.policy.hours import open_now
from fedtune_client.policy.limits import caps as limits
from fedtune_client.policy.rules import judge
from fedtune_client.policy.schema import Policy


@dataclass(frozen=True, slots=True)
class Permit:
    """What a round may use: a registered data set, under a grant, within caps."""

    data: int
    grant: int
    caps: tuple[Cap, ...]


@dataclass(frozen=True, slots=True)
class Objection:
    """One reason against a plan: a stable code, which may leave the site, and a sentence, which stays."""

    code: str
    text: str


def objections(
    plan: StudyPlan, policy: Policy, state: SiteState, ledger: Ledger, now: datetime
) -> tuple[Objection, ...]:
    """Return every reason against a plan: of the policy, of consent, and of the budget for all its rounds.

    The accountant runs only for a plan within the policy's bounds: its work grows with what a plan claims.
    """
    data = state.spending.latest(plan.data.name)
    units = None if data is None else state.spending.data[data].units
    reasons = judge(plan, policy, approved=plan.sha256 in state.approved, units=units)
    found = [Objection(reason.code, reason.text) for reason in reasons]
    try:
        allowed = permit(plan, policy, state, now)
        if not found:
            _require_kept(plan)
            spent = ledger.spent(allowed.data, plan=plan.sha256)
            ledger.require_room(allowed.data, whole_plan(plan, spent), allowed.caps)
    except FedtuneError as error:
        found.append(Objection(error.code, error.message))
    return tuple(found)


def _require_kept(plan: StudyPlan) -> None:
    """Refuse a plan whose noise does not keep its promise over all its steps, whoever wrote it."""
    plan.promise.check()
    if plan.total_steps > plan.promise.max_steps:
        raise PrivacyError(
            "overspends", f"the plan takes {plan.total_steps} steps, its promise covers {plan.promise.max_steps}"
        )


def permit(plan: StudyPlan, policy: Policy, state: SiteState, now: datetime) -> Permit:
    """Return what a round of a plan may use now.

    Errors: `consent.unknown-data` when no data set of that name is registered, `consent.not-granted` without a grant in
    force for the plan's purpose, `consent.other-unit` when the data set's people are not known by the plan's unit, so
    that nobody knows with which other data sets it shares them; `policy.unknown-data` when the policy does not name it.
    """
    data = state.spending.latest(plan.data.name)
    if data is None:
        raise ConsentError(
            "unknown-data",
            f"no data set is registered as {plan.data.name}",
            hint=f"fedtune client consent grant {plan.data.name} --purpose {plan.purpose}",
        )
    grant = state.grant_in_force(data, plan.purpose, now)
    if grant is None:
        raise ConsentError(
            "not-granted",
            f"no grant in force lets {plan.data.name}, as it is registered, serve the purpose {plan.purpose}",
            hint=f"fedtune client consent list; fedtune client consent grant {plan.data.name} --purpose {plan.purpose}",
        )
    known = state.spending.data[data].unit
    if plan.promise.unit not in {RECORD, known}:
        raise ConsentError(
            "other-unit",
            f"{plan.data.name} is registered by its {known}, and the plan is about {plan.promise.unit}",
            hint=f"name that unit first in policy.yaml, adopt it, then: fedtune client consent grant {plan.data.name}",
        )
    return Permit(data, grant, caps(plan, policy, grant, state.grants[grant].epsilon))


def require_open(policy: Policy, now: datetime) -> None:
    """Refuse a round outside the site's opening hours: `policy.closed`."""
    if not open_now(policy, now):
        raise PolicyError("closed", "the site takes no part at this hour", hint="opening_hours in policy.yaml")


def caps(plan: StudyPlan, policy: Policy, grant: int, granted: float | None) -> tuple[Cap, ...]:
    """Return what no charge may pass: the stricter of plan and policy, the lifetime of the data, the grant."""
    limit = limits(plan, policy, plan.data.name)
    by_grant = math.inf if granted is None else granted
    promised = plan.promise
    if promised.mode == "off":  # allowed in so many words, or not admitted; only a grant without a bound covers it
        return (Cap("the grant", by_grant, limit.lifetime_delta, grant=grant),)
    found = [
        ("the study", limit.study_epsilon, limit.study_delta, plan.sha256, None),
        ("the policy, over the lifetime of the data,", limit.lifetime_epsilon, limit.lifetime_delta, None, None),
        ("the grant", by_grant, limit.lifetime_delta, None, grant),
    ]
    known = (promised.event(promised.max_steps), promised.evaluation_event(promised.evaluations))
    return tuple(
        Cap(
            what,
            epsilon,
            delta,
            study,
            permit,
            known if epsilon >= promised.epsilon and delta >= promised.delta else (),
        )
        for what, epsilon, delta, study, permit in found
    )


def whole_plan(plan: StudyPlan, spent: Spent) -> tuple[Event | None, ...]:
    """Return what is left of a study's rounds when nothing goes wrong; None stands for rounds without privacy."""
    promised = plan.promise
    if promised.mode == "off":
        return (None,)
    whole = promised.event(plan.total_steps), promised.evaluation_event(promised.evaluations)
    return tuple(replace(event, steps=max(0, event.steps - _steps(spent, event))) for event in whole)


def _steps(spent: Spent, event: Event) -> int:
    return sum(known.steps for known in spent.events if replace(known, steps=event.steps) == event)
