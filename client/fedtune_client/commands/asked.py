"""`fedtune client asked`: the plans that wait for a person, or that the site refuses, each with the reason."""

from typing import TYPE_CHECKING, Any

from fedtune.commands.options import Format, OutputFormat, Verbose
from fedtune.commands.screen import quiet_libraries
from fedtune_client.commands.shared import Site, add, show, table, viewed

if TYPE_CHECKING:
    from fedtune_client.asked import Asked
    from fedtune_client.policy.schema import Policy
    from fedtune_client.view import SiteView

_SHOWN = 12


def asked(*, site: Site = None, output: Format = OutputFormat.text, verbose: Verbose = False) -> None:
    """List the plans that a coordinator has asked this site for and that it takes no part in, newest first.

    The reasons are those of now, by the policy in force, the grants and the budget. Needs no secret.
    """
    quiet_libraries(verbose=verbose)
    from fedtune_client.asked import all_asked

    seen = viewed(site)
    document = [_entry(seen, one) for one in all_asked(seen.folder)]
    if not document:
        show(output, document, ["no plan waits: none was asked for that the site did not take part in"])
        return
    made = table("plan", "study", "data", "asked (UTC)", "stands against it")
    for entry in document:
        reasons = "\n".join(f"{reason['text']} [{reason['code']}]" for reason in entry["reasons"])
        add(made, entry["plan"][:_SHOWN], entry["name"], entry["data"], entry["at"], reasons or "nothing any more")
    lines = ["read one and agree to it: fedtune client approve PLAN (its first digits)"]
    show(output, document, [made, *lines])


def _entry(seen: "SiteView", one: "Asked") -> dict[str, Any]:
    plan = one.plan
    return {
        "plan": plan.sha256,
        "name": plan.name,
        "purpose": plan.purpose,
        "data": plan.data.name,
        "privacy": plan.promise.statement,
        "at": f"{one.at:%Y-%m-%d %H:%M}",
        "reasons": _reasons(seen, one),
    }


def _reasons(seen: "SiteView", one: "Asked") -> list[dict[str, str]]:
    from fedtune_client.commands.budget import forecast_of

    if seen.policy is None:
        return [{"code": "policy.not-adopted", "text": "the site has adopted no policy"}]
    coming = forecast_of(seen, one.plan)
    found = [{"code": reason.code, "text": reason.text} for reason in coming.reasons]
    if coming.needs_approval:
        found.append({"code": "policy.not-approved", "text": "a person has to agree to it"})
    return [*found, *_elsewhere(seen, one, seen.policy)]


def _elsewhere(seen: "SiteView", one: "Asked", policy: "Policy") -> list[dict[str, str]]:
    """Return what policy and budget do not say: the hour, and a base model that the site does not have."""
    from datetime import UTC, datetime

    from fedtune.errors import FedtuneError
    from fedtune_client.admission import require_open
    from fedtune_client.machine import base_of

    found = []
    try:
        require_open(policy, datetime.now(UTC))
        base_of(one.plan.model, seen.folder.facts())
    except FedtuneError as error:
        found.append({"code": error.code, "text": error.message})
    return found
