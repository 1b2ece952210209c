"""`fedtune simulate`: run a federation of simulated sites on this machine, sweep over values, or continue a run."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import click
import typer

from fedtune.commands.options import ConfigFile, Format, OutputFormat, Overrides, Verbose
from fedtune.commands.screen import quiet_libraries, screen
from fedtune.errors import ConfigError

app = typer.Typer(help="Fine-tune one model across simulated private sites.")


@app.command()
def simulate(
    overrides: Overrides = None,
    *,
    config: ConfigFile = None,
    resume: Annotated[
        Path | None, typer.Option("--resume", metavar="RUN", help="Continue an interrupted run.", show_default=False)
    ] = None,
    output: Format = OutputFormat.text,
    verbose: Verbose = False,
) -> None:
    """Fine-tune one model across simulated private sites.

    Without arguments: six simulated banks with synthetic messages, MiniLM, ε = 8. Comma-separated values sweep and end
    in one comparison.
    """
    quiet_libraries(verbose=verbose)
    if resume is not None:
        _show([([], _resumed(resume, list(overrides or []), config, output))], output)
        return
    from fedtune.config.overrides import expand_sweep

    variants = expand_sweep(list(overrides or []))
    _show(_simulated(variants, config, output), output)


def _simulated(
    variants: list[list[str]], config: Path | None, output: OutputFormat
) -> list[tuple[list[str], dict[str, Any]]]:
    """Resolve every variant before the first is run, so that a mistake in the last costs nothing."""
    from fedtune.config.compose import compose
    from fedtune.simulation.resolve import resolve
    from fedtune.simulation.runner import simulate as run_study

    composed = [compose(variant, config) for variant in variants]
    if len(variants) > 1:
        for settings in composed:
            _refuse_one_folder(settings.run.dir)
            resolve(settings)
    results = []
    for number, (variant, settings) in enumerate(zip(variants, composed, strict=True), start=1):
        study = resolve(settings)
        if len(variants) > 1 and output is OutputFormat.text:
            click.echo(f"[{number}/{len(variants)}] {' '.join(variant)}", err=True)
        _warn(study.warnings, output)
        results.append((variant, run_study(study.plan, study.machine, _progress(output))))
    return results


def _refuse_one_folder(run_dir: str | None) -> None:
    if run_dir is not None:
        message = f"run.dir={run_dir} names one run folder, and a sweep makes several"
        raise ConfigError("one-folder", message, hint=f"run.root={run_dir} gives each run a folder of its own in it")


def _resumed(path: Path, overrides: list[str], config: Path | None, output: OutputFormat) -> dict[str, Any]:
    from fedtune.simulation.runner import continue_run, refuse_other_plan

    if overrides or config:
        from fedtune.config.compose import compose
        from fedtune.simulation.resolve import resolve

        refuse_other_plan(path, resolve(compose(overrides, config)).plan)
    return continue_run(path, _progress(output))


def _progress(output: OutputFormat) -> Any:
    from fedtune.simulation.progress import choose

    return choose(sys.stderr, output.value)


def _warn(warnings: tuple[str, ...], output: OutputFormat) -> None:
    if output is OutputFormat.text:
        for warning in warnings:
            click.echo(click.style("warning:", fg="yellow") + f" {warning}", err=True)


def _show(results: list[tuple[list[str], dict[str, Any]]], output: OutputFormat) -> None:
    if output is OutputFormat.json:
        summaries = [summary for _, summary in results]
        click.echo(json.dumps(summaries[0] if len(summaries) == 1 else summaries, ensure_ascii=False))
        return
    from fedtune.simulation.report import render_comparison, render_summary

    screen().print(render_summary(results[0][1]) if len(results) == 1 else render_comparison(results))
