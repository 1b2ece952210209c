"""`fedtune server submit`: a study is handed to the coordinator, as a plan that exists or as settings."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedtune.commands.asking import confirm
from fedtune.commands.options import ConfigFile, Format, OutputFormat, Verbose, complete_override
from fedtune.commands.screen import quiet_libraries
from fedtune.errors import ConfigError
from fedtune_server.commands.shared import Dir, OpenCoordinator, Yes, opened, show, tell

if TYPE_CHECKING:
    from fedtune.config.machine import Machine
    from fedtune.config.plan import StudyPlan

longest = 4_000_000  # bytes: a plan has at most a million characters


def submit(  # noqa: PLR0913 - a command's options
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[STUDY] [KEY=VALUE]...",
            help="STUDY is a plan.json or a run folder, and is run unchanged; else the study is what the keys say.",
            autocompletion=complete_override,
            show_default=False,
        ),
    ] = None,
    *,
    config: ConfigFile = None,
    sites: Annotated[
        str,
        typer.Option(metavar="A,B,C", help="The sites that take part; else all that are enrolled.", show_default=False),
    ] = "",
    yes: Yes = False,
    folder: Dir = None,
    output: Format = OutputFormat.text,
    verbose: Verbose = False,
) -> None:
    """Submit a study: a coordinator that runs starts it, and goes on with it after any death until it has ended.

    A plan of a simulation on files is run unchanged, with the same hash. Otherwise the study is resolved apart from any
    record: its settings must then say what a simulation finds in them, and are named if they do not.
    """
    quiet_libraries(verbose=verbose)
    from fedtune_server.studies.preparing import choose_sites
    from fedtune_server.studies.store import StudyStore

    coordinator = opened(folder)
    store = StudyStore(coordinator.folder)
    given, changes = _split(overrides or [])
    if given is not None and (changes or config is not None):
        hint = "leave the keys away, or resolve another plan: fedtune plan --format json"
        raise ConfigError("conflict", f"{given} is a plan, and nothing in it can be changed", hint=hint)
    plan, machine, warnings = (
        _composed(coordinator, changes, config) if given is None else _planned(coordinator, read_plan(given))
    )
    store.require_new(plan)
    chosen = choose_sites(plan, coordinator.enrolment.members, _names(sites))
    document = _document(plan, machine, chosen, coordinator, warnings)
    tell(output, *_lines(document))
    confirm(f"submit {plan.name} to {', '.join(chosen)}?", yes=yes)
    store.submit(plan, chosen, machine)
    show(output, document, _next(document))


def read_plan(path: Path) -> "StudyPlan":
    """Return the plan in a plan.json, a run folder, or what `fedtune plan --format json` has printed.

    Errors: `config.no-plan`, `config.bad-plan`.
    """
    from fedtune.config.canonical import canonical_json
    from fedtune.config.plan import StudyPlan

    file = path / "plan.json" if path.is_dir() else path
    try:
        with file.open("rb") as opened_file:
            text = opened_file.read(longest + 1).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = "it is not text" if isinstance(error, UnicodeDecodeError) else error.strerror
        hint = "name a plan.json or a run folder; a study's file is given with --config FILE"
        raise ConfigError("no-plan", f"{file} cannot be read as a plan ({reason})", hint=hint) from error
    try:
        found = json.loads(text)
        if isinstance(found, dict) and {"plan", "plan_sha256"} <= found.keys():
            text = canonical_json(found["plan"])
    except (ValueError, RecursionError):
        pass  # `from_json` says what is wrong
    return StudyPlan.from_json(text)


def _split(words: list[str]) -> tuple[Path | None, list[str]]:
    """Return the path of a plan, if the first word is one, and the overrides."""
    if words and ("=" not in words[0] or Path(words[0]).exists()):
        return Path(words[0]), words[1:]
    return None, words


def _names(text: str) -> list[str]:
    return [name for name in (word.strip() for word in text.split(",")) if name]


def _planned(coordinator: OpenCoordinator, plan: "StudyPlan") -> "tuple[StudyPlan, Machine, tuple[str, ...]]":
    """Take a plan as it is."""
    from fedtune_server.studies.preparing import find_model, find_test, machine_for

    plan.promise.check()
    settings = coordinator.settings
    base, test = find_model(plan, settings), find_test(plan, settings)
    place = coordinator.folder.study(plan)
    return plan, machine_for(place, base, None if test is None else str(test), settings), ()


def _composed(
    coordinator: OpenCoordinator, overrides: list[str], config: Path | None
) -> "tuple[StudyPlan, Machine, tuple[str, ...]]":
    """Make a plan from settings; a base model and a test file may be named as `coordinator.yaml` names them."""
    from fedtune.config.compose import compose
    from fedtune.simulation.apart import resolve_apart
    from fedtune_server.studies.preparing import machine_for

    facts, settings = coordinator.settings, compose(overrides, config)
    base = facts.models.get(settings.model.base, settings.model.base)
    own = facts.tests.get(settings.data.name or "")
    test = settings.data.test or (None if own is None else str(own))
    changes = {
        "model": settings.model.model_copy(update={"base": base}),
        "data": settings.data.model_copy(update={"test": test}),
    }
    resolved = resolve_apart(settings.model_copy(update=changes))
    place = coordinator.folder.study(resolved.plan)
    machine = machine_for(place, resolved.base, resolved.machine.test_path, facts)
    return resolved.plan, machine, resolved.warnings


def _document(
    plan: "StudyPlan",
    machine: "Machine",
    sites: tuple[str, ...],
    coordinator: OpenCoordinator,
    warnings: tuple[str, ...],
) -> dict[str, Any]:
    promise = plan.promise
    return {
        "study": plan.name,
        "plan_sha256": plan.sha256,
        "plan_file": str((coordinator.folder.study(plan) / "plan.json").absolute()),
        "sites": list(sites),
        "rounds": plan.federation.rounds,
        "base_model": {"name": plan.model.name, "sha256": plan.model.sha256, "folder": machine.model_folder},
        "test_file": machine.test_path,
        "privacy": {
            "mode": promise.mode,
            "epsilon": promise.forecast() if promise.mode == "dp" else None,
            "delta": promise.delta if promise.mode == "dp" else None,
            "noise": promise.noise if promise.mode == "dp" else None,
            "statement": promise.statement,
        },
        "warnings": list(warnings),
    }


def _lines(found: dict[str, Any]) -> list[str]:
    model = found["base_model"]
    seeded = ["noise       seeded: WHOEVER KNOWS THE PLAN CAN REMOVE IT; sites that take it say so in their policy"]
    return [
        f"the study {found['study']}, {found['rounds']} rounds at {', '.join(found['sites'])}:",
        f"  plan        {found['plan_sha256']}",
        f"  privacy     {found['privacy']['statement']}",
        *(f"  {line}" for line in seeded if found["privacy"]["noise"] == "seeded"),
        f"  base model  {model['name']}, in {model['folder']}",
        f"  test file   {found['test_file'] or 'none here: what the sites tell of their held-out records'}",
        *(f"warning: {warning}" for warning in found["warnings"]),
    ]


def _next(found: dict[str, Any]) -> list[str]:
    return [
        f"submitted: {found['plan_file']}",
        "send that file to the sites' operators, who agree to it: fedtune client approve plan.json",
        f"next: fedtune server up, unless it runs; then: fedtune server status {found['study']} --watch",
    ]
