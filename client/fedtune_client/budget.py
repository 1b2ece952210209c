"""What a site's data sets have spent and what is left, for people: sums over the journal's charges.

The ledger knows one number of an account: ε of everything that was ever reserved, which is what caps are compared with.
Here it is told in two parts. *Spent* is ε of the rounds that were committed, so that their updates may have left;
*reserved* is what the others add to it: rounds that are in training now, or were killed. Nothing of it comes back.
ε of two studies is not the sum of theirs, so what is left does not say that a plan of that ε fits: `forecast` composes.

Knows no file and no terminal; sequences are records' numbers in the journal.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from functools import reduce
from typing import Literal

from fedtune.config.plan import StudyPlan
from fedtune.errors import PrivacyError
from fedtune.journal.entries import Reserved
from fedtune.journal.ledger import Ledger
from fedtune.journal.recompute import USUAL_DELTA
from fedtune.journal.spending import Spent
from fedtune.journal.state import SiteState
from fedtune.privacy.accounting import Event, merge
from fedtune_client.admission import Objection, objections, whole_plan
from fedtune_client.policy.schema import Policy

DeltaOf = Literal["plan", "policy", "default"]


@dataclass(frozen=True, slots=True)
class Study:
    """One plan's part of an account, at δ of that plan where it is known, else at the policy's.

    `rounds` and `evaluations` are those asked for, each once; `charges` every reservation, `open` those of them that
    were never committed. ε is None where `Account.problem` says why nothing can be composed.
    """

    plan: str
    name: str
    epsilon: float | None
    delta: float
    delta_of: DeltaOf
    rounds: int
    evaluations: int
    charges: int
    open: int
    not_private: int
    events: tuple[Event, ...]


@dataclass(frozen=True, slots=True)
class DataSet:
    """A data set of an account: its registrations, how many units the newest has, and what its own cap leaves.

    `cap` is None, and nothing is left, where the policy does not name it.
    """

    name: str
    registrations: tuple[int, ...]
    units: int
    cap: float | None
    left: float


@dataclass(frozen=True, slots=True)
class Account:
    """Data sets that share a budget; `epsilon` = `spent` + `reserved`, at the budget's δ. No charge, no `unit`."""

    number: int
    data: tuple[DataSet, ...]
    unit: str | None
    epsilon: float | None
    spent: float | None
    reserved: float | None
    studies: tuple[Study, ...]
    problem: str = ""

    @property
    def rounds(self) -> int:
        """Rounds of training, over all studies."""
        return sum(study.rounds for study in self.studies)

    @property
    def open(self) -> int:
        """Charges that were never committed."""
        return sum(study.open for study in self.studies)

    @property
    def not_private(self) -> int:
        """Charges without privacy; after one, ε is ∞."""
        return sum(study.not_private for study in self.studies)


@dataclass(frozen=True, slots=True)
class Budget:
    """All accounts of a site, and the policy's data sets that were never granted and have none."""

    delta: float
    delta_of: DeltaOf
    accounts: tuple[Account, ...]
    not_registered: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a plan would come to: ε of its data's account before and after all its rounds, and every reason against it.

    ε is None where it is not composed: for a plan that the policy refuses, and for units that do not compose.
    `needs_approval`: besides, a person has to agree to it.
    """

    plan: str
    name: str
    data: str
    before: float | None
    after: float | None
    delta: float
    cap: float | None
    study_after: float | None
    study_delta: float | None
    needs_approval: bool
    reasons: tuple[Objection, ...]

    @property
    def allowed(self) -> bool:
        """Whether nothing but a missing approval stands against it."""
        return not self.reasons


def budget(state: SiteState, policy: Policy | None, plans: Mapping[str, StudyPlan] | None = None) -> Budget:
    """Return what was spent and what is left; `plans` by their hashes, for each study's own δ."""
    delta, delta_of = _delta(policy)
    accounts = tuple(
        _account(number, members, state, policy, plans or {})
        for number, members in sorted(state.spending.accounts().items())
    )
    known = {entry.name for entry in state.spending.data.values()}
    named = () if policy is None else tuple(sorted(set(policy.data) - known))
    return Budget(delta, delta_of, accounts, named)


