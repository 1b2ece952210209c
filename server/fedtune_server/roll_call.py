"""Who takes part, and what each site has spent: asked before the first round and once more after the last.

A node is nobody until it has introduced itself: with a free name, and with the head of the journal that the coordinator
knows under that name or, the first time, of a journal that nobody else has shown.
"""

from __future__ import annotations

from collections.abc import Container, Iterator

from flwr.app import Message

from fedtune.config.plan import StudyPlan
from fedtune.errors import FederationError, FedtuneError
from fedtune.flower.messages import Description, Instruction, Refusal, decode_description
from fedtune_server.exchange import Answer, Exchange
from fedtune_server.facts import SiteFacts, StudyFacts
from fedtune_server.rounds import check_events


def call_roll(exchange: Exchange, plan: StudyPlan) -> tuple[dict[str, int], StudyFacts]:
    """Return node ids and facts by site name; a node that is refused takes no part, by name where it gave one.

    Error: `federation.no-quorum` when fewer than the plan's quorum of its sites are ready.
    """
    found: dict[str, SiteFacts] = {}
    refused: dict[str, str] = {}
    unnamed: set[str] = set()
    for answer in _descriptions(exchange, plan):
        described = answer.reply
        if described is None:
            unnamed.add(answer.code)
        elif code := _introduce(exchange, answer.node, described, found):
            refused[described.site] = code
        else:
            found[described.site] = SiteFacts.of(described)
    _require_ready(plan, len(found), unnamed | {f"{name}: {code}" for name, code in refused.items()})
    nodes = {name: node for node, name in exchange.sites.items()}
    refused = {name: refused[name] for name in sorted(refused) if name not in found}
    return nodes, StudyFacts({name: found[name] for name in sorted(found)}, refused=refused)


def settle(exchange: Exchange, plan: StudyPlan, facts: StudyFacts) -> None:
    """Ask once more what each site has spent, so that rounds whose reply never arrived are in the final ε.

    A site that does not answer keeps the events it last reported, and none can take back what it has reported.
    """
    for answer in _descriptions(exchange, plan):
        described = answer.reply
        name = exchange.sites.get(answer.node)
        if described is None:
            if name in facts.sites:
                facts.sites[name].note_failure(answer.code)
            continue
        if name is None and _introduce(exchange, answer.node, described, set(exchange.sites.values())):
            continue
        if described.site != exchange.sites[answer.node]:
            continue
        site = facts.sites.setdefault(described.site, SiteFacts.of(described))
        site.events = max(site.events, described.events, key=lambda events: sum(event.steps for event in events))


def _introduce(exchange: Exchange, node: int, described: Description, taken: Container[str]) -> str:
    """Put down who a node is, unless its name is taken; return an empty string, or the code of why it has no part."""
    if described.site in taken:
        return "message.duplicate-site"
    try:
        exchange.witness.meet(described.site, described.head)
    except FedtuneError as error:
        return error.code
    exchange.sites[node] = described.site
    return ""


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
