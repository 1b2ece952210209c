"""`fedtune release`: write what a study has trained, signed, for those who use it; or check such a folder."""

import sys
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import click
import typer
from typer.core import TyperGroup

from fedtune.commands.options import Format, OutputFormat, Verbose
from fedtune.commands.results import add, show, table
from fedtune.commands.screen import quiet_libraries

if TYPE_CHECKING:
    from fedtune.release.export import Exported
    from fedtune.release.study import EndedStudy
    from fedtune.release.verify import Verdict

found_something = 5  # the exit code of a release that does not hold
default_command = "export"


class WithDefault(TyperGroup):
    """A group whose first word may be left out: `fedtune release RUN` is `fedtune release export RUN`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put the default command before anything that is neither a command nor a question for help."""
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            args = [default_command, *args]
        return super().parse_args(ctx, args)


class ReleaseKind(StrEnum):
    """What a release can be."""

    peft = "peft"
    merged = "merged"
    gguf = "gguf"
    ollama = "ollama"


class AdapterFormat(StrEnum):
    """How an adapter is handed to Ollama."""

    gguf = "gguf"
    safetensors = "safetensors"


class NumberType(StrEnum):
    """How a GGUF file holds its matrices."""

    f32 = "f32"
    f16 = "f16"
    q8_0 = "q8_0"


app = typer.Typer(
    cls=WithDefault,
    help="Write what a study has trained, signed: fedtune release RUN --to KIND --out DIR. Or check a release.",
    no_args_is_help=True,
)


@app.callback()
def group() -> None:
    """Write what a study has trained, signed: fedtune release RUN --to KIND --out DIR. Or check a release."""


@app.command()
def export(  # noqa: PLR0913 - a command's options
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder whose study has ended.")],
    *,
    to: Annotated[
        ReleaseKind,
        typer.Option(help="peft: an adapter; merged: a whole model; gguf: for llama.cpp; ollama: for Ollama."),
    ] = ReleaseKind.peft,
    out: Annotated[Path, typer.Option(metavar="DIR", help="The folder to make.", show_default=False)],
    dtype: Annotated[NumberType, typer.Option(help="Of a GGUF file.")] = NumberType.f16,
    merged: Annotated[bool, typer.Option("--merged", help="gguf, ollama: the whole model, not the adapter.")] = False,
    adapter_format: Annotated[AdapterFormat, typer.Option(help="Of an adapter for Ollama.")] = AdapterFormat.gguf,
    parameter: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="Of an Ollama model (temperature=0.2). Repeat it.", show_default=False),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Lines on which a merged model is compared.", show_default=False),
    ] = None,
    key: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The coordinator's key; else the run's own.", show_default=False),
    ] = None,
    output: Format = OutputFormat.text,
    verbose: Verbose = False,
) -> None:
    """Write a release of a finished study: model files, card, manifest and signature.

    The word export may be left out. The folder appears when all of it is written and checked.
    """
    quiet_libraries(verbose=verbose)
    from fedtune.release.export import export as write_release
    from fedtune.release.kinds import Request
    from fedtune.release.study import open_ended

    parameters = _parameters(parameter or [])
    tell = _teller(output)
    tell("opening the study and hashing its base model")
    study = open_ended(run, key)
    _warn(study)
    progress = _progress() if output is OutputFormat.text and sys.stderr.isatty() else None
    request = Request(to.value, out, dtype.value, merged, adapter_format.value, parameters, prompts, progress)
    written = write_release(study, request, tell)
    show(output, _export_document(study, written, to), _export_lines(study, written))


@app.command(
    epilog="Exit code: 0 nothing was found; 5 something was, and each thing is named; 2 it cannot be read as a release."
)
def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A release.")],
    *,
    coordinator_key: Annotated[
        str | None,
        typer.Option(metavar="HEX|FILE", help="The coordinator's public key, as you were told it.", show_default=False),
    ] = None,
    base: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="The base model it is to be used with.", show_default=False)
    ] = None,
    journal: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="A site's journal; may be repeated.", show_default=False),
    ] = None,
    output: Format = OutputFormat.text,
    verbose: Verbose = False,
) -> None:
    """Check a release with public keys alone: files, signatures, heads, ε, card, and the journals that are given."""
    quiet_libraries(verbose=verbose)
    from fedtune.commands.audit import read_key
    from fedtune.release.verify import verify_release

    verdict = verify_release(folder, coordinator_key=read_key(coordinator_key), base=base, journals=journal or ())
    show(output, _verdict_document(verdict), _verdict_lines(folder, verdict))
    raise typer.Exit(0 if verdict.holds else found_something)


