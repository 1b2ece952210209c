"""`fedtune server status`: the coordinator's processes, who is connected, and how each study is."""

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import click
import typer

from fedtune.commands.options import Format, OutputFormat, Verbose
from fedtune.commands.screen import quiet_libraries, screen
from fedtune.errors import FedtuneError
from fedtune_server.commands.shared import Dir, OpenCoordinator, add, opened, show, table

if TYPE_CHECKING:
    from fedtune.processes.health import Readiness
    from fedtune_server.studies.report import Surroundings

settled = {"done", "failed", "stopped", "damaged"}
every = 2.0  # seconds between two looks
short = 12  # digits of a hash that are shown


def status(
    study: Annotated[
        str,
        typer.Argument(metavar="[STUDY]", help="A study's name, or its plan's hash from 4 digits on; else all."),
    ] = "",
    *,
    watch: Annotated[
        bool, typer.Option("--watch", help="Look again every 2 s, until no study shown has anything to do.")
    ] = False,
    folder: Dir = None,
    output: Format = OutputFormat.text,
    verbose: Verbose = False,
) -> None:
    """Show every study with its state, round, metric and ε, and which site fails why; of one study, every site.

    Works while the coordinator is down as well: what stands on disk is shown then, and that nobody works on it.
    """
    quiet_libraries(verbose=verbose)
    coordinator = opened(folder)
    if watch:
        _watch(coordinator, study, output)
        return
    document = _document(coordinator, study)
    show(output, document, _lines(document, is_one=bool(study)))


def _watch(coordinator: OpenCoordinator, study: str, output: OutputFormat) -> None:
    """Show the state again and again: in place at a terminal, as one line of JSON a look for programs."""
    from rich.console import Group
    from rich.live import Live
    from rich.text import Text

    from fedtune.display import printable

    console = screen()
    is_live = output is OutputFormat.text and sys.stdout.isatty()
    with Live(console=console, auto_refresh=False) if is_live else _nothing() as live:
        while True:
            document = _document(coordinator, study)
            found = _lines(document, is_one=bool(study))
            lines: list[Any] = [Text(printable(line)) if isinstance(line, str) else line for line in found]
            if live is not None:
                live.update(Group(*lines), refresh=True)
            elif output is OutputFormat.json:
                click.echo(json.dumps(document, ensure_ascii=False))
            else:
                console.print(Group(*lines))
            if all(study_now["state"] in settled for study_now in document["studies"]):
                return
            time.sleep(every)


def _nothing() -> Any:
    from contextlib import nullcontext

    return nullcontext()


def _document(coordinator: OpenCoordinator, words: str) -> dict[str, Any]:
    from fedtune_server.studies.report import report
    from fedtune_server.studies.store import StudyStore
    from fedtune_server.supervision import ask

    found = ask(coordinator.folder)
    around, problem = _surroundings(coordinator, found)
    store = StudyStore(coordinator.folder)
    shelf = store.read()
    studies = [store.find(words)] if words else list(shelf.studies)
    return {
        "federation": coordinator.settings.federation,
        "server": {
            "up": found is not None,
            "ready": found is not None and found.ready,
            "processes": [] if found is None else list(found.detail.get("processes", ())),
            "problem": problem,
        },
        "nodes": _nodes(coordinator, around),
        "studies": [asdict(report(study, around)) for study in studies],
        "damaged": [] if words else [_damage(study.path.name, study.error) for study in shelf.damaged],
    }


def _surroundings(coordinator: OpenCoordinator, found: "Readiness | None") -> "tuple[Surroundings, str]":
    """Ask the SuperLink, if the supervisor says that it is there; return also the code of why it told nothing."""
    from fedtune_server.studies.report import Surroundings

    enrolled = {member.site for member in coordinator.enrolment.members if member.revoked is None}
    alone = Surroundings(datetime.now(UTC), enrolled)
    if found is None or found.parts.get("link") != "ready":
        return alone, ""
    from fedtune.flower.local_gate import read_secret
    from fedtune.flower.submission import Control
    from fedtune_server.studies.registrar import node_keys

    try:
        with Control(coordinator.folder.private_port(), read_secret(coordinator.folder.secret)) as control:
            runs, nodes = control.runs(), control.nodes()
    except FedtuneError as error:
        return alone, error.code
    keys = node_keys(coordinator.enrolment.members)
    online = {keys[node.key][0] for node in nodes if node.status == "online" and node.key in keys}
    return Surroundings(alone.now, enrolled, runs, online), ""


def _nodes(coordinator: OpenCoordinator, around: "Surroundings") -> list[dict[str, Any]]:
    sites = sorted(member.site for member in coordinator.enrolment.members if member.revoked is None)
    return [{"site": site, "online": None if around.online is None else site in around.online} for site in sites]


