"""`fedtune client budget`: what each data set has spent, what is left of it, and what a plan would come to."""

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedtune.commands.options import Format, OutputFormat, Verbose
from fedtune.commands.screen import quiet_libraries
from fedtune.errors import PolicyError
from fedtune_client.commands.plans import read_plan_file
from fedtune_client.commands.shared import Site, add, number, outside, show, table, viewed

if TYPE_CHECKING:
    from fedtune.config.plan import StudyPlan
    from fedtune_client.budget import Account, Budget, DataSet, Forecast, Study
    from fedtune_client.view import SiteView

deltas = {"plan": "its plan's", "policy": "the policy's", "default": "the usual one: no policy is in force"}


def budget(
    *,
    forecast: Annotated[
        Path | None,
        typer.Option(metavar="PLAN", help="What this plan would come to, and whether it may.", show_default=False),
    ] = None,
    plan: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="PLAN", help="A study's plan, to state its ε at its own δ; repeat it.", show_default=False
        ),
    ] = None,
    site: Site = None,
    output: Format = OutputFormat.text,
    verbose: Verbose = False,
) -> None:
    """Show what each data set has spent over all studies, and what is left under its lifetime cap.

    Composed anew from the journal each time. Data sets that may hold the same people share one budget.
    """
    quiet_libraries(verbose=verbose)
    from fedtune_client.budget import budget as summed

    seen = viewed(site)
    asked = None if forecast is None else read_plan_file(forecast)
    known = [read_plan_file(path) for path in plan or []] + ([] if asked is None else [asked])
    found = summed(seen.state, seen.policy, {entry.sha256: entry for entry in known})
    coming = None if asked is None else forecast_of(seen, asked)
    document = _document(seen, found) | {"forecast": None if coming is None else forecast_document(coming)}
    show(output, document, [*_lines(seen, found), *([] if coming is None else forecast_lines(coming))])
    if coming is not None and not coming.allowed:
        raise typer.Exit(outside)


def forecast_of(seen: "SiteView", plan: "StudyPlan") -> "Forecast":
    """Return what a plan would come to at a site, by the policy in force."""
    from fedtune_client.budget import forecast

    policy = seen.policy
    if policy is None:
        raise PolicyError("not-adopted", "the site has adopted no policy", hint="fedtune client policy adopt")
    return forecast(plan, seen.state, policy, seen.ledger, datetime.now(UTC))


def forecast_document(coming: "Forecast") -> dict[str, Any]:
    """Return a forecast for programs."""
    numbers = ("before", "after", "cap", "study_after")
    return {
        **{name: number(getattr(coming, name)) for name in numbers},
        **{name: getattr(coming, name) for name in ("plan", "name", "data", "delta", "study_delta", "needs_approval")},
        "allowed": coming.allowed,
        "reasons": [{"code": reason.code, "text": reason.text} for reason in coming.reasons],
    }


def forecast_lines(coming: "Forecast") -> Iterator[str]:
    """Yield a forecast for people."""
    from fedtune.display import epsilon_text

    yield f"the plan {coming.name} ({coming.plan[:12]}…) on {coming.data}, with all its rounds:"
    if coming.after is not None:
        cap = "" if coming.cap is None else f", of at most {coming.cap:g}"
        before, after = epsilon_text(coming.before), epsilon_text(coming.after)
        yield f"  the data's ε would go from {before} to {after}{cap} (δ = {coming.delta:g})"
        if coming.study_delta is not None:
            yield f"  the study's own ε would be {epsilon_text(coming.study_after)} (δ = {coming.study_delta:g})"
    if coming.allowed:
        yield "  policy, consent and budget allow it"
    for reason in coming.reasons:
        yield f"  against it: {reason.text} [{reason.code}]"
    if coming.needs_approval:
        yield f"  a person has to agree to it: fedtune client approve PLAN ({coming.plan[:12]}…)"


