"""`fedtune evaluate`: measure a finished run's adapter on any file."""

import json
from pathlib import Path
from typing import Annotated

import click
import typer

from fedtune.commands.options import Base, Format, OutputFormat, Verbose
from fedtune.commands.screen import quiet_libraries, screen

app = typer.Typer(help="Measure a finished run's adapter on a file.")


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(metavar="RUN|DIR", help="A run folder, or a release made with --to peft.")],
    data: Annotated[str, typer.Argument(metavar="DATA", help="A file with the study's columns.")],
    *,
    base: Base = None,
    output: Format = OutputFormat.text,
    verbose: Verbose = False,
) -> None:
    """Measure a finished run's adapter on a file that has the study's columns."""
    quiet_libraries(verbose=verbose)
    from fedtune.simulation.finished import FinishedRun

    finished = FinishedRun(run, base)
    metrics = finished.metrics(data)
    if output is OutputFormat.json:
        privacy = {"mode": finished.plan.promise.mode, "statement": finished.statement}
        click.echo(
            json.dumps({"run": str(run), "data": data, "metrics": metrics, "privacy": privacy}, ensure_ascii=False)
        )
        return
    console = screen()
    console.print(finished.statement, markup=False)
    for name, value in metrics.items():
        console.print(f"{name:<16} {value:.4f}")
