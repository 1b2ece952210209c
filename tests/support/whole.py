"""Whole studies in this process, sites and coordinator both real: every message seen, any of them lost or changed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Error, Message, RecordDict
from flwr.common.constant import ErrorCode

from fedtune.aggregation.lora.protocol import ServerState
from fedtune.config import machine as machine_facts
from fedtune.config.compose import compose
from fedtune.config.machine import Machine
from fedtune.config.plan import PLAN_KEY, StudyPlan
from fedtune.flower.grid import InProcessGrid
from fedtune.flower.messages import (
    Description,
    Instruction,
    Refusal,
    Update,
    content_bytes,
    decode_description,
    decode_instruction,
    decode_update,
    encode_instruction,
    encode_reply,
)
from fedtune.model.layout import AdapterState
from fedtune.run.folder import RunFolder, create
from fedtune.simulation.resolve import resolve
from fedtune.simulation.workspace import open_workspace
from fedtune.training.local import Assignment, LocalResult
from fedtune_client import app as site_app
from fedtune_client import simulated
from fedtune_client.memory import KeptTensors
from fedtune_client.vault import Vault
from fedtune_server.app import run_study
from fedtune_server.checkpoint import latest_checkpoint
from fedtune_server.coordinator_key import coordinator_key
from fedtune_server.exchange import Exchange, Traffic
from fedtune_server.merging import Merging
from fedtune_server.witness import Witness
from tests.support.tiny import bank_csv, question_jsonl, tiny_base

_WORDS = {
    "seed": "7",
    "data.max_tokens": "24",
    "data.holdout": "0.2",
    "model.head_init": "zero",
    "lora.rank": "2",
    "lora.alpha": "4",
    "privacy.noise_multiplier": "0.7",
    "privacy.clip_norm": "1",
    "privacy.delta": "1e-3",
    "training.sampling_rate": "0.5",
    "training.local_steps": "2",
    "training.learning_rate": "0.3",
    "training.head_learning_rate": "null",
    "training.noise_limit": "null",
    "training.physical_batch": "8",
    "aggregation.algorithm": "fedit",
    "aggregation.server_optimizer": "fedavg",
    "aggregation.weights": "[0.5,0.3,0.2]",
    "federation.sites": "3",
    "federation.rounds": "3",
    "run.threads": "1",
    "run.device": "cpu",
}


class Killed(Exception):  # noqa: N818 - no error of the code under test
    """What a test throws where a process would have died."""


@dataclass(frozen=True, slots=True)
class Letter:
    """One message to a site: `part` is the exchange of a training round, `content` what the site was sent."""

    kind: str
    number: int
    part: int
    site: str
    instruction: Instruction


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back, and its bytes on the wire."""

    letter: Letter
    update: Update | Refusal | None
    size: int


@dataclass(frozen=True, slots=True)
class Trained:
    """One training at a site, seen from inside: where it began, what it ended with, and what its round returned."""

    site: str
    number: int
    start: AdapterState
    state: AdapterState
    result: LocalResult


Meddle = Callable[[Letter], str | None]
Spoil = Callable[[Letter, RecordDict], RecordDict]


