"""How the command line says that something went wrong: the one place where an exception becomes text.

Two lines on stderr, `error[code]: message` and `hint: ...`; with `--format json` one JSON object
`{"error": {"code": ..., "message": ..., "hint": ...}}`; a traceback only with `--verbose`. Exit codes: the error
class's own (2, 3), 130 after Ctrl-C, 1 for a fault of fedtune.
"""

import errno
import json
import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import click

from fedtune.display import printable
from fedtune.errors import FedtuneError, RunError

space_errors = {errno.ENOSPC: "disk-full", errno.EDQUOT: "disk-full"}
access_errors = {errno.EACCES: "no-access", errno.EPERM: "no-access", errno.EROFS: "no-access"}
interrupted = 130


@dataclass(frozen=True, slots=True)
class Failure:
    """What is printed and the exit code."""

    code: str
    message: str
    hint: str
    exit_code: int


@dataclass(frozen=True, slots=True)
class Style:
    """How the user asked for errors."""

    verbose: bool
    as_json: bool


def read_style(arguments: Sequence[str]) -> Style:
    """Find `--verbose` and `--format json` anywhere before `--`, so that they hold even where parsing fails."""
    options = list(arguments[: arguments.index("--")] if "--" in arguments else arguments)
    formats = {after for option, after in pairwise(options) if option == "--format"}
    return Style("--verbose" in options, "json" in formats or "--format=json" in options)


def report(error: BaseException, style: Style) -> int:
    """Print what happened on stderr and return the exit code."""
    failure = describe(error)
    trace = "".join(traceback.format_exception(error)) if style.verbose else ""
    if style.as_json:
        fields = {"code": failure.code, "message": failure.message, "hint": failure.hint}
        click.echo(json.dumps({"error": fields | ({"traceback": trace} if trace else {})}), err=True)
        return failure.exit_code
    if trace:
        click.echo(printable(trace), err=True, nl=False)
    click.echo(_coloured(f"error[{failure.code}]:", "red") + f" {printable(failure.message)}", err=True)
    if failure.hint:
        click.echo(_coloured("hint:", "cyan") + f" {printable(failure.hint)}", err=True)
    return failure.exit_code


def describe(error: BaseException) -> Failure:
    """Decide the code, message, hint and exit code of any exception."""
    if isinstance(error, OSError):
        error = _known_os_error(error) or error
    if isinstance(error, FedtuneError):
        return Failure(error.code, error.message, error.hint, error.exit_code)
    if isinstance(error, click.ClickException):
        return Failure("usage", error.format_message(), _usage_hint(error), error.exit_code)
    if isinstance(error, KeyboardInterrupt | click.Abort):
        hint = str(error) or "a run with a checkpoint continues with `fedtune simulate --resume RUN`"
        return Failure("interrupted", "stopped by Ctrl-C", hint, interrupted)
    message = f"{type(error).__name__}: {error}"
    return Failure("internal", message, "this is a fault of fedtune; --verbose shows where, please report it", 1)


def _known_os_error(error: OSError) -> FedtuneError | None:
    where = error.filename if error.filename is not None else "the run folder"
    if error.errno in space_errors:
        hint = "free some space or choose another folder with run.dir=PATH"
        return RunError(space_errors[error.errno], f"no space left on the device while writing {where}", hint=hint)
    if error.errno in access_errors:
        hint = "check its owner and permissions, or choose another folder with run.dir=PATH"
        return RunError(access_errors[error.errno], f"{where}: {error.strerror}", hint=hint)
    return None


def _usage_hint(error: click.ClickException) -> str:
    context = error.ctx if isinstance(error, click.UsageError) else None
    return f"{context.command_path if context is not None else 'fedtune'} --help"


def _coloured(text: str, colour: str) -> str:
    return text if "NO_COLOR" in os.environ or not sys.stderr.isatty() else click.style(text, fg=colour, bold=True)
