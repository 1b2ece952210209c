"""Composes what a journal charges anew, by three accountants that share no code: PLD, RDP and PRV."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fedtune.errors import PrivacyError
from fedtune.journal.spending import Spent
from fedtune.journal.state import SiteState
from fedtune.privacy.accounting import Event

USUAL_DELTA = 1e-5
MOST_BY_PRV = 50.0  # PRV's grid takes minutes and gigabytes for an ε that protects nobody


@dataclass(frozen=True, slots=True)
class Composition:
    """What one plan (None: all of them) has charged to one account, and its ε at δ.

    `data` are the account's data sets by name. ε is ∞ after a round without privacy, and None where it was not
    computed: by PRV above ε = 50, by all where `problem` says why nothing can be composed.
    """

    account: int
    data: tuple[str, ...]
    plan: str | None
    study: str
    events: tuple[Event, ...]
    not_private: int
    pld: float | None
    rdp: float | None
    prv: float | None
    problem: str = ""


def recompute(state: SiteState, delta: float) -> Iterator[Composition]:
    """Yield, for each account that was charged, each of its plans and then all together.

    Error: `privacy.delta` for a δ that is no probability.
    """
    spending = state.spending
    for account, members in spending.accounts().items():
        plans = spending.plans(account)
        names = tuple(dict.fromkeys(spending.data[member].name for member in members))
        for plan in [*plans, None] if plans else []:
            study = "" if plan is None or plan not in state.accepted else state.accepted[plan].name
            spent = spending.spent(account, plan=plan)
            pld, rdp, prv, problem = _composed(spent, delta)
            yield Composition(account, names, plan, study, spent.events, spent.not_private, pld, rdp, prv, problem)


def _composed(spent: Spent, delta: float) -> tuple[float | None, float | None, float | None, str]:
    try:
        pld, rdp = spent.epsilon(delta), spent.epsilon(delta, "rdp")
    except PrivacyError as error:
        if error.code != "privacy.mixed-units":
            raise
        return None, None, None, f"its rounds protect different units ({', '.join(sorted(spent.units))})"
    return pld, rdp, spent.epsilon(delta, "prv") if rdp <= MOST_BY_PRV or spent.not_private else None, ""
