"""Measures an adapter: at every site on its held-out records, and on the coordinator's own test file where it has one.

Sites send counts or means that add up, so the global metric is that of all held-out records, or units, together. What
ε covers of them, and in which form they leave a site, `evaluation.site_metrics` says; `off` asks for none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from flwr.app import RecordDict

from fedtune.aggregation.lora.protocol import ServerState, Turn
from fedtune.config.plan import StudyPlan
from fedtune.evaluation.metrics import Tally
from fedtune.evaluation.site_metrics import Measured, event_of_evaluation, read_site_metrics, together
from fedtune.flower.messages import Evaluation, Instruction, Refusal, Standing, decode_evaluation
from fedtune.journal.witness import Head
from fedtune.model.layout import AdapterState
from fedtune_server.exchange import Exchange
from fedtune_server.facts import Metrics, SiteFacts, StudyFacts
from fedtune_server.merging import Merging, Sending

CentralTest = Callable[[AdapterState], Tally]


@dataclass(frozen=True, slots=True)
class _SiteMetrics:
    """What a site has measured, with who sent it, for which round, and the head of its journal."""

    site: str
    round: int
    measured: Measured
    head: Head


@dataclass(frozen=True, slots=True)
class Evaluator:
    """Asks sites for their metrics and runs the central test; `central` is None without a test file."""

    plan: StudyPlan
    merging: Merging
    exchange: Exchange
    central: CentralTest | None

    @property
    def headline(self) -> str:
        """The metric that progress shows."""
        return "accuracy" if self.plan.task.kind == "classification" else "loss"

    def measure(
        self, facts: StudyFacts, nodes: Mapping[str, int], number: int, state: ServerState, *, initial: bool = False
    ) -> Metrics:
        """Return global metrics of a state and note each site's own; the central test wins where there is one."""
        found = self._ask(facts, nodes, number, state) if self.plan.evaluation.site_metrics != "off" else {}
        for name, measured in found.items():
            if initial:
                facts.sites[name].initial = measured.metrics()
            else:
                facts.sites[name].final = measured.metrics()
        whole = None if self.central is None else self.central(self.merging.as_site_holds(state, number))
        measured = together(found.values()) if whole is None else whole
        facts.records = measured.records if isinstance(measured, Tally) else 0
        return measured.metrics()

    def _ask(self, facts: StudyFacts, nodes: Mapping[str, int], number: int, state: ServerState) -> dict[str, Measured]:
        cost = event_of_evaluation(self.plan)
        site_of = {
            node: name for name, node in nodes.items() if name in facts.sites and not facts.sites[name].quarantine
        }
        found: dict[str, Measured] = {}
        sending = self.merging.exchange(Turn(number + 1), state)
        instructions = {node: self._instruction(sending, number, facts.sites[name]) for node, name in site_of.items()}
        for answer in self.exchange.ask("evaluate", list(site_of), instructions, self._decode):
            site = facts.sites[site_of[answer.node]]
            reply = answer.reply
            if reply is None or (reply.site, reply.round) != (site.name, number):
                code = answer.code or "message.wrong-sender"
                site.note_failure(code)
                if answer.offence or reply is not None:
                    site.note_offence(code, self.plan.federation.bad_replies)
            else:
                found[site.name] = reply.measured
                site.note_evaluation(cost)
                site.note_held(number, instructions[answer.node].standing.mark)
        return found

    def _instruction(self, sending: Sending, number: int, site: SiteFacts) -> Instruction:
        """Return what a site is asked: whole where it can be, on top of what it has kept where the base changes."""
        if not self.merging.algorithm.traits.changes_base:
            standing = Standing(rank=site.rank, counted=site.counted)
            return Instruction(self.plan.sha256, number, sending.message(site.rank, 0), standing=standing)
        return sending.instruction(site, number)

    def _decode(self, content: RecordDict) -> _SiteMetrics | Refusal:
        reply: Evaluation | Refusal = decode_evaluation(content, self.plan.sha256)
        if isinstance(reply, Refusal):
            return reply
        return _SiteMetrics(reply.site, reply.round, read_site_metrics(self.plan, reply.tally), reply.head)
