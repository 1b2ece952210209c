"""Whole studies through the coordinator's own loop, with sites whose answers a test writes: nothing trains."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedtune.config import machine as machine_facts
from fedtune.config.compose import compose
from fedtune.config.machine import Machine
from fedtune.config.plan import PLAN_KEY, StudyPlan
from fedtune.errors import FedtuneError
from fedtune.evaluation.metrics import Confusion, Tally
from fedtune.evaluation.site_metrics import Measured, UnitMeans
from fedtune.flower.engine import run
from fedtune.flower.messages import (
    Description,
    Evaluation,
    Instruction,
    Update,
    decode_instruction,
    encode_reply,
    refusal_of,
)
from fedtune.journal.witness import Head, require_extends
from fedtune.model.layout import AdapterState
from fedtune.privacy.accounting import Event, merge
from fedtune.run.folder import RunFolder, create
from fedtune.simulation.resolve import resolve
from tests.support.journals import MemoryJournal

Twist = Callable[[Update], RecordDict]
_FIXED = [
    "data.text=text",
    "data.label=category",
    "model.head=pooled",
    "model.head_init=zero",
    "training.sampling_rate=1",
    "training.local_steps=1",
    "aggregation.algorithm=fedit",
    "aggregation.server_optimizer=fedavg",
    "privacy.delta=1e-3",
    "evaluation.site_metrics=off",
    "run.threads=1",
    "run.device=cpu",
]


def site_name(index: int) -> str:
    """Return the name of a scripted site."""
    return f"bank-{index}"


@dataclass
class ScriptedSites:
    """Sites that return the adapter they were sent plus `shift(index)`, except where a twist says otherwise.

    `twists` maps (site, round) to what replaces the honest answer; a site is charged for a round whatever becomes of
    its answer. `asked` records who was asked to train in which round, `measured` the rounds each site evaluated. Each
    site keeps a journal in memory and, unless it is one of the `careless`, refuses an instruction whose receipt this
    journal does not extend.
    """

    plan: StudyPlan
    twists: dict[tuple[str, int], Twist] = field(default_factory=dict)
    units: Mapping[str, int] = field(default_factory=dict)
    names: Mapping[int, str] = field(default_factory=dict)
    asked: dict[int, list[str]] = field(default_factory=dict)
    trained: Counter[str] = field(default_factory=Counter)
    measured: dict[str, list[int]] = field(default_factory=dict)
    journals: dict[str, MemoryJournal] = field(default_factory=dict)
    careless: set[str] = field(default_factory=set)

    @property
    def app(self) -> ClientApp:
        """The sites as one Flower application."""
        app = ClientApp()
        app.query("describe")(self._careful(self._describe))
        app.train()(self._careful(self._train))
        app.evaluate()(self._careful(self._evaluate))
        return app

    def shift(self, name: str) -> np.float32:
        """Return by how much a site moves every number of the adapter in a round."""
        return np.float32(0.01 * (int(name.rsplit("-", 1)[1]) + 1))

    def events(self, name: str) -> tuple[Event, ...]:
        """Return what a site has spent."""
        promise, steps = self.plan.promise, self.trained[name] * self.plan.training.local_steps
        if promise.mode == "off":
            return ()
        evaluations = len(self.measured.get(name, [])) if promise.evaluations else 0
        return merge([promise.event(steps), promise.evaluation_event(evaluations)])

    def _name(self, context: Context) -> str:
        index = int(context.node_config["partition-id"])
        return self.names.get(index, site_name(index))

    def journal(self, name: str) -> MemoryJournal:
        """Return a site's journal."""
        if name not in self.journals:
            self.journals[name] = MemoryJournal.create(name)
        return self.journals[name]

    def head(self, name: str) -> Head:
        """Sign where a site's journal stands."""
        return Head.of(self.journal(name))

    def _careful(self, act: Callable[[str, Instruction], RecordDict]) -> Callable[[Message, Context], Message]:
        """Let a site act only on an instruction whose receipt its journal extends."""

        def answer(message: Message, context: Context) -> Message:
            name, instruction = self._name(context), decode_instruction(message.content, self.plan.sha256)
            try:
                if instruction.receipt is not None and name not in self.careless:
                    require_extends(self.journal(name), instruction.receipt)
            except FedtuneError as error:
                return Message(encode_reply(refusal_of(error)), reply_to=message)
            return Message(act(name, instruction), reply_to=message)

        return answer

    def _describe(self, name: str, _instruction: Instruction) -> RecordDict:
        units, events = self.units.get(name, 100), self.events(name)
        return encode_reply(Description(self.plan.sha256, name, units, "d" * 64, events, self.head(name)))

    def _train(self, name: str, instruction: Instruction) -> RecordDict:
        self.asked.setdefault(instruction.round, []).append(name)
        self.trained[name] += 1
        self.journal(name).write()
        return self.twists.get((name, instruction.round), encode_reply)(self._honest(name, instruction))

    def _honest(self, name: str, instruction: Instruction) -> Update:
        state = {key: array + self.shift(name) for key, array in instruction.adapter.items()}
        return Update(self.plan.sha256, name, instruction.round, state, self.events(name), self.head(name))

    def _evaluate(self, name: str, instruction: Instruction) -> RecordDict:
        classes = len(self.plan.task.labels)
        self.measured.setdefault(name, []).append(instruction.round)
        tally: Measured = Tally(1.0, 2, 0, Confusion.of([0, 1], [0, 0], classes))
        if self.plan.evaluation.site_metrics != "clear":
            tally = UnitMeans((0.5, 1.0), 20, (0.0, 0.0))
        arrays, head = tally.to_arrays(), self.head(name)
        return encode_reply(Evaluation(self.plan.sha256, name, instruction.round, arrays, head))


@dataclass(frozen=True)
class TinyStudy:
    """A plan, its machine and its scripted sites."""

    plan: StudyPlan
    machine: Machine
    sites: ScriptedSites

    @property
    def folder(self) -> RunFolder:
        """The run folder."""
        return RunFolder(self.machine.run)

    def start(self) -> dict[str, Any]:
        """Run it in a new run folder, and return its summary."""
        create(self.plan, self.machine)
        return self.go_on()

    def go_on(self) -> dict[str, Any]:
        """Run what is left of it, and return its summary."""
        from fedtune_server.app import app as server

        machine_facts.announce(self.folder.machine_file)
        run("inprocess", server, self.sites.app, self.plan.federation.sites, {PLAN_KEY: self.plan.json_text})
        summary = self.folder.summary()
        assert summary is not None
        return summary

    def lines(self) -> list[dict[str, Any]]:
        """Return the lines of `metrics.jsonl`."""
        return [json.loads(line) for line in self.folder.metrics_file.read_text().splitlines()]

    def adapter(self) -> AdapterState:
        """Return the newest checkpoint's adapter."""
        from fedtune_server.checkpoint import latest_checkpoint

        checkpoint = latest_checkpoint(self.folder.checkpoints, self.plan.sha256)
        assert checkpoint is not None
        return checkpoint.state.adapter


def tiny_study(base: Path, records: Path, run_dir: Path, *overrides: str) -> TinyStudy:
    """Resolve a study of a tiny model with `overrides`; its sites' records are never read while it runs."""
    paths = [f"model.base={base}", f"data.path={records}", f"run.dir={run_dir}"]
    found = resolve(compose([*_FIXED, *paths, *overrides]))
    return TinyStudy(found.plan, found.machine, ScriptedSites(found.plan))
