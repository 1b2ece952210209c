"""`fedtune client policy`: what the site takes part in; checked, shown, put in force."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedtune.commands.options import Format, OutputFormat, Verbose
from fedtune.commands.screen import quiet_libraries
from fedtune_client.commands.plans import read_plan_file
from fedtune_client.commands.shared import KeyFile, Site, Yes, folder_of, opened, outside, show, tell, viewed
from fedtune_client.commands.unlocking import confirm

if TYPE_CHECKING:
    from fedtune.config.plan import StudyPlan
    from fedtune.journal.state import SiteState
    from fedtune_client.folder import SiteFolder
    from fedtune_client.policy.schema import Policy

app = typer.Typer(help="What the site takes part in.", no_args_is_help=True)

PolicyFile = Annotated[
    Path | None, typer.Argument(metavar="[FILE]", help="Else policy.yaml of the site.", show_default=False)
]


@app.command(
    epilog="Exit code: 0 the policy can be adopted, and the plan is inside; 7 the plan is outside; 2 mistakes."
)
def check(
    file: PolicyFile = None,
    *,
    plan: Annotated[
        Path | None, typer.Option(metavar="PLAN", help="Judge this plan by the policy.", show_default=False)
    ] = None,
    site: Site = None,
    output: Format = OutputFormat.text,
    verbose: Verbose = False,
) -> None:
    """Read a policy and name every mistake in it; with a plan, name every reason why it is outside."""
    quiet_libraries(verbose=verbose)
    from fedtune_client.policy.reading import read_policy

    folder = folder_of(site)
    path = file or folder.policy_file
    policy, state = read_policy(path), _state(folder)
    in_force = state is not None and state.policy is not None and state.policy.sha256 == policy.sha256
    judged = None if plan is None else _judged(read_plan_file(plan), policy, state)
    document = {"file": str(path), "sha256": policy.sha256, "in_force": in_force, "plan": judged}
    word = "in force" if in_force else "not in force; put it in force: fedtune client policy adopt"
    show(output, document, [f"{path}: a policy without mistakes, {policy.sha256}; {word}", *_verdict(judged)])
    if judged is not None and judged["reasons"]:
        raise typer.Exit(outside)


@app.command("show")
def show_policy(*, site: Site = None, output: Format = OutputFormat.text, verbose: Verbose = False) -> None:
    """Show the policy in force, and how policy.yaml differs from it."""
    quiet_libraries(verbose=verbose)
    import yaml

    from fedtune_client.policy.reading import read_policy

    seen = viewed(site)
    policy, file = seen.policy, seen.folder.policy_file
    in_file = read_policy(file) if file.exists() else None
    changed = [] if policy is None or in_file is None else differences(policy, in_file)
    document = {
        "sha256": None if policy is None else policy.sha256,
        "policy": None if policy is None else policy.model_dump(mode="json"),
        "file": str(file) if in_file is not None else None,
        "differences": changed,
    }
    if policy is None:
        show(output, document, ["no policy is in force; adopt one: fedtune client policy adopt"])
        return
    text = yaml.safe_dump(policy.model_dump(mode="json"), sort_keys=False, allow_unicode=True).rstrip()
    show(
        output,
        document,
        [f"# in force: {policy.sha256}", text, *_told(changed, f"{file} differs; it is not in force:")],
    )


@app.command()
def adopt(
    file: PolicyFile = None,
    *,
    yes: Yes = False,
    site: Site = None,
    key_file: KeyFile = None,
    output: Format = OutputFormat.text,
    verbose: Verbose = False,
) -> None:
    """Put a policy in force, after showing what it changes; it holds from the next round on, of running studies too."""
    quiet_libraries(verbose=verbose)
    from fedtune_client import operator
    from fedtune_client.policy.reading import read_policy

    folder = folder_of(site)
    policy = read_policy(file or folder.policy_file)
    opened_site = opened(site, key_file)
    before = operator.adopted_policy(opened_site)
    changed = differences(before, policy)
    document = {"sha256": policy.sha256, "adopted": False, "differences": changed}
    if before is not None and before.sha256 == policy.sha256:
        show(output, document, [f"this policy is in force already: {policy.sha256}"])
        return
    tell(output, *_told(changed, "it says:" if before is None else "it changes:"))
    confirm(f"adopt the policy {policy.name} ({policy.sha256[:12]}…)?", yes=yes)
    operator.adopt(opened_site, policy)
    lines = [f"in force: {policy.sha256}", "next: fedtune client consent grant DATA --purpose PURPOSE"]
    show(output, document | {"adopted": True}, lines)


def differences(before: "Policy | None", after: "Policy") -> list[dict[str, Any]]:
    """Return every key whose value is another one, with both; None where the key is not there."""
    old = {} if before is None else _flat(before.model_dump(mode="json"))
    new = _flat(after.model_dump(mode="json"))
    return [
        {"key": key, "before": old.get(key), "after": new.get(key)}
        for key in dict.fromkeys([*new, *old])
        if key not in old or key not in new or old[key] != new[key]
    ]


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return found


def _told(changed: list[dict[str, Any]], heading: str) -> list[str]:
    lines = [f"  {entry['key']}: {_value(entry['before'], entry['after'])}" for entry in changed]
    return [heading, *lines] if lines else []


def _value(before: Any, after: Any) -> str:
    old, new = (json.dumps(value, ensure_ascii=False) for value in (before, after))
    return new if before is None else f"{old} → {new if after is not None else 'not there'}"


def _state(folder: "SiteFolder") -> "SiteState | None":
    """Return what the site's journal says, where there is one: a policy can be checked without a site."""
    return viewed(folder.path).state if any(folder.path.glob("*.journal")) else None


def _judged(plan: "StudyPlan", policy: "Policy", state: "SiteState | None") -> dict[str, Any]:
    from fedtune_client.policy.rules import judge

    data = None if state is None else state.spending.latest(plan.data.name)
    units = None if state is None or data is None else state.spending.data[data].units
    approved = state is not None and plan.sha256 in state.approved
    reasons = judge(plan, policy, approved=approved, units=units)
    found = [
        {"code": entry.code, "found": entry.found, "allowed": entry.allowed, "text": entry.text} for entry in reasons
    ]
    return {"name": plan.name, "sha256": plan.sha256, "inside": not reasons, "reasons": found}


def _verdict(judged: dict[str, Any] | None) -> list[str]:
    if judged is None:
        return []
    name = f"the plan {judged['name']} ({judged['sha256'][:12]}…)"
    if not judged["reasons"]:
        return [f"{name} is inside it; consent and budget: fedtune client budget --forecast PLAN"]
    return [f"{name} is outside it:", *(f"  {entry['text']} [{entry['code']}]" for entry in judged["reasons"])]
