"""Runs a `ServerApp` and a `ClientApp` on one machine: in this process, or on Flower's own Ray engine.

Both take the study plan as one string in the run configuration, as a real federation does.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from flwr.app import Context, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from fedtune.errors import ConfigError, FederationError
from fedtune.flower.bundle import project_text
from fedtune.flower.grid import InProcessGrid

BACKENDS = ("inprocess", "ray")

# Set when Flower's engine has died under a running ServerApp, which would otherwise wait until its deadline.
engine_died = threading.Event()


def run(
    backend: str, server: ServerApp, client: ClientApp, nodes: int, run_config: Mapping[str, str], *, workers: int = 2
) -> None:
    """Run one study over `nodes` simulated sites; `workers` processes serve them on Ray, one in process."""
    if backend == "inprocess":
        grid = InProcessGrid(client, nodes, run_config)
        server(grid, Context(1, 0, {}, RecordDict(), dict(run_config)))
        return
    _run_on_ray(server, client, nodes, run_config, workers)


def check_backend(backend: str) -> None:
    """Refuse a backend that does not exist or is not installed."""
    if backend not in BACKENDS:
        raise ConfigError(
            "unknown-backend",
            f"run.backend={backend!r} is not one of {', '.join(BACKENDS)}",
            hint="run.backend=inprocess",
        )
    if backend == "ray" and importlib.util.find_spec("ray") is None:
        raise ConfigError(
            "missing-extra", "run.backend=ray needs Ray, which is not installed", hint="pip install 'fedtune[ray]'"
        )


def _run_on_ray(server: ServerApp, client: ClientApp, nodes: int, run_config: Mapping[str, str], workers: int) -> None:
    from flwr.common import EventType
    from flwr.simulation.run_simulation import _run_simulation
    from flwr.supercore.constant import NOOP_FEDERATION_ID
    from flwr.supercore.run import Run

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    logging.getLogger("flwr").setLevel(logging.ERROR)
    run_record = Run.create_empty(run_id=1)
    run_record.primary_task_id = 1
    run_record.federation_id = NOOP_FEDERATION_ID
    _set_task_identity(run_id=1)
    engine_died.clear()
    with TemporaryDirectory() as app_dir, _watched():
        _write_app(Path(app_dir), run_config)
        _run_simulation(
            num_supernodes=nodes,
            exit_event=EventType.PYTHON_API_RUN_SIMULATION_LEAVE,
            client_app=client,
            server_app=server,
            backend_name="ray",
            backend_config={
                "client_resources": {"num_cpus": 1},
                "init_args": {"num_cpus": workers, "logging_level": "ERROR"},
            },
            server_app_context=Context(1, 0, {}, RecordDict(), dict(run_config)),
            run=run_record,
            app_dir=app_dir,
            is_app=True,
        )


@contextmanager
def _watched() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        engine_died.set()
        raise FederationError(
            "engine", f"Flower's Ray engine stopped: {error}", hint="run.backend=inprocess, or --verbose to see why"
        ) from error


def _set_task_identity(run_id: int) -> None:
    from flwr.common.constant import SUPERLINK_NODE_ID
    from flwr.supercore.task_identity import TaskIdentity

    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, run_id, SUPERLINK_NODE_ID


def _write_app(folder: Path, run_config: Mapping[str, str]) -> None:
    """Write the one file from which Flower's engine takes the sites' run configuration: data, no code."""
    (folder / "pyproject.toml").write_text(project_text(run_config), encoding="utf-8")
