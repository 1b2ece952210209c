"""A simulated site behind Flower's in-process grid, asked as a coordinator asks it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import torch

from fedtune.config.machine import ENVIRONMENT_VARIABLE
from fedtune.config.plan import PLAN_KEY, StudyPlan
from fedtune.flower.grid import InProcessGrid
from fedtune.flower.messages import Instruction, encode_instruction
from fedtune.run.folder import create
from fedtune_client.app import app
from tests.support.bench import Bench, make_bench
from tests.support.journal_lines import charged_rounds

if TYPE_CHECKING:
    from pathlib import Path

    from flwr.app import Message

    from fedtune.model.layout import AdapterState


@dataclass(frozen=True, slots=True)
class Coordinator:
    """Asks one site of a study; `plan_text` is what the site is given as the plan."""

    bench: Bench
    plan_text: str

    @property
    def plan(self) -> StudyPlan:
        return self.bench.plan

    @property
    def download(self) -> AdapterState:
        """The adapter as this plan's algorithm sends it before the first round."""
        return {name: self.bench.workspace.initial[name] for name in self.bench.download.names}

    @property
    def journal(self) -> Path:
        return self.bench.machine.run / "sites" / self.bench.name / f"{self.bench.name}.journal"

    @property
    def charged(self) -> list[int]:
        """The rounds that the site has charged."""
        return charged_rounds(self.journal)

    def ask(self, kind: str, number: int = 1, adapter: AdapterState | None = None, **fields: Any) -> Message:
        grid = InProcessGrid(app, self.plan.federation.sites, {PLAN_KEY: self.plan_text})
        sent = self.download if adapter is None else adapter
        instruction = Instruction(fields.get("plan_sha256", self.plan.sha256), number, sent)
        message = grid.create_message(encode_instruction(instruction), kind, grid.get_node_ids()[0], str(number), 60.0)
        (reply,) = grid.send_and_receive([message])
        return reply


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Coordinator]:
    torch.set_num_threads(1)

    def make(architecture: str = "bert", head: str = "pooled", **keys: Any) -> Coordinator:
        bench = make_bench(tmp_path, architecture, head, **keys)
        folder = create(bench.plan, bench.machine)
        monkeypatch.setenv(ENVIRONMENT_VARIABLE, str(folder.machine_file))
        return Coordinator(bench, bench.plan.json_text)

    return make
