from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

Run = Callable[..., subprocess.CompletedProcess[str]]

plugins = '''
import errno
import os
import time

import typer

from fedtune.commands.options import Format, OutputFormat, Verbose
from fedtune.errors import DataError, FederationError

one = typer.Typer()
several = typer.Typer()
not_an_app = "text"


@one.command()
def only(kind: str, *, output: Format = OutputFormat.text, verbose: Verbose = False) -> None:
    """Fail in one way."""
    if kind == "data":
        raise DataError("missing-column", "no column \\x1b[31mlabel\\nin bank.csv", hint="add data.label=NAME")
    if kind == "federation":
        raise FederationError("no-quorum", "2 of 8 sites")
    if kind == "full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/x/plan.json")
    if kind == "denied":
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "runs/x")
    if kind == "bug":
        raise ValueError("unexpected")
    if kind == "stop":
        raise KeyboardInterrupt("fedtune simulate --resume runs/x")
    if kind == "wait":
        print("ready", flush=True)
        time.sleep(60)


@several.command()
def first() -> None:
    """Print a word."""
    print("first")


@several.command()
def second() -> None:
    """Print another."""
    print("second")
'''


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Install commands beside fedtune's own, through entry points as another package would."""
    (tmp_path / "probe_commands.py").write_text(plugins)
    (tmp_path / "probe_broken.py").write_text("import a_module_that_nobody_has\n")
    info = tmp_path / "probe-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: probe\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[fedtune.commands]\nprobe = probe_commands:one\nprobes = probe_commands:several\n"
        "broken = probe_broken:app\nwrong = probe_commands:not_an_app\n"
    )
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    return os.environ | {"PYTHONPATH": path, "COLUMNS": "120"}


@pytest.fixture
def run(environment: dict[str, str]) -> Run:
    """Run `fedtune` in a process of its own."""

    def run_process(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "fedtune.cli", *arguments]
        return subprocess.run(command, env=environment | variables, capture_output=True, text=True, check=False)

    return run_process


