"""A coordinator's folder: what is where in it.

    coordinator.yaml   facts of this machine: addresses, ports, base models, test files
    coordinator.key    the key that signs messages, receipts and papers of enrolment
    authority/         the federation's authority, encrypted, and the certificate of this coordinator
    enrolment/         who takes part, and who no longer does
    local.secret       what processes of this machine show each other
    link/              Flower's state: nodes, runs, messages on their way
    nonces.db          the numbers of messages that were signed and taken
    witness/           heads of the sites' journals, countersigned
    studies/           one run folder a study
    logs/, run/        what the processes say; where they listen

Knows no study and no message.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from fedtune.config.plan import StudyPlan
from fedtune.errors import TransportError

ENVIRONMENT_VARIABLE = "FEDTUNE_COORDINATOR"
_SHOWN = 12


@dataclass(frozen=True, slots=True)
class CoordinatorFolder:
    """The places inside a coordinator's folder."""

    path: Path

    @property
    def facts_file(self) -> Path:
        """What a person edits."""
        return self.path / "coordinator.yaml"

    @property
    def key_file(self) -> Path:
        """The signing key."""
        return self.path / "coordinator.key"

    @property
    def authority(self) -> Path:
        """The authority's three files."""
        return self.path / "authority"

    @property
    def enrolment(self) -> Path:
        """The enrolment's folder."""
        return self.path / "enrolment"

    @property
    def secret(self) -> Path:
        """The machine's secret."""
        return self.path / "local.secret"

    @property
    def link(self) -> Path:
        """The SuperLink's state."""
        return self.path / "link"

    @property
    def nonces(self) -> Path:
        """The memory of signed messages."""
        return self.path / "nonces.db"

    @property
    def witness(self) -> Path:
        """The receipts of all studies: a site has one journal for all of them."""
        return self.path / "witness"

    @property
    def studies(self) -> Path:
        """One run folder a study."""
        return self.path / "studies"

    @property
    def logs(self) -> Path:
        """One file a process."""
        return self.path / "logs"

    @property
    def run(self) -> Path:
        """What the processes that run now have written down for each other."""
        return self.path / "run"

    @property
    def link_ready(self) -> Path:
        """What the SuperLink that runs now has written down: its ports."""
        return self.run / "link.json"

    def private_port(self) -> int:
        """Return the port on loopback of the SuperLink that runs now. Error: `transport.not-running`."""
        try:
            return int(json.loads(self.link_ready.read_bytes())["private"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            hint = "start the coordinator: fedtune server up"
            raise TransportError("not-running", f"no SuperLink of {self.path} is running", hint=hint) from error

    def study(self, plan: StudyPlan) -> Path:
        """Return the run folder of a plan."""
        return self.studies / f"{plan.name}-{plan.sha256[:_SHOWN]}"


def find_coordinator(given: Path | None = None) -> CoordinatorFolder:
    """Return the coordinator's folder: the one given, that of FEDTUNE_COORDINATOR, or `./coordinator`."""
    return CoordinatorFolder(given or Path(os.environ.get(ENVIRONMENT_VARIABLE) or "coordinator"))
