"""A study while it runs: its fixed parts, the state that each round replaces, and how it begins and is resumed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fedtune.aggregation.averaging import TailAverage
from fedtune.aggregation.lora.protocol import ServerState
from fedtune.config.plan import StudyPlan
from fedtune.errors import FederationError
from fedtune.model.layout import AdapterLayout
from fedtune.run.folder import RunFolder
from fedtune.simulation.progress import Progress
from fedtune_server.checkpoint import Checkpoint, latest_checkpoint, restore_average, save_checkpoint
from fedtune_server.exchange import Exchange
from fedtune_server.facts import StudyFacts
from fedtune_server.merging import Merging
from fedtune_server.scorecard import Evaluator


@dataclass(slots=True)
class Study:
    """A running study: the fixed parts, then the state that each round replaces."""

    plan: StudyPlan
    merging: Merging
    exchange: Exchange
    nodes: dict[str, int]
    folder: RunFolder
    progress: Progress
    evaluator: Evaluator
    state: ServerState
    average: TailAverage
    facts: StudyFacts
    round: int = 0

    @property
    def names(self) -> list[str]:
        """The study's sites in site order: those that it names, or those that have introduced themselves."""
        fleet = self.exchange.fleet
        return sorted(self.facts.sites) if fleet is None else list(fleet.sites)

    @property
    def released(self) -> ServerState:
        """The state as it would be released now: its adapter is the mean of the last `average_last` rounds."""
        if not self.round:
            return self.state
        return replace(self.state, adapter={**self.state.adapter, **self.average.result()})

    def assign_ranks(self) -> None:
        """Give every site its rank, within what the plan allows whatever the site has said; a list goes by name."""
        words = self.plan.lora
        for site in self.facts.sites.values():
            if words.ranks is None:
                site.rank = 0
            elif words.ranks == "hardware":
                site.rank = min(words.rank, max(words.min_rank, site.rank))
            else:
                site.rank = words.ranks[self.names.index(site.name)]

    def save(self) -> None:
        """Write a checkpoint."""
        checkpoint = Checkpoint(self.round, self.state, self.average.state(), self.facts.to_dict())
        save_checkpoint(self.folder.checkpoints, self.plan.sha256, checkpoint)


def averaged_layout(layout: AdapterLayout, state: ServerState) -> AdapterLayout:
    """Return the tensors of the adapter that a study averages: what its state holds, in the layout's order."""
    return AdapterLayout(tuple(spec for spec in layout.tensors if spec.name in state.adapter))


def resume(study: Study, released: Sequence[str] = ()) -> None:
    """Continue from the newest checkpoint, if there is one; what sites have spent since then is kept.

    A site stands in `released` once for each time that it was let out of quarantine.
    """
    checkpoint = latest_checkpoint(study.folder.checkpoints, study.plan.sha256)
    study.folder.rewind_metrics(0 if checkpoint is None else checkpoint.round)
    if checkpoint is None:
        return
    described, refused = study.facts.sites, study.facts.refused
    study.round, study.state = checkpoint.round, checkpoint.state
    restore_average(study.average, checkpoint)
    study.facts = StudyFacts.from_dict(checkpoint.facts)
    study.facts.refused = refused
    study.exchange.traffic.up, study.exchange.traffic.down = study.facts.bytes_up, study.facts.bytes_down
    for name, site in described.items():
        known = study.facts.sites.setdefault(name, site)
        if known.data_sha256 == site.data_sha256:
            known.events = site.events
        else:
            _refuse_other_data(study, name)
    for name in study.facts.sites.keys() & set(released):
        study.facts.sites[name].release(released.count(name))


def _refuse_other_data(study: Study, name: str) -> None:
    """Go on without a site whose records have changed; a simulation has one file, so there it is the whole study."""
    if study.exchange.fleet is None:
        message = f"{name} holds other records than when the study began"
        raise FederationError("other-data", message, hint="start a new run")
    study.facts.refused[name] = "federation.other-data"
    study.nodes.pop(name, None)