def forecast(plan: StudyPlan, state: SiteState, policy: Policy, ledger: Ledger, now: datetime) -> Forecast:
    """Return what would be spent by all rounds of a plan that are still to come, and every reason against it."""
    approved = plan.sha256 in state.approved
    agreed = replace(state, approved={**state.approved, plan.sha256: ""})
    reasons = objections(plan, policy, agreed, ledger, now)
    allowed = policy.data.get(plan.data.name)
    promised, delta = plan.promise, policy.privacy.delta
    before = after = study = None
    if not any(reason.code.startswith("policy.") for reason in reasons):
        data = state.spending.latest(plan.data.name)
        account, own = (Spent(), Spent()) if data is None else _both(ledger, data, plan)
        coming = whole_plan(plan, own)
        before, after = _epsilon(account, delta), _epsilon(reduce(Spent.plus, coming, account), delta)
        study = _epsilon(reduce(Spent.plus, coming, own), promised.delta or delta)
    return Forecast(
        plan=plan.sha256,
        name=plan.name,
        data=plan.data.name,
        before=before,
        after=after,
        delta=delta,
        cap=None if allowed is None else allowed.lifetime_epsilon,
        study_after=study,
        study_delta=promised.delta or None,
        needs_approval=policy.require_approval and not approved,
        reasons=reasons,
    )


def _both(ledger: Ledger, data: int, plan: StudyPlan) -> tuple[Spent, Spent]:
    return ledger.spent(data), ledger.spent(data, plan=plan.sha256)


def _delta(policy: Policy | None) -> tuple[float, DeltaOf]:
    return (USUAL_DELTA, "default") if policy is None else (policy.privacy.delta, "policy")


def _account(
    number: int, members: tuple[int, ...], state: SiteState, policy: Policy | None, plans: Mapping[str, StudyPlan]
) -> Account:
    charges = {at: entry for at, entry in state.spending.reserved.items() if entry.data in members}
    delta, _ = _delta(policy)
    whole = _total(charges.values())
    total = _epsilon(whole, delta)
    spent = _epsilon(_total(entry for at, entry in charges.items() if at in state.committed), delta)
    units = sorted(whole.units)
    return Account(
        number,
        _data_sets(members, state, policy, total),
        units[0] if len(units) == 1 else None,
        total,
        spent,
        _difference(total, spent),
        tuple(_study(plan, charges, state, policy, plans) for plan in state.spending.plans(number)),
        f"rounds that protect different units ({', '.join(units)}) have no common ε" if len(units) > 1 else "",
    )


def _data_sets(
    members: tuple[int, ...], state: SiteState, policy: Policy | None, total: float | None
) -> tuple[DataSet, ...]:
    registered: dict[str, list[int]] = {}
    for member in members:
        registered.setdefault(state.spending.data[member].name, []).append(member)
    found = []
    for name, numbers in registered.items():
        allowed = None if policy is None else policy.data.get(name)
        cap = None if allowed is None else allowed.lifetime_epsilon
        left = 0.0 if cap is None or total is None else max(0.0, cap - total)
        found.append(DataSet(name, tuple(numbers), state.spending.data[numbers[-1]].units, cap, left))
    return tuple(found)


def _study(
    plan: str,
    charges: Mapping[int, Reserved],
    state: SiteState,
    policy: Policy | None,
    plans: Mapping[str, StudyPlan],
) -> Study:
    own = {at: entry for at, entry in charges.items() if entry.plan == plan}
    known = plans.get(plan)
    delta, delta_of = _delta(policy)
    if known is not None and known.promise.mode == "dp":
        delta, delta_of = known.promise.delta, "plan"
    spent = _total(own.values())
    return Study(
        plan=plan,
        name=_name(plan, state, known),
        epsilon=_epsilon(spent, delta),
        delta=delta,
        delta_of=delta_of,
        rounds=len({entry.round for entry in own.values() if entry.purpose == "training"}),
        evaluations=len({entry.round for entry in own.values() if entry.purpose == "metrics"}),
        charges=len(own),
        open=sum(at not in state.committed for at in own),
        not_private=spent.not_private,
        events=spent.events,
    )


def _name(plan: str, state: SiteState, known: StudyPlan | None) -> str:
    if known is not None:
        return known.name
    said = state.accepted.get(plan) or state.refused.get(plan)
    return "" if said is None else said.name


def _total(entries: Iterable[Reserved]) -> Spent:
    found = [entry.mechanism() for entry in entries]
    events = [event for event in found if event is not None]
    return Spent(merge(events), len(found) - len(events))


def _epsilon(spent: Spent, delta: float) -> float | None:
    """Compose by PLD; None where the events protect different units."""
    try:
        return spent.epsilon(delta)
    except PrivacyError as error:
        if error.code != "privacy.mixed-units":
            raise
        return None


def _difference(total: float | None, spent: float | None) -> float | None:
    if total is None or spent is None:
        return None
    return 0.0 if math.isinf(spent) else max(0.0, total - spent)
