"""Real sites with tiny models: a folder with journal, vault, policy, data and grant, asked as a coordinator asks.

A site is opened from its folder alone, so `restart` is what a new process is; the processes that are killed are in
`tests.support.crashes`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, Message, RecordDict

from fedtune.config.machine import ENVIRONMENT_VARIABLE as MACHINE
from fedtune.config.plan import PLAN_KEY, StudyPlan
from fedtune.flower.grid import InProcessGrid
from fedtune.flower.messages import Instruction, Refusal, Standing, Update, decode_update, encode_instruction
from fedtune.journal.witness import Receipt
from fedtune.model.layout import AdapterState
from fedtune.run.folder import create
from fedtune_client import operator
from fedtune_client import site as sites
from fedtune_client.app import app
from fedtune_client.folder import ENVIRONMENT_VARIABLE as SITE
from fedtune_client.folder import OpenSite, SiteFolder, begin, open_site_folder
from fedtune_client.policy.limits import simulation_policy
from fedtune_client.policy.schema import Policy
from fedtune_client.vault import Key
from fedtune_client.vault.unlock import KEY_VARIABLE
from tests.support.bench import Bench, make_bench
from tests.support.tiny import bank_csv

NAME = "claims"
KEY = Key(bytes(range(32)))
SERVICE_KEY = KEY.data.hex()  # what the environment of a running client holds


@dataclass(frozen=True, slots=True)
class Study:
    """A plan as its coordinator has it, and the machine facts with which a site opens its base model."""

    bench: Bench
    machine_file: Path

    @property
    def plan(self) -> StudyPlan:
        return self.bench.plan

    @property
    def download(self) -> AdapterState:
        """The adapter as it is sent before the first round."""
        return self.sent(self.bench.workspace.initial)

    def sent(self, adapter: AdapterState) -> AdapterState:
        """What of an adapter the plan's algorithm sends down."""
        return {name: adapter[name] for name in self.bench.download.names}

    def another(self, seed: int) -> AdapterState:
        """Another adapter than the first round's."""
        return self.sent(self.bench.alive(seed))


def make_study(folder: Path, **keys: Any) -> Study:
    """Resolve a study with secure noise on the data set `claims`; `keys` change the settings."""
    torch.set_num_threads(1)
    settings = {"data__name": NAME, "privacy__noise": "secure", "federation__sites": 3}
    bench = make_bench(folder, "bert", "pooled", **{**settings, "evaluation__site_metrics": "off", **keys})
    return Study(bench, create(bench.plan, bench.machine).machine_file)


