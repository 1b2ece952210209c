"""`fedtune predict`: use a finished run's adapter on any file."""

import json
import sys
from pathlib import Path
from typing import Annotated

import click
import typer

from fedtune.commands.options import Base, Verbose
from fedtune.commands.screen import quiet_libraries

app = typer.Typer(help="Predict with a finished run's adapter.")


@app.command()
def predict(
    run: Annotated[Path, typer.Argument(metavar="RUN|DIR", help="A run folder, or a release made with --to peft.")],
    data: Annotated[str, typer.Argument(metavar="DATA", help="A file with the study's input columns.")],
    *,
    base: Base = None,
    verbose: Verbose = False,
) -> None:
    """Print one JSON line a record: the label and its probability, or the completion.

    DATA needs the input columns only; lines come in the order of the file.
    """
    quiet_libraries(verbose=verbose)
    from fedtune.simulation.finished import FinishedRun

    finished = FinishedRun(run, base)
    if finished.plan.promise.mode == "off":
        click.echo(finished.statement, err=True)
    for prediction in finished.predictions(data):
        sys.stdout.write(json.dumps(prediction, ensure_ascii=False) + "\n")