def _damage(name: str, error: FedtuneError) -> dict[str, str]:
    return {"folder": name, "code": error.code, "message": error.message, "hint": error.hint}


def _lines(found: dict[str, Any], *, is_one: bool) -> Iterator[object]:
    yield from _server_lines(found)
    if not found["studies"] and not found["damaged"]:
        yield "no study was submitted: fedtune server submit PLAN.json"
    if found["studies"]:
        yield _studies_table(found["studies"])
    for study in found["studies"]:
        yield from _study_lines(study, is_one=is_one)
    for study in found["damaged"]:
        yield f"{study['folder']} is damaged and left out: {study['message']} [{study['code']}]"
        yield f"  hint: {study['hint']}"


def _server_lines(found: dict[str, Any]) -> Iterator[str]:
    server = found["server"]
    if not server["up"]:
        yield f"{found['federation']}: the coordinator is down; start it: fedtune server up"
        return
    parts = [_process_text(process) for process in server["processes"]]
    yield f"{found['federation']}: the coordinator is {'up' if server['ready'] else 'not ready'}: {', '.join(parts)}"
    if server["problem"]:
        yield f"  its SuperLink does not answer [{server['problem']}]: fedtune server logs --role link"
    online = [node["site"] for node in found["nodes"] if node["online"]]
    away = [node["site"] for node in found["nodes"] if node["online"] is False]
    if found["nodes"] and not server["problem"]:
        yield f"  online {', '.join(online) or 'none'}" + (f"; away {', '.join(away)}" if away else "")


def _process_text(process: dict[str, Any]) -> str:
    restarts = process["restarts"]
    times = f", restarted {restarts} {'time' if restarts == 1 else 'times'}" if restarts else ""
    return f"{process['name']} {process['status']}{times}"


def _studies_table(studies: list[dict[str, Any]]) -> Any:
    from fedtune.display import epsilon_text, metric_text, seconds_text

    made = table("study", "plan", "state", "round", "metric", "ε", "left", numbers=("round", "ε"), unbroken=("plan",))
    for study in studies:
        planned = study["epsilon_planned"]
        spent = "not private" if planned is None else f"{epsilon_text(study['epsilon'])} of {epsilon_text(planned)}"
        left = study["seconds_left"]
        add(
            made,
            study["name"],
            study["plan_sha256"][:short],
            study["state"],
            f"{study['round']}/{study['rounds']}",
            "-" if study["metric"] is None else f"{study['metric_name']} {metric_text(study['metric'])}",
            spent,
            "-" if left is None else seconds_text(left),
        )
    return made


def _study_lines(study: dict[str, Any], *, is_one: bool) -> Iterator[object]:
    name, failure = study["name"], study["failure"]
    if is_one and study["in_round"] is not None:
        yield f"{name}: in round {study['in_round']}"
    if failure is not None:
        times = f"failure {failure['failures']} in a row, at {failure['at'][:19]}Z"
        yield f"{name}: {failure['message']} [{failure['code']}], {times}"
        yield f"  hint: {failure['hint']}"
    if study["state"] == "waiting" and failure is not None:
        yield f"  it is tried again at {failure['again']}"
    elif study["state"] in {"failed", "stopped"}:
        yield f"  to go on: fedtune server resume {study['plan_sha256'][:short]}"
    sites = [site for site in study["sites"] if is_one or _is_told(site)]
    if sites:
        yield _sites_table(name, sites)
    for site in study["sites"]:
        if site["quarantine"]:
            short_hash = study["plan_sha256"][:short]
            yield f"  to ask {site['name']} again: fedtune server resume {short_hash} --release {site['name']}"
    if is_one:
        found = "its result, adapter/ and summary.json, is in" if study["state"] == "done" else "its folder is"
        yield f"{found} {study['folder']}"


def _is_told(site: dict[str, Any]) -> bool:
    """Whether a site needs a look although nobody asked for it."""
    return bool(site["quarantine"] or site["failures"] or site["state"] in {"failed", "refused", "not enrolled"})


def _sites_table(study: str, sites: list[dict[str, Any]]) -> Any:
    online = {True: "online", False: "away", None: "-"}
    made = table(f"site of {study}", "node", "this round", "rounds taken", "failures", numbers=("rounds taken",))
    for site in sites:
        failures = ", ".join(f"{code} ×{count}" for code, count in sorted(site["failures"].items()))
        now = f"{site['state']}: {site['code']}" if site["code"] else site["state"]
        add(made, site["name"], online[site["online"]], now, site["rounds"], failures or "-")
    return made
