"""The service kit and its page: units and image start what there is, and say nothing that the code does not know."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path

import click
import pytest
import typer

from fedtune.cli import app
from fedtune.processes.supervisor import ChildSpec
from fedtune_client.commands.unlocking import kinds
from fedtune_server.folder import CoordinatorFolder
from fedtune_server.settings import CoordinatorSettings
from tests.support.runs import ROOT

DEPLOY, PAGE = ROOT / "deploy", ROOT / "docs" / "deployment.md"
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
DOCKERFILE = DEPLOY / "Dockerfile"
VARIABLE = re.compile(r"FEDTUNE_[A-Z_]*[A-Z](?![A-Z_])")
SH = re.compile(r"^```sh\n(.*?)^```", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"\bfedtune ((?:server|client|audit) [^`\n]*)")
OTHERS = {"cd", "curl", "export", "sudo"}
CHILDREN = 2  # of each role
KILLED_WITHIN = 5.0  # seconds, after a child's grace


def settings_of(unit: Path) -> Iterator[tuple[str, str]]:
    for line in unit.read_text("utf-8").splitlines():
        if line and line[0] not in "#[":
            key, _, value = line.partition("=")
            yield key, value


def values(unit: Path, key: str) -> list[str]:
    return [value for name, value in settings_of(unit) if name == key]


def environment(unit: Path) -> dict[str, str]:
    words = [word for value in values(unit, "Environment") for word in shlex.split(value)]
    return dict(word.split("=", 1) for word in words)


def parse(words: Sequence[str]) -> None:
    """Let the command line read words as it would, up to the point where it would act."""
    command: click.Command = typer.main.get_command(app)
    rest = list(words)
    while isinstance(command, click.Group):
        assert rest, f"{command.name} is not a whole command"
        found = command.get_command(click.Context(command), rest[0])
        assert found is not None, f"there is no command {rest[0]} in {words}"
        command, rest = found, rest[1:]
    command.make_context(command.name, rest)


def variables_of_the_code() -> set[str]:
    folders = (ROOT / "fedtune", ROOT / "server", ROOT / "client", ROOT / "conf")
    sources = [path for folder in folders for kind in ("*.py", "*.yaml") for path in folder.rglob(kind)]
    found = {name for path in sources for name in VARIABLE.findall(path.read_text("utf-8"))}
    families = {"FEDTUNE_VAULT", "FEDTUNE_EXPORT", "FEDTUNE_NEW"}
    assert families <= found
    return (found - families) | {f"{family}_{kind}" for family in families for kind in kinds}


def lines_of_the_page() -> list[str]:
    return [line for block in SH.findall(PAGE.read_text("utf-8")) for line in block.splitlines()]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd on this machine")
@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_systemd_finds_nothing_wrong_with_a_unit(unit: Path) -> None:
    words = ["systemd-analyze", "verify", "--man=no", str(unit)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
    said = [line for line in done.stderr.splitlines() if "is not executable: No such file" not in line]
    assert said == []


def test_a_linter_finds_nothing_wrong_with_the_image() -> None:
    beside = Path(sys.executable).with_name("hadolint")
    hadolint = str(beside) if beside.exists() else shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not installed: its package is for Linux on x86_64")
    done = subprocess.run([hadolint, "--no-color", str(DOCKERFILE)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_a_unit_starts_a_command_that_there_is(unit: Path) -> None:
    (start,) = values(unit, "ExecStart")
    program, *words = shlex.split(start)
    assert Path(program).name == "fedtune"
    parse(words)


@pytest.mark.parametrize("file", [*UNITS, DOCKERFILE], ids=lambda file: file.name)
def test_what_the_kit_says_in_remarks_are_commands_too(file: Path) -> None:
    remarks = "\n".join(line.removeprefix("#") for line in file.read_text("utf-8").splitlines() if line[:1] == "#")
    found = COMMAND.findall(remarks)
    assert found
    for words in found:
        parse(shlex.split(words))


def test_the_image_starts_a_command_that_there_is() -> None:
    text = DOCKERFILE.read_text("utf-8")
    found = re.findall(r"^(ENTRYPOINT|CMD) (\[.*\])$", text, re.MULTILINE)
    said = {name: json.loads(words) for name, words in found}
    assert said["ENTRYPOINT"] == ["fedtune"]
    parse(said["CMD"])


def test_what_the_image_copies_is_there_and_is_not_ignored() -> None:
    copied = re.findall(r"^COPY (.*) \S+$", DOCKERFILE.read_text("utf-8"), re.MULTILINE)
    let_in = (ROOT / ".dockerignore").read_text("utf-8")
    for name in " ".join(copied).split():
        assert (ROOT / name).exists()
        assert f"!{name}\n" in let_in or f"!{name}/**\n" in let_in


@pytest.mark.parametrize("file", [*UNITS, DOCKERFILE], ids=lambda file: file.name)
def test_every_variable_that_the_kit_sets_is_one_that_the_code_reads(file: Path) -> None:
    named = set(VARIABLE.findall(file.read_text("utf-8")))
    assert named
    assert named <= variables_of_the_code()


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_a_unit_gives_its_role_a_folder_that_it_may_write(unit: Path) -> None:
    (state,), (may_write,) = values(unit, "StateDirectory"), values(unit, "ReadWritePaths")
    folder = environment(unit)["FEDTUNE_SITE" if "client" in unit.name else "FEDTUNE_COORDINATOR"]
    assert may_write == f"/var/lib/{state}"
    assert Path(folder).is_relative_to(may_write)


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_a_unit_leaves_the_supervisor_the_time_to_end_its_children(unit: Path) -> None:
    (grace,) = (field.default for field in fields(ChildSpec) if field.name == "grace")
    (seconds,) = values(unit, "TimeoutStopSec")
    assert isinstance(grace, float)
    assert float(seconds) > CHILDREN * (grace + KILLED_WITHIN)


def test_a_sites_key_is_a_file_of_its_user_alone_in_a_folder_that_goes_with_the_service() -> None:
    unit = DEPLOY / "systemd" / "fedtune-client.service"
    (copy,), (runtime,) = values(unit, "ExecStartPre"), values(unit, "RuntimeDirectory")
    *_, mode, source, target = shlex.split(copy)
    assert (mode, source, target) == ("0400", "%d/vault-key", environment(unit)["FEDTUNE_VAULT_KEY_FILE"])
    assert Path(target).parent == Path("%t") / runtime == Path(environment(unit)["XDG_RUNTIME_DIR"])


def test_every_command_of_the_page_is_one_that_the_command_line_takes() -> None:
    found = [words for line in lines_of_the_page() for words in COMMAND.findall(line)]
    assert len(found) > 12
    for words in found:
        parse(shlex.split(words))


def test_every_other_line_of_the_page_is_of_a_kind_that_an_administrator_knows() -> None:
    lines = [line for line in lines_of_the_page() if not line.startswith("fedtune ")]
    assert {line.split()[0] for line in lines} - OTHERS == {"(umask"}
    for named in re.findall(r"deploy/\S+\.service", "\n".join(lines)):
        assert (ROOT / named).exists()


def test_the_page_names_every_variable_of_the_code_and_no_other() -> None:
    assert set(VARIABLE.findall(PAGE.read_text("utf-8"))) == variables_of_the_code()


def test_the_page_names_the_ports_that_there_are() -> None:
    text = PAGE.read_text("utf-8")
    for name in ("private_port", "health_port"):
        assert f"| `{name}`, {CoordinatorSettings.model_fields[name].default} | coordinator |" in text


def test_the_page_says_of_every_file_of_a_coordinator_whether_it_is_to_be_kept() -> None:
    folder = CoordinatorFolder(Path("coordinator"))
    places = [name for name, value in vars(CoordinatorFolder).items() if isinstance(value, property)]
    there = {getattr(folder, place).relative_to(folder.path).parts[0] for place in places}
    rows = PAGE.read_text("utf-8").partition("| coordinator's |")[2].partition("\n\n")[0].splitlines()[2:]
    assert {name.rstrip("/") for row in rows for name in re.findall(r"`([^`]+)`", row.split("|")[1])} == there


def test_every_setting_and_code_of_the_page_exists() -> None:
    text = PAGE.read_text("utf-8")
    shipped = (ROOT / "conf" / "config.yaml").read_text("utf-8")
    for key in re.findall(r"`federation\.([a-z_]+)`", text):
        assert re.search(rf"^  {key}: ", shipped, re.MULTILINE), key
    folders = (ROOT / "fedtune", ROOT / "server", ROOT / "client")
    sources = "".join(path.read_text("utf-8") for folder in folders for path in folder.rglob("*.py"))
    codes = re.findall(r"`(?:federation|journal)\.([a-z]+-[a-z-]+)`", text)
    assert codes
    for slug in codes:
        assert f'"{slug}"' in sources, slug