@dataclass
class Federation:
    """A study: `letters`, `replies` and `trainings` are all there were, in order, over every start of it.

    Before each message `meddle` is asked: `away` loses it, `kill` stops the study there; it may change files. `spoil`
    changes an answer to a training, `introduce` what a site says of itself, and `change` an instruction.
    """

    plan: StudyPlan
    machine: Machine
    letters: list[Letter] = field(default_factory=list)
    replies: list[Reply] = field(default_factory=list)
    trainings: list[Trained] = field(default_factory=list)
    meddle: Meddle = lambda _letter: None
    spoil: Spoil = lambda _letter, content: content
    introduce: Callable[[Description], Description] = lambda description: description
    change: Callable[[Letter], Instruction] = lambda letter: letter.instruction
    merging: Merging = field(init=False)

    def __post_init__(self) -> None:
        workspace = open_workspace(self.plan, self.machine)
        self.merging = Merging.of(self.plan, workspace.layout, workspace.initial)

    @property
    def folder(self) -> RunFolder:
        return RunFolder(self.machine.run)

    @property
    def sites(self) -> Path:
        return self.machine.run / "sites"

    @property
    def weights(self) -> Mapping[str, float]:
        """Each site's weight, by its name."""
        said = self.plan.aggregation.weights
        names = [f"site-{number + 1:03d}" for number in range(self.plan.federation.sites)]
        return dict.fromkeys(names, 1 / len(names)) if said == "equal" else dict(zip(names, said, strict=True))

    def run(self) -> dict[str, Any]:
        """Run what is left of the study, as a new process would, and return its summary."""
        self.begin()
        simulated._opened.cache_clear()
        machine_facts.announce(self.folder.machine_file)
        grid = _Watched(self)
        witness = Witness(self.machine.run, coordinator_key(self.machine.run / "coordinator.key"))
        run_study(self.plan, self.machine, Exchange(grid, self.plan.federation.deadline, Traffic(), witness))
        summary = self.folder.summary()
        assert summary is not None
        return summary

    def begin(self) -> None:
        """Make the run folder, if it is not there."""
        if not self.folder.plan_file.exists():
            create(self.plan, self.machine)

    def run_until_killed(self) -> None:
        """Run until `meddle` kills it."""
        with pytest.raises(Killed):
            self.run()

    def ask(self, kind: str, instruction: Instruction, site: str = "site-001") -> Update | Refusal:
        """Ask one site as a coordinator of the study would, outside of any round."""
        self.begin()
        machine_facts.announce(self.folder.machine_file)
        grid = InProcessGrid(site_app.app, self.plan.federation.sites, {PLAN_KEY: self.plan.json_text})
        node = grid.get_node_ids()[int(site.removeprefix("site-")) - 1]
        message = grid.create_message(encode_instruction(instruction), kind, node, str(instruction.round), 60.0)
        (reply,) = grid.send_and_receive([message])
        return decode_update(reply.content, self.plan.sha256)

    @property
    def state(self) -> ServerState:
        """The coordinator's state in its newest checkpoint."""
        checkpoint = latest_checkpoint(self.folder.checkpoints, self.plan.sha256)
        assert checkpoint is not None
        return checkpoint.state

    def state_after(self, number: int) -> ServerState:
        """The coordinator's state in the checkpoint of a round, one of the newest two."""
        from safetensors.numpy import load_file

        arrays = load_file(self.folder.checkpoints / f"round-{number:06d}.safetensors")
        mine = {name.removeprefix("state/"): array for name, array in arrays.items() if name.startswith("state/")}
        return ServerState.from_arrays(mine)

    def vault(self, site: str) -> Vault:
        """Open a simulated site's vault."""
        return simulated._vault(self.sites / site)

    def kept_names(self, site: str) -> list[str]:
        """Return the names of what a site keeps of this study between rounds."""
        return [name for name in self.vault(site).names() if name.startswith("kept-")]

    def kept_at(self, site: str, number: int) -> dict[str, np.ndarray]:
        """Return what a round has left at a site."""
        return dict(KeptTensors(self.vault(site), self.plan.sha256).at(number))

    def update_of(self, state: ServerState) -> dict[str, np.ndarray]:
        """Return W − W0 of each layer, dense, at the study's scale, from the coordinator's state."""
        factors = self.merging.algorithm.server.update(self.merging.layout, state)
        return {layer: self.scale * dense(A, B) for layer, (A, B) in factors.items()}

    @property
    def scale(self) -> float:
        return self.plan.lora.alpha / self.plan.lora.rank

    def lines(self) -> list[dict[str, Any]]:
        """Return the lines of `metrics.jsonl`."""
        return [json.loads(line) for line in self.folder.metrics_file.read_text("utf-8").splitlines()]

    def trained_in(self, number: int) -> dict[str, Trained]:
        """Return the last training of each site in a round."""
        return {one.site: one for one in self.trainings if one.number == number}

    def letters_to(self, site: str, kind: str = "train") -> list[Letter]:
        return [letter for letter in self.letters if (letter.site, letter.kind) == (site, kind)]

    def released(self) -> dict[str, bytes]:
        """Return the bytes of the released tensors by file."""
        return {path.name: path.read_bytes() for path in sorted(self.folder.adapter.glob("*.safetensors"))}


