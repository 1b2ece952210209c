"""Who takes part, and what each site has spent: asked before the first round, of sites that come later, and at the end.

In a simulation a node is nobody until it has introduced itself: with a free name, and with the head of the journal that
the coordinator knows under that name or, the first time, of a journal that nobody else has shown. Between machines its
name is the one that it is enrolled with.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Container, Iterator, Sequence

from flwr.app import RecordDict

from fedtune.config.plan import StudyPlan
from fedtune.errors import FederationError, FedtuneError
from fedtune.flower.messages import Description, Instruction, Refusal, decode_description
from fedtune_server.exchange import Answer, Exchange
from fedtune_server.facts import SiteFacts, StudyFacts
from fedtune_server.replies import check_events
from fedtune_server.study import Study

_LATECOMER_SECONDS = 60.0  # a round does not wait longer for somebody who comes after its study began
logger = logging.getLogger("fedtune.coordinator")


def call_roll(exchange: Exchange, plan: StudyPlan) -> tuple[dict[str, int], StudyFacts]:
    """Return node ids and facts by site name; a node that is refused takes no part, by name where it gave one.

    Error: `federation.no-quorum` when fewer than the plan's quorum of its sites are ready.
    """
    found: dict[str, SiteFacts] = {}
    refused: dict[str, str] = {}
    unnamed: set[str] = set()
    for answer in _descriptions(exchange, plan, exchange.nodes(plan.federation.sites)):
        described = answer.reply
        if described is None:
            name = exchange.name(answer.node)
            if name:
                refused[name] = answer.code
            else:
                unnamed.add(answer.code)
        elif code := _introduce(exchange, answer.node, described, found):
            refused[described.site] = code
        else:
            found[described.site] = SiteFacts.of(described)
    for name in exchange.fleet.sites if exchange.fleet is not None else ():
        if name not in found:
            refused.setdefault(name, "federation.offline")
    _require_ready(plan, len(found), unnamed | {f"{name}: {code}" for name, code in refused.items()})
    refused = {name: refused[name] for name in sorted(refused) if name not in found}
    facts = StudyFacts({name: found[name] for name in sorted(found)}, refused=refused)
    return _nodes(exchange), facts


def welcome(study: Study) -> None:
    """Let sites of the study take part from now on that were away or not ready when it began."""
    exchange, plan, facts = study.exchange, study.plan, study.facts
    if exchange.fleet is None:
        return
    new = [node for node in exchange.online() if node not in exchange.sites]
    if not new:
        return
    for answer in _descriptions(exchange, plan, new, within=_LATECOMER_SECONDS):
        name = exchange.name(answer.node)
        described, code = answer.reply, answer.code
        if described is not None:
            code = _introduce(exchange, answer.node, described, ()) or _other_data(facts, described)
        if code:
            exchange.sites.pop(answer.node, None)
            facts.refused[name] = code
            continue
        assert described is not None  # noqa: S101 - no code means a description
        facts.refused.pop(name, None)
        facts.sites.setdefault(name, SiteFacts.of(described)).events = described.events
        logger.info("%s takes part from round %d", name, study.round + 1)
    study.nodes = _nodes(exchange)
    study.assign_ranks()


def settle(exchange: Exchange, plan: StudyPlan, facts: StudyFacts) -> None:
    """Ask once more what each site has spent, so that rounds whose reply never arrived are in the final ε.

    A site that does not answer keeps the events it last reported, and none can take back what it has reported.
    """
    for answer in _descriptions(exchange, plan, exchange.nodes(plan.federation.sites)):
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
    if exchange.fleet is not None and described.site != exchange.name(node):
        return "message.wrong-sender"
    try:
        exchange.witness.meet(described.site, described.head)
    except FedtuneError as error:
        return error.code
    for old in [old for old, site in exchange.sites.items() if site == described.site]:
        del exchange.sites[old]  # the site was enrolled anew, with another node
    exchange.sites[node] = described.site
    return ""


def _other_data(facts: StudyFacts, described: Description) -> str:
    known = facts.sites.get(described.site)
    return "federation.other-data" if known is not None and known.data_sha256 != described.data_sha256 else ""


def _nodes(exchange: Exchange) -> dict[str, int]:
    return {name: node for node, name in exchange.sites.items()}


def _descriptions(
    exchange: Exchange, plan: StudyPlan, nodes: Sequence[int], within: float = math.inf
) -> Iterator[Answer[Description]]:
    def decode(content: RecordDict) -> Description | Refusal:
        reply = decode_description(content, plan.sha256)
        if isinstance(reply, Description):
            check_events(plan, reply.events)
        return reply

    return exchange.ask("query.describe", nodes, Instruction(plan.sha256, 0, {}), decode, within=within)


def _require_ready(plan: StudyPlan, ready: int, refused: set[str]) -> None:
    if ready and ready >= plan.federation.quorum * plan.federation.sites:
        return
    raise FederationError(
        "no-quorum",
        f"{ready} of {plan.federation.sites} sites are ready ({', '.join(sorted(refused)) or 'no answer'})",
        hint="mend the sites: fedtune server status shows them, fedtune simulate --verbose what simulated ones log",
    )
