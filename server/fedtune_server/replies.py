"""What a site's update must be to count: the right sender and round, events that the plan allows, a valid adapter."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from fedtune.config.plan import StudyPlan
from fedtune.errors import MessageError
from fedtune.flower.messages import Update
from fedtune.model.layout import AdapterState
from fedtune.privacy.accounting import Event
from fedtune_server.facts import SiteFacts
from fedtune_server.merging import Sending

_MOST_REPEATS = 100


def read_update(plan: StudyPlan, update: Update, site: SiteFacts, sending: Sending, rank: int) -> AdapterState:
    """Return an update's tensors, or refuse what no honest site of this plan sends: `message.*`, `aggregation.*`."""
    turn = sending.turn
    if (update.site, update.round, update.part) != (site.name, turn.number, turn.part):
        raise MessageError("wrong-sender", "the update names another site or round")
    known = plan.training.local_steps * (site.rounds + 1), site.evaluations
    check_events(plan, update.events, at_least=known)
    return sending.read(rank, update.state)


def check_events(plan: StudyPlan, events: Iterable[Event], *, at_least: tuple[int, int] = (0, 0)) -> None:
    """Refuse events that a site of this plan cannot have spent, because ε is computed from what it says.

    Every event must be of one of the plan's mechanisms, training or noisy evaluation. `at_least` are the steps of the
    rounds whose updates were accepted, and the evaluations that were; the upper bounds leave room for rounds that were
    repeated and keep the accountant's work finite.
    """
    promise = plan.promise
    if promise.mode == "off":
        return
    said = [(replace(event, steps=0), event.steps) for event in events]
    mechanisms = promise.event(0), promise.evaluation_event(0)
    if any(mechanism not in mechanisms for mechanism, _ in said):
        raise MessageError("wrong-events", "the site's privacy events are not of the plan's mechanisms")
    planned = promise.max_steps, promise.evaluations
    for mechanism, most, known in zip(mechanisms, planned, at_least, strict=True):
        spent = sum(steps for found, steps in said if found == mechanism)
        if not known <= spent <= _MOST_REPEATS * most:
            raise MessageError("wrong-events", f"the site's privacy events add up to {spent} steps, {known} are known")
