"""Ends processes of a running federation at random moments, and sees what becomes of the study and of the budgets."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedtune.config.plan import StudyPlan
from fedtune.run.files import read_lines
from fedtune.run.folder import RunFolder
from tests.support.deployment import Deployment
from tests.support.sites import NAME, make_study
from tests.support.tiny import bank_csv

SITES = ("mercy", "north", "south")
PARTS = {
    "site executor": ("site", "executor"),
    "SuperNode": ("site", "node"),
    "whole site": ("site", "up"),
    "SuperLink": ("server", "link"),
    "ServerApp": ("server", "executor"),
    "whole coordinator": ("server", "up"),
}
AMPLE: dict[str, Any] = {  # what killed rounds cost is charged: a policy without room would end a site's part
    "data__claims__lifetime_epsilon": 1e6,
    "privacy__study_epsilon": 1e6,
    "training__max_rounds": 100_000,
    "training__max_total_steps": 1_000_000,
}


@dataclass
class Arena:
    """A federation with one long study on tiny models."""

    deployment: Deployment
    plan: StudyPlan
    study: RunFolder
    random: random.Random
    sites: tuple[str, ...] = SITES
    trials: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def make(
        cls,
        folder: Path,
        *,
        seed: int,
        sites: tuple[str, ...] = SITES,
        host: str = "127.0.0.1",
        wrap: Mapping[str, Sequence[str]] | None = None,
        **keys: Any,
    ) -> Arena:
        settings = {"federation__rounds": 60, "federation__sites": len(sites), "evaluation__site_metrics": "off"}
        bench = make_study(folder / "bench", **{**settings, "federation__quorum": 1.0, **keys}).bench
        deployment = Deployment(folder, bench.machine.model_folder, host, wrap=wrap or {})
        for name in sites:
            bank_csv(folder / f"{name}.csv", rows=60, labels=3, patients=14)
            deployment.join(name, {NAME: folder / f"{name}.csv"})
            deployment.allow(name, bench.plan, **AMPLE)
        study = deployment.submit(bench.plan, sites, bench.machine.model_folder)
        return cls(deployment, bench.plan, study, random.Random(seed), sites)

    @property
    def round(self) -> int:
        """The last round that has ended."""
        lines = read_lines(self.study.metrics_file) if self.study.metrics_file.exists() else []
        return max((line["round"] for line in lines), default=0)

    def up(self) -> None:
        self.deployment.up(*self.sites)

    def wait_round(self, number: int, seconds: float) -> float:
        """Wait until a round has ended, or the study; return how long that took."""
        began = time.monotonic()
        while self.round < number and self.study.summary() is None:
            assert time.monotonic() - began < seconds, f"round {number} has not ended in {seconds:g} s"
            time.sleep(0.1)
        return time.monotonic() - began

    def kill(self, what: str) -> None:
        """Kill one part at a random moment of a round, start what nobody supervises, and wait for the next round."""
        kind, process = PARTS[what]
        role = self.random.choice(self.sites) if kind == "site" else "server"
        before = self.round
        self.wait_round(before + 1, 300.0)
        time.sleep(self.random.uniform(0.0, 1.5))
        at = self.round
        self.deployment.kill(role, process)
        if process == "up":
            start: Callable[[], None] = (
                self.deployment.server_up if role == "server" else lambda: self.deployment.client_up(role)
            )
            start()
        seconds = self.wait_round(at + 2, 300.0)  # the round that was under way may have had all its replies
        attempts = self.deployment.attempts(self.study)
        told = {"killed": what, "role": role, "round": at, "seconds": round(seconds, 1), "code": attempts.code}
        self.trials.append(told)

    def check_budgets(self) -> dict[str, int]:
        """Return how often each site charged a round again; no round that was committed is charged a second time."""
        return {name: _charged_again(name, journal_entries(self.deployment, name)) for name in self.sites}


def _charged_again(name: str, entries: list[dict[str, Any]]) -> int:
    """Return how many rounds were reserved once more because the first reservation was never committed."""
    rounds: dict[int, tuple[int, str]] = {}
    committed: set[tuple[int, str]] = set()
    for entry in entries:
        if entry["kind"] == "reserve":
            charged = entry["round"], entry["input"]
            assert charged not in committed, f"{name} charged round {charged[0]} again after it was committed"
            rounds[entry["sequence"]] = charged
        if entry["kind"] == "commit":
            committed.add(rounds[entry["reserved"]])
    return len(rounds) - len(set(rounds.values()))


def journal_entries(deployment: Deployment, name: str) -> list[dict[str, Any]]:
    """Read a site's journal with no code of the journal's own."""
    bodies = [line["body"] for line in read_lines(deployment.site(name).journal_file(name))]
    return [{**body["entry"], "kind": body["kind"], "sequence": body["sequence"]} for body in bodies]