def test_version_names_what_a_report_needs_and_loads_nothing_heavy(environment: dict[str, str]) -> None:
    code = (
        "import sys; from fedtune.cli import main; main(['--version']); "
        "print([name for name in ('torch', 'transformers', 'hydra', 'pydantic', 'flwr') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    words = [line.split()[0] for line in done.stdout.splitlines()]
    assert words == ["fedtune", "Python", "flwr", "torch", "[]"]


def test_listing_the_commands_loads_nothing_heavy(environment: dict[str, str]) -> None:
    code = (
        "import sys; from fedtune.cli import main; main(['--help']); "
        "sys.exit(str([name for name in ('torch', 'transformers', 'hydra', 'flwr') if name in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stderr.strip() == "[]"


def test_help_lists_every_installed_command_with_its_sentence(run: Run) -> None:
    done = run("--help")
    assert done.returncode == 0
    for text in ("config", "probe", "Fail in one way.", "probes", "a_module_that_nobody_has"):
        assert text in done.stdout


def test_an_app_of_one_command_is_a_command_and_an_app_of_several_is_a_group(run: Run) -> None:
    assert run("probe", "nothing").returncode == 0
    assert run("probes", "second").stdout == "second\n"
    assert "completion" not in run("probe", "--help").stdout


@pytest.mark.parametrize("name", ["broken", "wrong"])
def test_a_command_that_cannot_be_imported_says_so_and_the_others_work(run: Run, name: str) -> None:
    done = run(name, "KEY=VALUE", "--help")
    assert done.returncode == 2
    assert done.stderr.startswith(f"error[fedtune.broken-command]: the command {name} cannot be loaded from probe_")
    assert "Traceback" not in done.stderr
    assert "Traceback" in run(name, "--verbose").stderr
    assert run("config", "ls").returncode == 0


@pytest.mark.parametrize(
    ("kind", "exit_code", "error", "hint"),
    [
        ("data", 2, r"error[data.missing-column]: no column \x1b[31mlabel", "hint: add data.label=NAME"),
        ("federation", 3, "error[federation.no-quorum]: 2 of 8 sites", ""),
        ("full", 2, "error[run.disk-full]: no space left on the device while writing runs/x/plan.json", "run.dir=PATH"),
        ("denied", 2, "error[run.no-access]: runs/x: Permission denied", "run.dir=PATH"),
        ("bug", 1, "error[internal]: ValueError: unexpected", "--verbose"),
        ("stop", 130, "error[interrupted]: stopped by Ctrl-C", "hint: fedtune simulate --resume runs/x"),
    ],
)
def test_an_error_is_a_line_a_hint_and_an_exit_code(run: Run, kind: str, exit_code: int, error: str, hint: str) -> None:
    done = run("probe", kind)
    assert done.returncode == exit_code
    assert done.stdout == ""
    assert done.stderr.startswith(error)
    assert hint in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("arguments", [("--verbose", "probe", "bug"), ("probe", "bug", "--verbose")])
def test_verbose_shows_the_traceback_before_or_after_the_command(run: Run, arguments: tuple[str, ...]) -> None:
    done = run(*arguments)
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback")
    assert done.stderr.splitlines()[-2] == "error[internal]: ValueError: unexpected"


@pytest.mark.parametrize("option", [("--format", "json"), ("--format=json",)])
def test_with_format_json_an_error_is_one_json_object(run: Run, option: tuple[str, ...]) -> None:
    error = json.loads(run("probe", "data", *option).stderr)["error"]
    assert error == {
        "code": "data.missing-column",
        "message": "no column \x1b[31mlabel\nin bank.csv",
        "hint": "add data.label=NAME",
    }
    usage = json.loads(run("probe", "data", *option, "--nope").stderr)["error"]
    assert usage["code"] == "usage"
    assert "Traceback" in json.loads(run("probe", "bug", *option, "--verbose").stderr)["error"]["traceback"]


@pytest.mark.parametrize(
    ("arguments", "problem", "hint"),
    [
        (("confg",), "no command confg; did you mean config?", "fedtune --help"),
        (("zzz",), "no command zzz; there are", "fedtune --help"),
        (("probe",), "Missing argument", "fedtune probe --help"),
        (("config", "show", "--nope"), "--nope", "fedtune config show --help"),
    ],
)
def test_a_wrong_command_line_is_the_same_kind_of_error(
    run: Run, arguments: tuple[str, ...], problem: str, hint: str
) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert problem in done.stderr
    assert done.stderr.startswith("error[usage]: ")
    assert done.stderr.endswith(f"hint: {hint}\n")


def test_ctrl_c_ends_with_130_and_a_hint(environment: dict[str, str]) -> None:
    command = [sys.executable, "-m", "fedtune.cli", "probe", "wait"]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert errors.startswith("error[interrupted]")
    assert "--resume" in errors
    assert "Traceback" not in errors


def test_a_reader_that_leaves_early_is_not_an_error(environment: dict[str, str]) -> None:
    command = f"{sys.executable} -m fedtune.cli config ls | head -n 1"
    done = subprocess.run(command, shell=True, env=environment, capture_output=True, text=True, check=True)
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("config show privacy.no", ["privacy.noise_multiplier=", "privacy.noise="]),
        ("config show privacy = o", ["off"]),
        ("config show privacy =", ["dp", "off"]),
        ("config show experiment = medquad privacy.mode = ", ["dp", "off"]),
        ("config show training.optimizer = sgd,", ["sgd,sgd", "sgd,adamw"]),
        ("con", ["config"]),
    ],
)
def test_bash_completes_keys_options_and_named_values(run: Run, words: str, offered: list[str]) -> None:
    done = run(COMP_WORDS=f"fedtune {words}", COMP_CWORD=str(words.count(" ") + 1), _FEDTUNE_COMPLETE="complete_bash")
    assert done.stdout.split() == offered


def test_zsh_completes_a_whole_word_with_descriptions(run: Run) -> None:
    done = run(_TYPER_COMPLETE_ARGS="fedtune config show privacy=o", _FEDTUNE_COMPLETE="complete_zsh")
    assert '"privacy=off":"' in done.stdout
    assert "NOT PRIVATE" in done.stdout
    assert "privacy=dp" not in done.stdout
