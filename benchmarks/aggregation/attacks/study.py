"""One study of the table: settings, the run through coordinator and sites, and its two measurements."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.aggregation.attacks.cells import BACKDOOR, NONE, UNDEFENDED, Cell
from benchmarks.aggregation.attacks.hostile import HostileSites
from benchmarks.aggregation.attacks.records import Files, poison, read, write, write_files
from fedtune.config import machine as machine_facts
from fedtune.config.compose import compose
from fedtune.config.plan import PLAN_KEY
from fedtune.config.schema import Settings
from fedtune.data.formats import read_table
from fedtune.data.tasks import find_task
from fedtune.errors import FederationError
from fedtune.flower.engine import run
from fedtune.run.folder import create
from fedtune.simulation.dealing import Dealing
from fedtune.simulation.finished import FinishedRun
from fedtune.simulation.resolve import resolve
from fedtune.simulation.sites import file_examples
from fedtune.training.evaluate import evaluate
from fedtune_client.app import app as honest
from fedtune_server.app import app as server
from tests.support.attacks import ATTACKS, Attack, little_is_enough
from tests.support.tiny import bank_csv, tiny_base

LITTLE_Z = 1.5
SETTINGS = [
    "experiment=banking77",
    "privacy=off",
    "data.name=banking77",
    "data.holdout=0",
    "data.max_tokens=18",
    "lora.layers=[5]",
    "training.sampling_rate=1",
    "training.learning_rate=1.8",
    "training.head_learning_rate=5.4",
    "training.physical_batch=128",
    "aggregation.server_optimizer=fedavg",
    "aggregation.max_update_norm=1e9",
    "federation.quorum=1",
    "federation.rounds=3",
    "evaluation.site_metrics=off",
    "evaluation.batch_size=128",
    "run.threads=1",
    "run.device=cpu",
]


def measured(cell: Cell, files: Files, *others: str) -> dict[str, Any]:
    """Run a cell's study, and return what its adapter does on the test files, or why it stopped; no file is left."""
    began, cpu = time.monotonic(), time.process_time()
    with TemporaryDirectory(dir=files.folder) as folder:
        run_dir = Path(folder) / "run"
        settings = settings_of(cell, files, f"run.dir={run_dir}", *others)
        try:
            _run(settings, cell)
            found: dict[str, Any] = _metrics(FinishedRun(run_dir), cell, files)
        except FederationError as error:
            found = {"stopped": str(error)}
    return found | {"seconds": time.monotonic() - began, "cpu_seconds": time.process_time() - cpu}


def _metrics(finished: FinishedRun, cell: Cell, files: Files) -> dict[str, float]:
    """Return the accuracy; where a backdoor may be or nobody attacks also its success, and once that of the start."""
    found = {"accuracy": finished.metrics(str(files.test))["accuracy"]}
    if (cell.rule, cell.attack) == (UNDEFENDED, NONE):
        workspace = finished.workspace
        examples = file_examples(finished.plan, str(files.test), workspace.tokenizer)
        found["start"] = evaluate(workspace, workspace.initial, examples, 128).metrics()["accuracy"]
    if cell.attack in {BACKDOOR, NONE}:
        found["backdoor"] = finished.metrics(str(files.triggered))["accuracy"]
    return found


def settings_of(cell: Cell, files: Files, *others: str) -> Settings:
    """Return the settings of a cell; where its attack is a backdoor, the attackers' records are poisoned."""
    words = [*SETTINGS, *cell.words, *others]
    settings = compose([*words, f"data.path={files.train}"])
    if cell.attack != BACKDOOR:
        return settings
    path = files.poisoned(cell.attackers)
    table = read_table(str(files.train), "csv", columns=("text", "category"))
    deal = Dealing.of_settings(settings).deal(table, find_task(settings.data, list(table.columns)))
    attackers = [[int(row) for row in site.train] for site in deal.sites[-cell.attackers :]]
    write(path, poison(read(files.train), attackers, files.target))
    return compose([*words, f"data.path={path}"])


def _run(settings: Settings, cell: Cell) -> None:
    """Run a study with its attackers; those of a backdoor answer as honest sites do."""
    study = resolve(settings)
    sites = HostileSites(study.plan, _attack(cell.attack), cell.attackers).app if cell.attack in ATTACKS else honest
    machine_facts.announce(create(study.plan, study.machine).machine_file)
    run("inprocess", server, sites, study.plan.federation.sites, {PLAN_KEY: study.plan.json_text})


def _attack(name: str) -> Attack:
    """Return what the attackers make of a round's updates; the paper's z is 0 to 0.4 for ten sites, so it is given."""
    return partial(little_is_enough, z=LITTLE_Z) if name == "little_is_enough" else ATTACKS[name]


def quick_files(folder: Path) -> Files:
    """Write the files of a small data set of made-up records, and the tiny random model that goes with it."""
    tiny_base(folder / "base")
    return write_files(bank_csv(folder / "bank.csv", rows=120, labels=4), folder, train=20, test=5)


def quick_settings(folder: Path) -> list[str]:
    """Return what makes a study take a fraction of a second."""
    model = [f"model.base={folder / 'base'}", "model.dtype=float32", "model.head_init=zero", "model.head_center=none"]
    return [*model, "lora.layers=null", "lora.rank=2", "federation.rounds=1"]