def _document(seen: "SiteView", found: "Budget") -> dict[str, Any]:
    return {
        "site": seen.state.site,
        "records": seen.chain.length,
        "time": seen.chain.time,
        "key_checked": seen.key_checked,
        "policy": None if seen.state.policy is None else seen.state.policy.sha256,
        "delta": found.delta,
        "delta_of": found.delta_of,
        "accounts": [_account(account) for account in found.accounts],
        "not_registered": list(found.not_registered),
    }


def _account(account: "Account") -> dict[str, Any]:
    return {
        "account": account.number,
        "unit": account.unit,
        "epsilon": number(account.epsilon),
        "spent": number(account.spent),
        "reserved": number(account.reserved),
        "rounds": account.rounds,
        "open": account.open,
        "not_private": account.not_private,
        "problem": account.problem,
        "data": [_data_set(data) for data in account.data],
        "studies": [_study(study) for study in account.studies],
    }


def _data_set(data: "DataSet") -> dict[str, Any]:
    named = {"name": data.name, "registrations": list(data.registrations), "units": data.units}
    return named | {"cap": number(data.cap), "left": number(data.left)}


def _study(study: "Study") -> dict[str, Any]:
    plain = ("plan", "name", "delta", "delta_of", "rounds", "evaluations", "charges", "open", "not_private")
    found = {name: getattr(study, name) for name in plain}
    return found | {"epsilon": number(study.epsilon), "events": [event.to_dict() for event in study.events]}


def _lines(seen: "SiteView", found: "Budget") -> Iterator[object]:
    yield f"{seen.state.site}: {seen.chain.length:,} records, the last of {seen.chain.time}"
    if not seen.key_checked:
        yield "there is no public.key beside the journal: the key that it names itself was believed"
    if found.accounts:
        yield from _tables(found)
    for account in found.accounts:
        if account.problem:
            yield f"account {account.number}: {account.problem}; nothing more is charged to it"
    for name in found.not_registered:
        yield f"{name} is in the policy and was never granted: fedtune client consent grant {name} --purpose PURPOSE"
    if not found.accounts and not found.not_registered:
        yield "no data set was ever granted: fedtune client consent grant DATA --purpose PURPOSE"


def _tables(found: "Budget") -> Iterator[object]:
    from fedtune.display import epsilon_text

    yield f"ε of everything, at δ = {found.delta:g} ({deltas[found.delta_of]}):"
    counts = ("spent", "reserved", "left", "of", "studies", "rounds", "not private")
    made = table("account", "data", "unit", *counts, numbers=("account", *counts))
    for account in found.accounts:
        spent = epsilon_text(account.spent), epsilon_text(account.reserved)
        rounds = f"{account.rounds:,}", str(account.not_private or "-")
        for data in account.data:
            left = ("0.000", "not in the policy") if data.cap is None else (_left(data.left), f"{data.cap:g}")
            unit = account.unit or "-"
            add(made, account.number, data.name, unit, *spent, *left, len(account.studies), *rounds)
    yield made
    studies = [(account, study) for account in found.accounts for study in account.studies]
    if studies:
        counts = ("account", "ε", "rounds", "metrics", "charges", "open", "not private")
        made = table("account", "study", "plan", "ε", "δ", *counts[2:], numbers=counts)
        for account, study in studies:
            add(made, account.number, *_study_cells(study))
        yield made
    yield "open: charged and not committed. A study's δ is its plan's where --plan PLAN names it, else the policy's."
    yield "spent: committed, so that it may have left; reserved: what rounds in training or killed add. None returns."
    yield "ε of two studies is not their sum: whether a plan fits is shown by --forecast PLAN."


def _study_cells(study: "Study") -> list[str]:
    from fedtune.display import epsilon_text

    delta = f"{study.delta:g} ({study.delta_of})"
    counts = (study.rounds, study.evaluations, study.charges, study.open, study.not_private)
    return [study.name or "-", study.plan[:12], epsilon_text(study.epsilon), delta, *(f"{n:,}" for n in counts)]


def _left(left: float) -> str:
    """Three decimals, rounded down: more is never shown than is left."""
    import math

    return f"{math.floor(left * 1000) / 1000:.3f}"
