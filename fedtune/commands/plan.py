"""`fedtune plan`: what a study would do and cost, without doing it."""

import json
import shlex
from typing import TYPE_CHECKING, Any

import click
import typer

from fedtune.commands.options import ConfigFile, Format, OutputFormat, Overrides, Verbose
from fedtune.commands.screen import quiet_libraries, screen

if TYPE_CHECKING:
    from rich.table import Table

    from fedtune.simulation.resolve import Resolved

app = typer.Typer(help="Show what a study would do and cost; refuse what cannot work.")


@app.command()
def plan(
    overrides: Overrides = None,
    *,
    config: ConfigFile = None,
    output: Format = OutputFormat.text,
    verbose: Verbose = False,
) -> None:
    """Show the resolved study plan with its hash, privacy, adapter size, traffic and memory; refuse what cannot work.

    Reads the records and the base model, trains nothing and writes nothing.
    """
    quiet_libraries(verbose=verbose)
    from fedtune.config.compose import compose
    from fedtune.simulation.resolve import resolve

    resolved = resolve(compose(overrides or [], config))
    if output is OutputFormat.json:
        click.echo(json.dumps(_document(resolved), ensure_ascii=False))
        return
    console = screen()
    console.print(_study_table(resolved))
    console.print(_sites_table(resolved))
    for warning in resolved.warnings:
        console.print(f"warning: {warning}", markup=False)
    chosen = [*(["--config", str(config)] if config is not None else []), *(overrides or [])]
    console.print(f"run it: {shlex.join(['fedtune', 'simulate', *chosen])}", markup=False, soft_wrap=True)


def _document(resolved: "Resolved") -> dict[str, Any]:
    from fedtune.simulation.estimate import memory_bytes

    study, promise = resolved.plan, resolved.plan.promise
    return {
        "plan": study.model_dump(mode="json"),
        "plan_sha256": study.sha256,
        "privacy": {
            "mode": promise.mode,
            "noise_multiplier": promise.noise_multiplier,
            "sampling_rate": promise.sampling_rate,
            "steps": promise.max_steps,
            "epsilon": promise.forecast() if promise.mode == "dp" else None,
            "delta": promise.delta if promise.mode == "dp" else None,
            "unit": promise.unit,
            "max_records_per_unit": promise.max_records_per_unit,
            "one_unit": promise.one_unit,
            "statement": promise.statement,
        },
        "sites": [{"name": site.name, "units": site.units, "held_out": site.held_out} for site in resolved.sites],
        "trainable_parameters": study.adapter.trained,
        "bytes_per_round": {"up": study.adapter.upload_bytes, "down": 4 * study.adapter.download},
        "memory_bytes": memory_bytes(study, resolved.base),
        "warnings": list(resolved.warnings),
    }


def _study_table(resolved: "Resolved") -> "Table":
    from fedtune.display import bytes_text, epsilon_text, printable

    document, study = _document(resolved), resolved.plan
    privacy, traffic = document["privacy"], document["bytes_per_round"]
    table = _table(f"{study.name}: the study plan", "", "")
    rows = [
        ("plan SHA-256", study.sha256),
        ("data", f"{study.data.name}, {study.task.style}, {len(study.task.labels)} labels"),
        ("base model", f"{study.model.name} ({study.model.architecture}), SHA-256 {study.model.sha256[:16]}…"),
        ("aggregation", f"{study.aggregation.algorithm}, {study.aggregation.server_optimizer}"),
        ("rounds × local steps", f"{study.federation.rounds} × {study.training.local_steps} = {study.total_steps}"),
        ("sampling rate q", f"{privacy['sampling_rate']:g} ({study.promise.sampler})"),
        ("noise multiplier σ", f"{privacy['noise_multiplier']:.4f}" if privacy["mode"] == "dp" else "NOT PRIVATE"),
        ("ε per site after all rounds", epsilon_text(privacy["epsilon"]) if privacy["mode"] == "dp" else "NOT PRIVATE"),
        ("δ", f"{privacy['delta']:.3g}" if privacy["mode"] == "dp" else "-"),
        ("privacy unit", printable(privacy["one_unit"]) if privacy["mode"] == "dp" else "-"),
        ("trainable parameters", f"{study.adapter.trained:,} of {study.adapter.numbers:,} in the adapter"),
        ("bytes a site and round", f"{bytes_text(traffic['up'])} up, {bytes_text(traffic['down'])} down"),
        ("memory, estimated", bytes_text(document["memory_bytes"])),
    ]
    for name, value in rows:
        table.add_row(name, value)
    return table


def _sites_table(resolved: "Resolved") -> "Table":
    noun = resolved.plan.promise.noun
    table = _table(f"sites ({noun}s rounded, as they are told)", "site", f"training {noun}s", "held-out records")
    for site in resolved.sites[:20]:
        table.add_row(site.name, f"{site.units:,}", f"{site.held_out:,}")
    if len(resolved.sites) > 20:  # noqa: PLR2004 - a screenful
        table.add_row(f"and {len(resolved.sites) - 20} more", "", "")
    return table


def _table(title: str, *columns: str) -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE, show_header=any(columns))
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number and any(columns) else "left", overflow="fold")
    return table