@dataclass(frozen=True, slots=True)
class RealSite:
    """A site's folder and who may open it; `study` is the one that asks unless another is named."""

    path: Path
    study: Study

    @property
    def folder(self) -> SiteFolder:
        return SiteFolder(self.path)

    @property
    def data(self) -> Path:
        return self.path / "claims.csv"

    @property
    def journal(self) -> Path:
        return self.folder.journal_file("mercy")

    def open(self) -> OpenSite:
        """Open the site as a command does."""
        return open_site_folder(self.folder, KEY)

    def restart(self) -> RealSite:
        """Forget what this process knows of the site, as a new process does."""
        sites._opened.cache_clear()
        return self

    def adopt(self, **changes: Any) -> Policy:
        """Adopt what the simulation of the study would, with other values: `federation__min_sites=4`."""
        policy = policy_of(self.study.plan, **changes)
        operator.adopt(self.open(), policy)
        return policy

    def grant(self, epsilon: float | None = None, expires: datetime | None = None) -> int:
        """Grant what the data set holds now for research."""
        return operator.grant(self.open(), NAME, "research", epsilon, expires)

    def ask(
        self,
        kind: str = "train",
        number: int = 1,
        adapter: AdapterState | None = None,
        *,
        study: Study | None = None,
        receipt: Receipt | None = None,
        plan_text: str | None = None,
        standing: Standing | None = None,
    ) -> Message:
        """Send one message through Flower's in-process grid and return the reply."""
        asking = study or self.study
        with self.environment(asking):
            grid = InProcessGrid(app, 1, {PLAN_KEY: plan_text or asking.plan.json_text})
            sent = asking.download if adapter is None else adapter
            stands = Standing() if standing is None else standing
            content = encode_instruction(Instruction(asking.plan.sha256, number, sent, receipt, stands))
            message = grid.create_message(content, kind, grid.get_node_ids()[0], str(number), 600.0)
            (reply,) = grid.send_and_receive([message])
        return reply

    def update(self, number: int = 1, adapter: AdapterState | None = None, **others: Any) -> Update:
        """Ask for an update and get one."""
        answer = self.answer(number, adapter, **others)
        assert isinstance(answer, Update), answer
        return answer

    def refusal(self, number: int = 1, adapter: AdapterState | None = None, **others: Any) -> str:
        """Ask for an update and get a code."""
        answer = self.answer(number, adapter, **others)
        assert isinstance(answer, Refusal), answer
        return answer.code

    def answer(self, number: int = 1, adapter: AdapterState | None = None, **others: Any) -> Update | Refusal:
        """Ask for an update."""
        asking: Study = others.get("study") or self.study
        return decode_update(self.ask("train", number, adapter, **others).content, asking.plan.sha256)

    @contextmanager
    def environment(self, study: Study | None = None) -> Iterator[None]:
        """Name the folder, its key and the machine facts, as a service's unit file does."""
        named = {
            SITE: str(self.path),
            KEY_VARIABLE: SERVICE_KEY,
            MACHINE: str((study or self.study).machine_file),
        }
        before = {name: os.environ.get(name) for name in named}
        os.environ.update(named)
        try:
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})

    def entries(self, *kinds: str) -> list[dict[str, Any]]:
        """Read the journal's whole lines with no code of the journal's own; of some kinds, or of all."""
        *lines, _torn = self.journal.read_bytes().split(b"\n")
        bodies = [json.loads(line)["body"] for line in lines]
        return [{**body["entry"], "kind": body["kind"]} for body in bodies if not kinds or body["kind"] in kinds]

    @property
    def charged(self) -> int:
        """How many rounds are charged."""
        return len(self.entries("reserve"))


def make_site(path: Path, study: Study, *, rows: int = 60, granted: bool = True, **policy: Any) -> RealSite:
    """Begin a site with a file of its own, a policy that allows the study, and (unless not `granted`) a grant."""
    site = RealSite(path, study)
    opened = begin(site.folder, "mercy", KEY)
    opened.journal.close()
    bank_csv(site.data, rows=rows, labels=3, patients=14)
    point_at(site, site.data)
    site.adopt(**policy)
    if granted:
        site.grant()
    return site.restart()


def point_at(site: RealSite, *files: Path, **named: Path) -> None:
    """Say in `site.yaml` which files are the data sets: `claims`, and others by their names."""
    data = {**({NAME: files[0]} if files else {}), **named}
    lines = [f"  {name}:\n    path: {file}\n" for name, file in data.items()]
    (site.path / "site.yaml").write_text("name: mercy\ndata:\n" + "".join(lines))


def policy_of(plan: StudyPlan, **changes: Any) -> Policy:
    """Return the policy that allows a plan and nothing more, with other values: `data__claims__min_units=100`."""
    tree = simulation_policy(plan).model_dump(mode="json")
    for key, value in changes.items():
        *groups, last = key.split("__")
        place = tree
        for group in groups:
            place = place[group]
        place[last] = value
    return Policy.model_validate(tree)


def content_of(content: RecordDict) -> dict[str, Any]:
    """Return all of a reply but the journal's head, as plain values that compare by their bytes."""
    found: dict[str, Any] = {}
    for name, record in content.items():
        if isinstance(record, ArrayRecord):
            found[name] = {key: (array.dtype, tuple(array.shape), array.data) for key, array in record.items()}
        else:
            found[name] = {key: value for key, value in record.items() if key != "head"}
    return found
