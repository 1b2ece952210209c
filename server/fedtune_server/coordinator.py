"""What a study needs between machines: its folder, the enrolled sites, signed messages, one witness for all studies.

Runs in the process that executes ServerApps; a study that ends, however it ends, has its outcome written down. Knows no
round.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flwr.serverapp import Grid

from fedtune.config.machine import Machine
from fedtune.config.plan import StudyPlan
from fedtune.envelopes.endpoint import Endpoint
from fedtune.envelopes.envelope import COORDINATOR
from fedtune.envelopes.nonces import FileNonces
from fedtune.envelopes.peers import Peers
from fedtune.errors import StudyError
from fedtune.flower.local_gate import read_secret
from fedtune.flower.submission import Control
from fedtune.run.files import make_folder
from fedtune.run.folder import RunFolder
from fedtune.simulation.observer import watched_by
from fedtune_server.coordinator_key import coordinator_key
from fedtune_server.enrolment import Enrolment
from fedtune_server.exchange import Exchange, Traffic
from fedtune_server.fleet import Fleet
from fedtune_server.folder import CoordinatorFolder
from fedtune_server.studies.outcome_file import recorded
from fedtune_server.studies.progress_file import FileProgress
from fedtune_server.studies.record import StudyRecord, read_record
from fedtune_server.studies.registrar import node_keys
from fedtune_server.witness import Witness

Conducted = tuple[Machine, Exchange, tuple[str, ...]]


@contextmanager
def conducted(folder: CoordinatorFolder, plan: StudyPlan, grid: Grid, run: int) -> Iterator[Conducted]:
    """Open a submitted study of this coordinator, hold its folder, and record how the attempt ends.

    Errors: `study.unknown` for a plan that was never submitted here, and those of keys, enrolment and witness.
    """
    place = folder.study(plan)
    if not (place / "plan.json").exists():
        hint = "submit it: fedtune server submit PLAN.json"
        raise StudyError("unknown", f"no study of the plan {plan.sha256[:12]} is in {folder.studies}", hint=hint)
    progress = FileProgress(place)
    run_folder = RunFolder(place)
    with recorded(place, run), run_folder.in_use(), watched_by(progress):
        record = read_record(place)
        try:
            with _exchange(folder, plan, record, grid) as exchange:
                yield _machine(run_folder, place), exchange, tuple(record.released)
        finally:
            progress.study_done()


def _machine(run_folder: RunFolder, place: Path) -> Machine:
    return run_folder.machine().model_copy(update={"run_dir": str(place)})


@contextmanager
def _exchange(folder: CoordinatorFolder, plan: StudyPlan, record: StudyRecord, grid: Grid) -> Iterator[Exchange]:
    key = coordinator_key(folder.key_file)
    enrolment = Enrolment.open(folder.enrolment, key)
    nonces = FileNonces(folder.nonces)
    make_folder(folder.witness)
    try:
        endpoint = Endpoint(COORDINATOR, enrolment.federation, key, Peers(enrolment.known), nonces)
        with Control(folder.private_port(), read_secret(folder.secret)) as control:
            fleet = Fleet(endpoint, plan.sha256, record.sites, lambda: _registered(control, enrolment))
            witness = Witness(folder.witness, key)
            federation = plan.federation
            yield Exchange(grid, federation.deadline, Traffic(), witness, fleet, federation.reconnect)
    finally:
        nonces.close()


def _registered(control: Control, enrolment: Enrolment) -> dict[int, str]:
    """Return the site of each registered node, by the node keys that sites were granted."""
    site_of = node_keys(enrolment.members)
    return {node.number: site_of[node.key][0] for node in control.nodes() if node.key in site_of}
