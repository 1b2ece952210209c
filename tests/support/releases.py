"""A study that has ended, without its rounds: a run folder whose sites have journals, heads and a coordinator."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from fedtune.journal.chain import public_hex
from fedtune.journal.journal import Journal
from fedtune.journal.ledger import Ledger
from fedtune.journal.witness import Head, Receipt
from fedtune.privacy.accounting import epsilon, merge
from fedtune.release.adapter import save_adapter
from fedtune.release.export import Exported, export
from fedtune.release.kinds import Request
from fedtune.release.study import EndedStudy, open_ended
from fedtune.run.folder import RunFolder
from fedtune.training.local import event_of_round
from tests.support.bench import summary_of
from tests.support.ledgers import DATA, GRANT, charge_of

if TYPE_CHECKING:
    from pathlib import Path

    from fedtune.model.layout import AdapterState
    from tests.support.bench import Bench


@dataclass
class Ended:
    """An ended study's run folder, its coordinator's key, and its sites' journals and keys by name."""

    run: Path
    bench: Bench
    coordinator: Ed25519PrivateKey
    journals: dict[str, Path] = field(default_factory=dict)
    keys: dict[str, Ed25519PrivateKey] = field(default_factory=dict)

    @property
    def public(self) -> str:
        return public_hex(self.coordinator)

    def open(self) -> EndedStudy:
        return open_ended(self.run)

    def release(self, out: Path, kind: Any = "peft", **words: Any) -> Exported:
        return export(self.open(), Request(kind, out, **words), lambda _: None)

    def journal(self, name: str) -> Journal:
        return Journal.open(self.journals[name], self.keys[name])

    def change_summary(self, **fields: Any) -> None:
        """Change the first site's line of the summary, as a coordinator that lies would."""
        file = self.run / "summary.json"
        summary = json.loads(file.read_text())
        summary["sites"][0] |= fields
        file.write_text(json.dumps(summary))


def make_ended(
    folder: Path, bench: Bench, adapter: AdapterState | None = None, *, sites: int = 2, rounds: int = 2
) -> Ended:
    """Make a run folder in which every site was charged `rounds` rounds of the plan."""
    run = RunFolder(folder)
    folder.mkdir(parents=True)
    ended = Ended(folder, bench, Ed25519PrivateKey.generate())
    pem = ended.coordinator.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (folder / "coordinator.key").write_bytes(pem)
    run.plan_file.write_text(bench.plan.json_text)
    run.save_machine(bench.machine.model_copy(update={"run_dir": str(folder)}))
    heads = []
    for number in range(sites):
        name = f"site-{number}"
        heads.append((name, _site(ended, name, rounds)))
    lines = (json.dumps({"name": name, "receipt": receipt.to_dict()}) for name, receipt in heads)
    (folder / "heads.jsonl").write_text("".join(f"{line}\n" for line in lines))
    summary = _summary(bench, [name for name, _ in heads], rounds)
    save_adapter(run.adapter, bench.workspace, bench.alive() if adapter is None else adapter, bench.plan, summary)
    run.summary_file.write_text(json.dumps(summary))
    return ended


def at_rank(site: Bench, rank: int) -> dict[str, Any]:
    """A random adapter of another rank than the plan's."""
    generator = np.random.default_rng(rank)
    shapes = {spec.name: list(spec.shape) for spec in site.workspace.layout.tensors}
    for spec_a, spec_b in site.workspace.layout.pairs:
        shapes[spec_a.name][0] = shapes[spec_b.name][1] = rank
    return {name: generator.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def _site(ended: Ended, name: str, rounds: int) -> Receipt:
    key = ended.keys[name] = Ed25519PrivateKey.generate()
    path = ended.journals[name] = ended.run / "sites" / name / f"{name}.journal"
    path.parent.mkdir(parents=True)
    plan = ended.bench.plan
    with Journal.create(path, name, key) as journal:
        journal.append(DATA, GRANT)
        for number in range(1, rounds + 1):
            Ledger(journal).reserve(charge_of(plan, number, event_of_round(plan)), ())
        return Receipt.of(Head.of(journal), ended.coordinator)


def _summary(bench: Bench, names: list[str], rounds: int) -> dict[str, Any]:
    plan = bench.plan
    summary = summary_of(plan, accuracy=0.75)
    event = event_of_round(plan)
    events = merge([event] * rounds) if event is not None else ()
    spent = None if event is None else epsilon(events, plan.promise.delta)
    one = {"units": 20, "rounds": rounds, "epsilon": spent, "events": [event.to_dict() for event in events]}
    summary["sites"] = [{"name": name, **one} for name in names]
    summary["privacy"]["max_epsilon"] = spent
    return summary
