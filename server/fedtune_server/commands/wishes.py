"""`fedtune server stop` and `resume`: what a person wants of a study, written down for whoever runs it."""

from typing import Annotated

import typer

from fedtune.commands.options import Format, OutputFormat, Verbose
from fedtune.commands.screen import quiet_libraries
from fedtune_server.commands.shared import Dir, folder_of, settings_of, show

Study = Annotated[str, typer.Argument(metavar="STUDY", help="A study's name, or its plan's hash from 4 digits on.")]


def stop(study: Study, *, folder: Dir = None, output: Format = OutputFormat.text, verbose: Verbose = False) -> None:
    """Stop a study after what it has reached so far: its last whole round is kept, and it does not start by itself.

    It works while the coordinator is down; one that runs stops the study within seconds.
    """
    quiet_libraries(verbose=verbose)
    from fedtune_server.studies.store import StudyStore

    place = folder_of(folder)
    settings_of(place)
    store = StudyStore(place)
    found = store.find(study)
    record = store.stop(found)
    document = {"study": record.name, "plan_sha256": record.plan_sha256, "wish": record.wish}
    words = "is stopped within seconds" if found.record.wish == "run" else "was to stop before"
    lines = [f"{record.name} {words}", f"to go on: fedtune server resume {record.plan_sha256[:12]}"]
    show(output, document, lines)


def resume(
    study: Study,
    *,
    release: Annotated[
        list[str] | None,
        typer.Option(metavar="SITE", help="Let this site out of quarantine; repeat it.", show_default=False),
    ] = None,
    folder: Dir = None,
    output: Format = OutputFormat.text,
    verbose: Verbose = False,
) -> None:
    """Let a study that was stopped or has failed go on from its last round, at once.

    A released site is asked again from the next round on; the round that is running then is begun anew.
    """
    quiet_libraries(verbose=verbose)
    from fedtune_server.studies.store import StudyStore

    place = folder_of(folder)
    settings_of(place)
    store = StudyStore(place)
    record = store.resume(store.find(study), release or ())
    document = {
        "study": record.name,
        "plan_sha256": record.plan_sha256,
        "wish": record.wish,
        "released": list(release or ()),
    }
    freed = [f"out of quarantine: {', '.join(release)}"] if release else []
    lines = [f"{record.name} goes on from its last round", *freed, "see how: fedtune server status"]
    show(output, document, lines)
