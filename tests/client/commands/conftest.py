"""A site of its own folder with a key file, a data set of 140 patients, and a plan that its policy lets pass."""

from __future__ import annotations

import csv
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedtune.config.plan import StudyPlan
from fedtune.journal.ledger import Charge, Ledger, Reservation
from fedtune.privacy.plan import PrivacyPlan
from fedtune_client.folder import OpenSite, SiteFolder, open_site_folder
from fedtune_client.vault import Key
from tests.client.policy.conftest import placed, plan_text, policy_tree
from tests.support.runs import Done, command

EMPTY = "0" * 64
TERMS = {"delta": 1e-6, "clip_norm": 1.0, "sampling_rate": 0.1, "noise": "secure"}


def study(name: str = "study", epsilon: float = 2.5, **changes: Any) -> StudyPlan:
    """Return a private plan of 20 rounds of 5 steps that keeps its ε."""
    promise = PrivacyPlan.calibrated(epsilon=epsilon, max_steps=100, **TERMS).about("patient_id", 8)
    return StudyPlan.from_json(plan_text(name=name, privacy=promise.to_dict(), **changes))


def write_claims(path: Path, rows: int = 300, start: int = 0) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["note", "category", "patient_id", "consent"])
        for row in range(start, start + rows):
            note = f"patient {row} called about the claim number {row}"
            writer.writerow([note, "loan", f"p{row % 140 + start}", "yes" if row % 3 else "no"])
    return path


@dataclass(frozen=True, slots=True)
class Place:
    """A folder with a site, its data, its key file and a plan."""

    folder: Path

    @property
    def site(self) -> Path:
        return self.folder / "site"

    @property
    def plan_file(self) -> Path:
        return self.folder / "plan.json"

    @property
    def journal(self) -> Path:
        return self.site / "mercy.journal"

    @property
    def key(self) -> Key:
        return Key.from_file(self.folder / "vault.key")

    def run(self, *words: str) -> Done:
        return command("client", *words)

    def done(self, *words: str) -> Done:
        """Run a command that must succeed."""
        found = self.run(*words)
        assert found.code == 0, found.err
        return found

    def json(self, *words: str) -> Any:
        return self.done(*words, "--format", "json").json

    def policy(self, **changes: Any) -> None:
        """Write policy.yaml: what the plan asks for, and `changes`."""
        tree = placed(policy_tree(), {"data.claims.lifetime_epsilon": 8.0, **_dotted(changes)})
        (self.site / "policy.yaml").write_text(
            yaml.safe_dump(json.loads(json.dumps(tree)), sort_keys=False), encoding="utf-8"
        )

    def write_plan(self, plan: StudyPlan, name: str = "plan.json") -> Path:
        path = self.folder / name
        path.write_text(plan.json_text, encoding="utf-8")
        return path

    def open(self) -> OpenSite:
        return open_site_folder(SiteFolder(self.site), self.key)

    def records(self) -> list[dict[str, Any]]:
        """Return the bodies of the journal's records."""
        return [json.loads(line)["body"] for line in self.journal.read_bytes().splitlines()]

    def kinds(self) -> list[str]:
        return [record["kind"] for record in self.records()]

    def charge(self, plan: StudyPlan, *rounds: int, commit: bool = True) -> None:
        """Charge rounds to the newest registration of claims, under its newest grant."""
        site = self.open()
        with site.journal as journal:
            ledger = Ledger(journal)
            for number in rounds:
                reservation = self.reserve(ledger, plan, number)
                if commit:
                    ledger.sent(ledger.commit(reservation, f"{number:064x}", 100))

    def reserve(self, ledger: Ledger, plan: StudyPlan, number: int) -> Reservation:
        state = ledger._journal.state
        data = state.spending.latest("claims")
        assert data is not None
        event = plan.promise.event(plan.training.local_steps) if plan.promise.mode == "dp" else None
        grant = max(at for at, given in state.grants.items() if given.data == data)
        return ledger.reserve(Charge(plan.sha256, number, "training", EMPTY, data, grant, event), ())


def _dotted(changes: dict[str, Any]) -> dict[str, Any]:
    return {key.replace("__", "."): value for key, value in changes.items()}


def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith(("FEDTUNE_VAULT", "FEDTUNE_EXPORT", "FEDTUNE_NEW", "FEDTUNE_SITE")):
            monkeypatch.delenv(name)


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """A folder with data, a key file and a plan, where no site has begun."""
    clean_environment(monkeypatch)
    monkeypatch.chdir(tmp_path)
    place = Place(tmp_path)
    with os.fdopen(os.open(tmp_path / "vault.key", os.O_WRONLY | os.O_CREAT, 0o600), "wb") as file:
        file.write(bytes(range(32)))
    monkeypatch.setenv("FEDTUNE_VAULT_KEY_FILE", str(tmp_path / "vault.key"))
    write_claims(tmp_path / "claims.csv")
    place.write_plan(study())
    return place


@pytest.fixture
def begun(empty: Place) -> Place:
    """A site that knows where its data is, with a policy that is not adopted."""
    empty.done("init", "mercy")
    facts = "name: mercy\ndata:\n  claims:\n    path: ../claims.csv\n"
    (empty.site / "site.yaml").write_text(facts, encoding="utf-8")
    empty.policy()
    return empty


@pytest.fixture
def ready(begun: Place) -> Place:
    """A site that has adopted its policy and granted its data."""
    begun.done("policy", "adopt", "--yes")
    begun.done("consent", "grant", "claims", "--purpose", "research")
    return begun
