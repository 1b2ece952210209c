"""`fedtune data`: what a study would find in a file, and each simulated site's records as a file of its own."""

import json
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import click
import typer

from fedtune.commands.options import ConfigFile, Format, OutputFormat, Overrides, Verbose
from fedtune.commands.screen import quiet_libraries, screen

if TYPE_CHECKING:
    from fedtune.config.schema import Settings
    from fedtune.data.check import DataReport, Sample
    from fedtune.simulation.split import Split

app = typer.Typer(help="Look at records as a study would see them, or deal them out to files.", no_args_is_help=True)
labels_shown = 20
tokens_shown = 80
sites_shown = 20


class FileFormat(StrEnum):
    """The formats that `split` writes."""

    csv = "csv"
    jsonl = "jsonl"


@app.callback()
def group() -> None:
    """Look at records as a study would see them, or deal them out to files."""


@app.command()
def check(
    path: Annotated[str, typer.Argument(metavar="PATH", help="A file, a saved data set folder, or a Hub id.")],
    overrides: Overrides = None,
    *,
    config: ConfigFile = None,
    output: Format = OutputFormat.text,
    verbose: Verbose = False,
) -> None:
    """Report format, task, labels, duplicates, units and token lengths, and show two examples with the loss mask."""
    quiet_libraries(verbose=verbose)
    from fedtune.config.compose import compose
    from fedtune.data.check import check as check_file
    from fedtune.model.base import find_base
    from fedtune.model.build import load_tokenizer

    settings = compose([f"data.path={json.dumps(path)}", *(overrides or [])], config)
    tokenizer = load_tokenizer(find_base(settings.model))
    unit, downloads = settings.privacy.unit, settings.model.allow_download
    report = check_file(path, settings.data, tokenizer, unit=unit, allow_download=downloads)
    if output is OutputFormat.json:
        click.echo(json.dumps(_document(report), ensure_ascii=False))
        return
    _print(report, settings)


@app.command()
def split(  # noqa: PLR0913 - a command's options
    path: Annotated[
        str | None,
        typer.Argument(
            metavar="[PATH]",
            help="A file, a saved data set folder, or a Hub id; without it, the records of the settings.",
            show_default=False,
        ),
    ] = None,
    overrides: Overrides = None,
    *,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where the files go.", show_default=False)],
    to: Annotated[
        FileFormat | None, typer.Option("--to", help="The files' format; as the records are, without it.")
    ] = None,
    config: ConfigFile = None,
    output: Format = OutputFormat.text,
    verbose: Verbose = False,
) -> None:
    """Write each simulated site's records to DIR/SITE.csv or .jsonl, and DIR/study.yaml for sites that have them.

    A site gets the records that `fedtune simulate` deals to it with the same settings. Without PATH and settings: six
    banks with synthetic messages. Nothing is replaced.
    """
    quiet_libraries(verbose=verbose)
    from fedtune.config.compose import compose
    from fedtune.simulation.split import split as split_records
    from fedtune.simulation.split import write_split

    words = list(overrides or [])
    if path is not None:
        is_setting = "=" in path and not Path(path).exists()
        words.insert(0, path if is_setting else f"data.path={json.dumps(path)}")
    found = split_records(compose(words, config))
    files = write_split(found, out, None if to is None else to.value)
    if output is OutputFormat.json:
        click.echo(json.dumps(_split_document(found, files, out), ensure_ascii=False))
        return
    _print_split(found, files, out)


def _document(report: "DataReport") -> dict[str, object]:
    parts = {name: getattr(report, name) for name in ("source", "format", "rows", "labels", "duplicates", "truncated")}
    samples = [{"label": sample.label, "pieces": list(sample.pieces)} for sample in report.samples]
    lengths = None if report.lengths is None else asdict(report.lengths)
    return {
        **parts,
        "task": report.task.to_dict(),
        "units": None if report.units is None else asdict(report.units),
        "lengths": lengths,
        "samples": samples,
        "warnings": list(report.warnings),
    }


def _print(report: "DataReport", settings: "Settings") -> None:
    from rich.text import Text

    console = screen()
    columns = ", ".join(f"{role}={name}" for role, name in report.task.columns.items())
    console.print(f"{report.source}: {report.format}, {report.rows:,} records", markup=False)
    console.print(f"task: {report.task.kind} ({report.task.style}: {columns})", markup=False)
    if report.labels:
        shown = list(report.labels.items())[:labels_shown]
        more = f", and {len(report.labels) - len(shown)} more" if len(report.labels) > len(shown) else ""
        counts = ", ".join(f"{label} {count}" for label, count in shown)
        console.print(f"labels: {len(report.labels)}: {counts}{more}", markup=False)
    console.print(f"exact duplicates: {report.duplicates:,}")
    if report.units is not None:
        units, used = report.units, settings.privacy.max_records_per_unit
        console.print(
            f"privacy units: {units.count:,}, one for each value of {units.column}; records of a unit: median "
            f"{units.median:g}, largest {units.largest:,}; a step uses at most {used} of them",
            markup=False,
        )
    if report.lengths is not None and report.truncated is not None:
        lengths = report.lengths
        console.print(
            f"tokens: median {lengths.p50}, 90 % {lengths.p90}, 95 % {lengths.p95}, 99 % {lengths.p99}, "
            f"longest {lengths.longest}; {report.truncated:.1%} are cut at data.max_tokens={settings.data.max_tokens}"
        )
    for number, sample in enumerate(report.samples, start=1):
        console.print(Text(f"example {number}: ", style="bold") + _rendered(sample))
    for warning in report.warnings:
        console.print(f"warning: {warning}", markup=False)


def _rendered(sample: "Sample") -> "object":
    from rich.text import Text

    from fedtune.display import printable

    line = Text()
    for piece, trained in sample.pieces[:tokens_shown]:
        line.append(f"[{printable(piece)}]" if trained else f" {printable(piece)}", style="green" if trained else "dim")
    if len(sample.pieces) > tokens_shown:
        line.append(f" … {len(sample.pieces) - tokens_shown} more", style="dim")
    line.append(
        f"  -> label {printable(sample.label)}" if sample.label is not None else "  ([token] counts in the loss)"
    )
    return line


def _split_document(found: "Split", files: dict[str, Path], out: Path) -> dict[str, object]:
    from fedtune.simulation.split import STUDY_FILE

    sites = [
        {"name": part.name, "file": str(files[part.name]), "records": part.table.rows, "held_out": part.held_out}
        for part in found.parts
    ]
    return {"data": found.study.data.name, "sites": sites, "study": str(out / STUDY_FILE)}


def _print_split(found: "Split", files: dict[str, Path], out: Path) -> None:
    from fedtune.simulation.split import STUDY_FILE

    console = screen()
    name = found.study.data.name
    for part in found.parts[:sites_shown]:
        counts = f"{part.table.rows:,} records, of which a site of this name holds out {part.held_out:,}"
        console.print(f"{files[part.name]}: {counts}", markup=False, soft_wrap=True)
    if len(found.parts) > sites_shown:
        console.print(f"and {len(found.parts) - sites_shown} more")
    console.print(f"{out / STUDY_FILE}: the study, which knows them as {name}", markup=False, soft_wrap=True)
    console.print(f"submit it: fedtune server submit --config {out / STUDY_FILE}", markup=False, soft_wrap=True)
