"""`fedtune client approve`: a person reads what a plan asks for, and agrees to it by its hash."""

import getpass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedtune.commands.options import Format, OutputFormat, Verbose
from fedtune.commands.screen import quiet_libraries
from fedtune.errors import ConfigError
from fedtune_client.commands.budget import forecast_document, forecast_lines, forecast_of
from fedtune_client.commands.plans import PlanOrHash, find_plan
from fedtune_client.commands.shared import KeyFile, Site, Yes, folder_of, opened, show, tell, viewed
from fedtune_client.commands.unlocking import confirm

if TYPE_CHECKING:
    from fedtune.config.plan import StudyPlan

metrics = {
    "off": "nothing leaves the site",
    "noisy": "means over held-out units, with noise that ε covers",
    "coarse": "means over held-out units, rounded; NO ε COVERS THEM",
    "clear": "exact counts of held-out records; NO ε COVERS THEM",
}


def approve(  # noqa: PLR0913 - a command's options
    plan: PlanOrHash,
    *,
    by: Annotated[str, typer.Option(metavar="NAME", help="Who agrees; else who runs this.", show_default=False)] = "",
    yes: Yes = False,
    site: Site = None,
    key_file: KeyFile = None,
    output: Format = OutputFormat.text,
    verbose: Verbose = False,
) -> None:
    """Show what a plan asks for, and agree to exactly this plan: one that differs in anything has another hash.

    Agreeing overrules nothing: policy, consent and budget are asked all the same, in every round.
    """
    quiet_libraries(verbose=verbose)
    from fedtune_client import operator

    asked, name = find_plan(plan, folder_of(site)), _name(by)
    opened_site = opened(site, key_file)
    coming = forecast_of(viewed(site), asked)
    asks = summary(asked)
    tell(output, f"the plan {asked.sha256} asks for:", *(f"  {what}: {text}" for what, text in asks.items()))
    tell(output, *[line for line in forecast_lines(coming) if "fedtune client approve" not in line])
    document = {
        "plan": asked.sha256,
        "by": name,
        "asks": asks,
        "approved": asked.sha256 in _approved(opened_site),
        "new": False,
        "forecast": forecast_document(coming),
    }
    if document["approved"]:
        show(output, document, ["this plan was approved before"])
        return
    confirm(f"does {name} agree to this plan?", yes=yes)
    operator.approve(opened_site, asked, name)
    show(output, document | {"approved": True, "new": True}, [f"approved by {name}: {asked.sha256}"])


def summary(plan: "StudyPlan") -> dict[str, str]:
    """Return what a plan asks for, in words."""
    from fedtune.display import bytes_text

    promised, federation = plan.promise, plan.federation
    labels = f", {len(plan.task.labels)} labels" if plan.task.labels else ""
    targets = plan.lora.targets if isinstance(plan.lora.targets, str) else ", ".join(plan.lora.targets)
    told = metrics[plan.evaluation.site_metrics]
    return {
        "study": plan.name,
        "purpose": plan.purpose,
        "data set": f"{plan.data.name}; it reads the columns {', '.join(_columns(plan))}",
        "task": f"{plan.task.kind}{labels}",
        "privacy": promised.statement,
        **_noise(plan),
        "work": f"{federation.rounds} rounds of {plan.training.local_steps} steps, with {federation.sites} sites",
        "base model": f"{plan.model.name} ({plan.model.sha256})",
        "adapter": f"rank {plan.lora.rank} on {targets}, by {plan.aggregation.algorithm}; "
        f"{bytes_text(plan.adapter.upload_bytes)} leave the site a round",
        "held-out metrics": f"{plan.evaluation.site_metrics}: {told}",
    }


def _columns(plan: "StudyPlan") -> list[str]:
    unit = [] if plan.promise.unit == "record" else [plan.promise.unit]
    return list(dict.fromkeys([*plan.task.used, *unit]))


def _noise(plan: "StudyPlan") -> dict[str, str]:
    promised = plan.promise
    if promised.mode == "off":
        return {}
    source = "cryptographic" if promised.noise == "secure" else "seeded: WHOEVER KNOWS THE PLAN CAN REMOVE IT"
    return {
        "noise": f"{promised.noise_multiplier:.4g} times the clip norm {promised.clip_norm:g}, in every step ({source})"
    }


def _name(by: str) -> str:
    name = by.strip() or getpass.getuser()
    if len(name) > 200 or not name.isprintable():  # noqa: PLR2004 - a name, not a text
        raise ConfigError("bad-name", "--by must be a name of at most 200 characters", hint="--by 'A. Person'")
    return name


def _approved(opened_site: Any) -> dict[str, str]:
    with opened_site.journal as journal:
        return dict(journal.state.approved)
