"""Who takes part, and what each site has spent: asked before the first round and once more after the last."""

from __future__ import annotations

from collections.abc import Iterator

from flwr.app import Message

from fedtune.config.plan import StudyPlan
from fedtune.errors import FederationError
from fedtune.flower.messages import Description, Instruction, Refusal, decode_description
from fedtune_server.exchange import Answer, Exchange
from fedtune_server.facts import SiteFacts, StudyFacts
from fedtune_server.rounds import check_events


def call_roll(exchange: Exchange, plan: StudyPlan) -> tuple[dict[str, int], StudyFacts]:
    """Return node ids and facts by site name; a node that does not describe itself takes no part.

    Error: `federation.no-quorum` when fewer than the plan's quorum of its sites are ready.
    """
    nodes: dict[str, int] = {}
    found: dict[str, SiteFacts] = {}
    refused: set[str] = set()
    for answer in _descriptions(exchange, plan):
        if answer.reply is None or answer.reply.site in nodes:
            refused.add(answer.code or "message.duplicate-site")
            continue
        nodes[answer.reply.site] = answer.node
        found[answer.reply.site] = SiteFacts.of(answer.reply)
    _require_ready(plan, len(found), refused)
    return nodes, StudyFacts({name: found[name] for name in sorted(found)})


def settle(exchange: Exchange, plan: StudyPlan, facts: StudyFacts) -> None:
    """Ask once more what each site has spent, so that rounds whose reply never arrived are in the final ε.

    A site that does not answer keeps the events it last reported, and none can take back what it has reported.
    """
    for answer in _descriptions(exchange, plan):
        if answer.reply is None:
            continue
        site = facts.sites.setdefault(answer.reply.site, SiteFacts.of(answer.reply))
        site.events = max(site.events, answer.reply.events, key=lambda events: sum(event.steps for event in events))


def _descriptions(exchange: Exchange, plan: StudyPlan) -> Iterator[Answer[Description]]:
    def decode(message: Message) -> Description | Refusal:
        reply = decode_description(message.content, plan.sha256)
        if isinstance(reply, Description):
            check_events(plan, reply.events)
        return reply

    nodes = exchange.nodes(plan.federation.sites)
    return exchange.ask("query.describe", nodes, Instruction(plan.sha256, 0, {}), decode)


def _require_ready(plan: StudyPlan, ready: int, refused: set[str]) -> None:
    if ready and ready >= plan.federation.quorum * plan.federation.sites:
        return
    raise FederationError(
        "no-quorum",
        f"{ready} of {plan.federation.sites} sites are ready ({', '.join(sorted(refused)) or 'no answer'})",
        hint="run again with --verbose to see what the sites log",
    )