def _parameters(given: list[str]) -> dict[str, int | float | str]:
    """Read NAME=VALUE; a value is a number where it looks like one."""
    found: dict[str, int | float | str] = {}
    for word in given:
        name, equals, value = word.partition("=")
        if not equals or not name:
            raise click.UsageError(f"--parameter {word} is not NAME=VALUE")
        found[name.strip()] = _value(value.strip())
    return found


def _value(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _progress() -> Callable[[int, int], None]:
    """Return a function that shows on standard error how much of a file is written."""
    from fedtune.display import bytes_text

    def shown(done: int, whole: int) -> None:
        click.echo(f"\r  {bytes_text(done)} of {bytes_text(whole)} ", nl=done >= whole, err=True)

    return shown


def _warn(study: "EndedStudy") -> None:
    promise = study.plan.promise
    if promise.mode == "off":
        _say_warning(study.summary["privacy"]["statement"])
    elif promise.noise == "seeded":
        _say_warning("the noise came from a seeded generator: this is a study's result, and NOT FOR RELEASE to others")
    for site in study.missing_heads:
        _say_warning(f"no head of {site}'s journal was witnessed: fedtune release verify will name it")


def _say_warning(text: str) -> None:
    from fedtune.display import printable

    click.echo(click.style("warning:", fg="yellow") + f" {printable(text)}", err=True)


def _teller(output: OutputFormat) -> Any:
    """Return a function that says what is being done, on standard error; for programs it says nothing."""
    return (lambda text: click.echo(f"{text} …", err=True)) if output is OutputFormat.text else (lambda _text: None)


def _export_document(study: "EndedStudy", written: "Exported", kind: ReleaseKind) -> dict[str, Any]:
    return {
        "folder": str(written.folder),
        "kind": kind.value,
        "plan_sha256": study.plan.sha256,
        "manifest_sha256": written.manifest_sha256,
        "coordinator": study.coordinator,
        "bytes": written.size,
        "files": written.sizes,
        **written.details,
    }


def _export_lines(study: "EndedStudy", written: "Exported") -> list[object]:
    from fedtune.display import bytes_text

    made = table("file", "size", numbers={"size"})
    for name, size in written.sizes.items():
        add(made, name, bytes_text(size))
    lines: list[object] = [made, f"{written.folder}: {bytes_text(written.size)} in {len(written.sizes)} files"]
    if (parity := written.details.get("parity")) is not None:
        lines.append(
            f"equal to base and adapter on {parity['prompts']} prompts: they differ by {parity['error']:.2g} of the "
            f"outputs' size, the adapter changed {parity['effect']:.2g}"
        )
    lines += [f"note: {note}" for note in written.details.get("notes", ())]
    return [*lines, f"next: fedtune release verify {written.folder} --coordinator-key {study.coordinator}"]


def _verdict_document(verdict: "Verdict") -> dict[str, Any]:
    from dataclasses import asdict

    manifest = verdict.manifest
    known = {} if manifest is None else manifest.model_dump(mode="json", include={"kind", "study", "plan_sha256"})
    return {
        "holds": verdict.holds,
        "exit_code": 0 if verdict.holds else found_something,
        **known,
        "findings": [asdict(finding) for finding in verdict.findings],
        "coordinator": None if manifest is None else manifest.coordinator,
        "key_checked": verdict.key_checked,
        "base_checked": verdict.base_checked,
        "journals": list(verdict.journals),
        "countersigned": list(verdict.countersigned),
    }


def _verdict_lines(folder: Path, verdict: "Verdict") -> list[object]:
    if verdict.manifest is None:
        return [f"{folder} is no release: {verdict.findings[0].text}"]
    manifest = verdict.manifest
    lines: list[object] = [
        f"{folder}: {manifest.kind} of the study {manifest.study}, plan {manifest.plan_sha256[:16]}…"
    ]
    if verdict.findings:
        made = table("found", "in", "", unbroken={"found"})
        for finding in verdict.findings:
            add(made, finding.code, finding.subject, finding.text)
        return [*lines, made, f"it does not hold: {len(verdict.findings)} found"]
    return [*lines, "nothing was found", *_limits(verdict)]


def _limits(verdict: "Verdict") -> list[str]:
    """Say what nothing being found does not mean."""
    manifest = verdict.manifest
    assert manifest is not None  # noqa: S101 - what has no manifest has a finding
    lines = []
    if not verdict.key_checked:
        lines.append(
            f"the coordinator's key {manifest.coordinator} was believed: compare it, or give --coordinator-key"
        )
    if not verdict.base_checked:
        lines.append(f"the base model was not looked at: --base FOLDER with the content {manifest.base.sha256[:16]}…")
    unread = [site.name for site in manifest.sites if site.name not in verdict.journals]
    if unread:
        lines.append(f"ε of {', '.join(unread)} is what they reported: their journals were not given (--journal FILE)")
    if verdict.countersigned:
        lines.append(f"countersigned by {', '.join(verdict.countersigned)}")
    return lines
