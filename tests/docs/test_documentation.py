"""Every `sh` command in the documentation runs, on a tiny model and few records; every `python` block, as written."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from fedtune.cli import main
from fedtune.config.compose import compose
from fedtune.config.overrides import expand_sweep
from tests.support.runs import ROOT
from tests.support.tiny import bank_csv, tiny_base

PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "benchmarks").rglob("*.md")),
]
WALKS = {  # one story each, which another test runs in order
    "site-operator.md",  # tests/client/commands/test_pages.py
    "site-authority.md",
    "federation.md",  # test_walkthrough.py
    "release.md",  # tests/release/test_release_page.py
    "hub.md",  # tests/commands/test_pull.py
    "generation.md",  # tests/commands/test_chat_command.py
    "deployment.md",  # tests/deploy/test_kit.py: for administrators, so that its commands are parsed
}
BLOCK = re.compile(r"^```sh\n(.*?)^```", re.MULTILINE | re.DOTALL)
EXAMPLE = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
EXAMPLES = [
    pytest.param(code, id=f"{page.name}-{at}")
    for page in PAGES
    for at, code in enumerate(EXAMPLE.findall(page.read_text(encoding="utf-8")))
]


def commands() -> list[str]:
    found: dict[str, None] = {}
    for page in (page for page in PAGES if page.name not in WALKS):
        for block in BLOCK.findall(page.read_text(encoding="utf-8")):
            for line in block.splitlines():
                command = line.split("#", 1)[0].strip()
                if command:
                    found[command] = None
    return list(found)


FEDTUNE = [command for command in commands() if command.startswith("fedtune ")]
OTHERS = [command for command in commands() if not command.startswith("fedtune ")]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with bank.csv, records.csv (of patients), a tiny model, and one finished run."""
    folder = tmp_path_factory.mktemp("docs")
    bank_csv(folder / "bank.csv", rows=120, labels=3)
    bank_csv(folder / "records.csv", rows=120, labels=3, patients=40)
    tiny_base(folder / "base")
    run = ["simulate", "data.path=bank.csv", "data.text=text", "data.label=category", "federation.sites=3"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main([*run, *small(folder, "fedtune simulate"), "run.dir=finished"]) == 0
    return folder


def small(folder: Path, command: str) -> list[str]:
    """Return what makes a command cheap without touching a key that it sets."""
    wanted = {
        "model.base": str(folder / "base"),
        "federation.rounds": "1",
        "data.limit": "120",
        "lora.layers": "null",
        "run.threads": "1",
        "training.physical_batch": "16",
    }
    return [f"{key}={value}" for key, value in wanted.items() if f" {key}=" not in command]


def test_the_documentation_has_commands_to_run() -> None:
    assert len(FEDTUNE) > 10
    assert any(command.startswith("fedtune simulate") for command in FEDTUNE)


@pytest.mark.parametrize("command", [command for command in FEDTUNE if "experiment=" not in command])
def test_a_documented_fedtune_command_runs(command: str, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    words = shlex.split(command.replace("RUN", "finished"))[1:]
    takes_overrides = words[0] in {"simulate", "plan", "data"} and "--resume" not in words
    extra = small(workplace, command) if takes_overrides else []
    assert main([*words, *extra]) == 0


@pytest.mark.parametrize("command", [command for command in FEDTUNE if "experiment=" in command])
def test_a_documented_experiment_composes(command: str) -> None:
    words = shlex.split(command)[2:]
    assert all(compose(variant).study.name for variant in expand_sweep(words))


@pytest.mark.parametrize("command", [command for command in OTHERS if command.startswith("make ")])
def test_a_documented_make_target_exists(command: str) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(rf"^{re.escape(command.split()[1])}:", makefile, re.MULTILINE)


@pytest.mark.parametrize("command", [command for command in OTHERS if command.startswith("python -m ")])
def test_a_documented_benchmark_is_a_module_here(command: str) -> None:
    module = command.split()[2].replace(".", "/")
    assert (ROOT / module / "__main__.py").exists() or (ROOT / f"{module}.py").exists()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("code", EXAMPLES)
def test_a_documented_example_runs(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "example", "exec"), {"__name__": "example"})


def test_every_documented_command_is_of_a_kind_that_is_tested() -> None:
    assert all(command.startswith(("make ", "python -m ", ".venv/bin/")) for command in OTHERS)
