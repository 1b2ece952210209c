"""`fedtune server up`: one command that runs a coordinator until it is told to end."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from fedtune.commands.options import Format, OutputFormat, Verbose
from fedtune.commands.screen import quiet_libraries
from fedtune.errors import ProcessError, TransportError
from fedtune_server.commands.shared import Dir, OpenCoordinator, opened, show

if TYPE_CHECKING:
    from fedtune_server.folder import CoordinatorFolder
    from fedtune_server.settings import CoordinatorSettings

logger = logging.getLogger("fedtune.coordinator")


def up(*, folder: Dir = None, output: Format = OutputFormat.text, verbose: Verbose = False) -> None:
    """Run the coordinator: serve the sites, and go on with every study that was submitted, until SIGTERM or Ctrl-C.

    Its processes are restarted when they die. After any death, of a process or of the machine, the same command goes on
    where each study was. Needs no secret but to be the folder's user; the authority stays locked.
    """
    quiet_libraries(verbose=verbose)
    coordinator = opened(folder)
    with _alone(coordinator.folder):
        _log(coordinator, verbose=verbose)
        _supervise(coordinator, output)


def _supervise(coordinator: OpenCoordinator, output: OutputFormat) -> None:
    from fedtune.flower.environment import enter, log_plainly
    from fedtune.processes import health
    from fedtune.processes.supervisor import Supervisor

    enter(coordinator.folder.run / "supervisor-flower")
    log_plainly()
    from fedtune_server.studies.conductor import Conductor
    from fedtune_server.studies.registrar import Registrar
    from fedtune_server.studies.steward import Steward
    from fedtune_server.studies.store import StudyStore
    from fedtune_server.supervision import Report, children, told, with_ports

    folder, settings = coordinator.folder, with_ports(coordinator.settings)
    supervisor = Supervisor(children(folder, settings))
    steward = Steward(folder, Conductor(StudyStore(folder)), Registrar(coordinator.enrolment))
    try:
        report = Report(lambda: supervisor.states, steward)
        with health.serve(settings.health_port, report) as health_port, told(folder, health_port):
            document = _document(folder, settings, health_port)
            show(output, document, _lines(document))
            sys.stdout.flush()
            supervisor.run(lambda: steward.tick(supervisor.states))
    finally:
        steward.close()
    logger.info("the coordinator has ended")


@contextmanager
def _alone(folder: "CoordinatorFolder") -> Iterator[None]:
    """Hold the folder: two supervisors would fight for its ports, and run each study twice."""
    from fedtune.flower.environment import hold

    try:
        held = hold(folder.run)
    except TransportError as error:
        hint = "see how it is: fedtune server status"
        raise ProcessError("in-use", f"a coordinator of {folder.path} is running already", hint=hint) from error
    try:
        yield
    finally:
        os.close(held)


def _log(coordinator: OpenCoordinator, *, verbose: bool) -> None:
    from fedtune.processes import logs
    from fedtune.processes.log_lines import TRACEBACKS

    os.environ.setdefault(logs.FORMAT, coordinator.settings.log_format)
    os.environ[logs.FOLDER] = str(coordinator.folder.logs.absolute())
    if verbose:
        os.environ[TRACEBACKS] = "1"
    logs.setup("supervisor")


def _document(folder: "CoordinatorFolder", settings: "CoordinatorSettings", health_port: int) -> dict[str, Any]:
    return {
        "federation": settings.federation,
        "folder": str(folder.path.absolute()),
        "address": settings.address,
        "listen": f"{settings.listen.host}:{settings.listen.port}",
        "private_port": settings.private_port,
        "health": f"http://127.0.0.1:{health_port}",
    }


def _lines(found: dict[str, Any]) -> list[str]:
    return [
        f"the federation {found['federation']}: sites reach it at {found['address']}",
        f"  for sites          {found['listen']} (TLS, client certificates)",
        f"  on loopback alone  port {found['private_port']} for its processes, {found['health']}/ready for you",
        f"  logs               {found['folder']}/logs, or: fedtune server logs --follow",
        "to end it: Ctrl-C, or SIGTERM; studies go on when it is started again",
    ]