class _Watched(InProcessGrid):
    """The grid, with a hand in it."""

    def __init__(self, study: Federation) -> None:
        super().__init__(site_app.app, study.plan.federation.sites, {PLAN_KEY: study.plan.json_text})
        self._study = study

    def _execute(self, message: Message) -> Message | None:
        study = self._study
        letter = self._letter(message)
        study.letters.append(letter)
        fate = study.meddle(letter)
        if fate == "kill":
            raise Killed
        if fate == "away":
            return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "lost"), reply_to=message)
        changed = study.change(letter)
        if changed is not letter.instruction:
            message.__dict__["_content"] = encode_instruction(changed)
        reply = super()._execute(message)
        if reply is not None and letter.kind == "query.describe":
            described = decode_description(reply.content, study.plan.sha256)
            assert isinstance(described, Description)
            reply.__dict__["_content"] = encode_reply(study.introduce(described))
        if reply is not None and letter.kind == "train":
            spoilt = study.spoil(letter, reply.content)
            update = None if reply.has_error() else decode_update(spoilt, study.plan.sha256)
            study.replies.append(Reply(letter, update, content_bytes(spoilt)))
            reply.__dict__["_content"] = spoilt
        return reply

    def _letter(self, message: Message) -> Letter:
        instruction = decode_instruction(message.content, self._study.plan.sha256)
        site = f"site-{message.metadata.dst_node_id - 1:03d}"
        kind = message.metadata.message_type
        return Letter(kind, instruction.round, instruction.standing.part, site, instruction)


@dataclass(frozen=True)
class Workshop:
    """Makes studies of tiny models in one folder, and sees into their sites' trainings."""

    folder: Path
    base: Path
    data: Path
    monkeypatch: pytest.MonkeyPatch
    words: Mapping[str, str]
    numbers: Iterator[int] = field(default_factory=count)

    def make(self, *changes: str) -> Federation:
        """Return a study that has not begun; `changes` are overrides."""
        where = self.folder / f"run-{next(self.numbers)}"
        own = {"model.base": str(self.base), "data.path": str(self.data), "run.dir": str(where)}
        settings = {**_WORDS, **own, **self.words}
        found = resolve(compose([*(f"{key}={value}" for key, value in settings.items()), *changes]))
        study = Federation(found.plan, found.machine)
        self._watch(study)
        return study

    def _watch(self, study: Federation) -> None:
        """Note every training of this study's sites; nothing about it changes."""
        inner = site_app.train_round

        def train_round(plan: StudyPlan, workspace: Any, examples: Any, assignment: Assignment, *rest: Any) -> Any:
            result = inner(plan, workspace, examples, assignment, *rest)
            if plan.sha256 == study.plan.sha256 and machine_facts.current() == study.machine:
                state = {**assignment.adapter, **result.state}
                seen = Trained(assignment.site, assignment.round, dict(assignment.adapter), state, result)
                study.trainings.append(seen)
            return result

        self.monkeypatch.setattr(site_app, "train_round", train_round)


def workshop(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    architecture: str = "bert",
    head: str = "pooled",
    *,
    shared: Path | None = None,
) -> Workshop:
    """Return a workshop in a folder; its tiny base and its records are in `shared`, made there by whoever is first."""
    torch.set_num_threads(1)
    monkeypatch.setenv(machine_facts.ENVIRONMENT_VARIABLE, "")
    place, runs = shared or folder, folder / "runs"
    runs.mkdir()
    base = place / architecture
    if not base.exists():
        tiny_base(base, architecture)
    if head == "none":
        words = {"data.prompt": "prompt", "data.completion": "completion"}
        return Workshop(runs, base, question_jsonl(place / "questions.jsonl", rows=45), monkeypatch, words)
    words = {"data.text": "text", "data.label": "category", "model.head": head}
    return Workshop(runs, base, bank_csv(place / "bank.csv", rows=45), monkeypatch, words)


def dense(A: np.ndarray, B: np.ndarray) -> np.ndarray:  # noqa: N803 - the factors' names
    """Return B·A entry by entry in float64: no matrix product of the code under test."""
    return np.einsum("or,ri->oi", B.astype(np.float64), A.astype(np.float64))


def same(one: AdapterState, other: AdapterState) -> bool:
    """Whether two states hold the same bits."""
    return one.keys() == other.keys() and all(one[name].tobytes() == other[name].tobytes() for name in one)


def distance(found: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray]) -> float:
    """Return the largest relative Frobenius distance of any layer."""
    assert found.keys() == wanted.keys()
    sizes = {layer: float(np.linalg.norm(wanted[layer])) for layer in wanted}
    assert all(sizes.values()), "a layer that has not moved proves nothing"
    return max(float(np.linalg.norm(found[layer] - wanted[layer])) / sizes[layer] for layer in wanted)
