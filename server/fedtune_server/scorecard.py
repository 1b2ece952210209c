"""Measures an adapter: at every site on its held-out records, and on the coordinator's own test file where it has one.

Sites send counts that add up, so the global metric is that of all held-out records together. Held-out metrics of a site
are not covered by ε; a plan with `evaluation.site_metrics=off` asks for none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from flwr.app import Message

from fedtune.config.plan import StudyPlan
from fedtune.evaluation.metrics import Tally, total
from fedtune.flower.messages import Evaluation, Instruction, Refusal, decode_evaluation
from fedtune.model.layout import AdapterState
from fedtune_server.exchange import Exchange
from fedtune_server.facts import Metrics, StudyFacts

CentralTest = Callable[[AdapterState], Tally]


@dataclass(frozen=True, slots=True)
class _SiteTally:
    """A tally with who sent it and for which round."""

    site: str
    round: int
    tally: Tally


@dataclass(frozen=True, slots=True)
class Evaluator:
    """Asks sites for their tallies and runs the central test; `central` is None without a test file."""

    plan: StudyPlan
    exchange: Exchange
    download: tuple[str, ...]
    central: CentralTest | None

    @property
    def headline(self) -> str:
        """The metric that progress shows."""
        return "accuracy" if self.plan.task.kind == "classification" else "loss"

    def measure(
        self, facts: StudyFacts, nodes: Mapping[str, int], number: int, adapter: AdapterState, *, initial: bool = False
    ) -> Metrics:
        """Return global metrics of an adapter and note each site's own; the central test wins where there is one."""
        tallies = self._ask(facts, nodes, number, adapter) if self.plan.evaluation.site_metrics == "clear" else {}
        for name, tally in tallies.items():
            if initial:
                facts.sites[name].initial = tally.metrics()
            else:
                facts.sites[name].final = tally.metrics()
        if self.central is not None:
            return self.central(adapter).metrics()
        return total(tallies[name] for name in sorted(tallies)).metrics() if tallies else {}

    def _ask(self, facts: StudyFacts, nodes: Mapping[str, int], number: int, adapter: AdapterState) -> dict[str, Tally]:
        instruction = Instruction(self.plan.sha256, number, {name: adapter[name] for name in self.download})
        site_of = {node: name for name, node in nodes.items() if name in facts.sites}
        tallies: dict[str, Tally] = {}
        for answer in self.exchange.ask("evaluate", list(site_of), instruction, self._decode):
            site = facts.sites[site_of[answer.node]]
            tally = answer.reply
            if tally is None or (tally.site, tally.round) != (site.name, number):
                code = answer.code or "message.wrong-sender"
                site.failures[code] = site.failures.get(code, 0) + 1
            else:
                tallies[site.name] = tally.tally
        return tallies

    def _decode(self, message: Message) -> _SiteTally | Refusal:
        reply: Evaluation | Refusal = decode_evaluation(message.content, self.plan.sha256)
        if isinstance(reply, Refusal):
            return reply
        classes = len(self.plan.task.labels) if self.plan.task.kind == "classification" else None
        return _SiteTally(reply.site, reply.round, Tally.from_arrays(reply.tally, classes))
