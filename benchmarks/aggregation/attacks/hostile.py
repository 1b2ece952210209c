"""The sites of a study, the last of which attack: they train as all do, and send something else.

Knows nothing of rules; what an attack sends is in `tests.support.attacks`. Sites answer in their order here, so those
that collude know the honest updates of the round before they write their own.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedtune.config.plan import StudyPlan
from fedtune.flower.messages import Update, decode_instruction, decode_update, encode_reply
from fedtune.model.layout import AdapterState
from fedtune_client import app as honest
from tests.support.attacks import Attack, State


@dataclass(slots=True)
class HostileSites:
    """The plan's sites as one Flower application; the last `attackers` of them send what `attack` makes of it.

    Only B and what else ΔW is linear in is attacked: A is sent as it was trained, if it is sent.
    """

    plan: StudyPlan
    attack: Attack
    attackers: int
    seen: dict[int, list[AdapterState]] = field(default_factory=dict)

    @property
    def app(self) -> ClientApp:
        """The sites."""
        app = ClientApp()
        app.query("describe")(honest.describe)
        app.train()(self._train)
        app.evaluate()(honest.evaluate_adapter)
        return app

    def _train(self, message: Message, context: Context) -> Message:
        reply = honest.train(message, context)
        update = decode_update(reply.content, self.plan.sha256)
        if not isinstance(update, Update):
            return reply
        if int(context.node_config["partition-id"]) < self.plan.federation.sites - self.attackers:
            self.seen.setdefault(update.round, []).append(update.state)
            return reply
        centre = decode_instruction(message.content, self.plan.sha256).adapter
        return Message(encode_reply(self._forged(update, centre, context)), reply_to=message)

    def _forged(self, update: Update, centre: State, context: Context) -> Update:
        """Return the update with other numbers; those of other attackers are not needed, so its own stand for them."""
        others = self.seen[update.round]
        attackers = range(len(others), self.plan.federation.sites)
        names = [name for name in update.state if ".lora_A" not in name]
        states = [{name: state[name] for name in names} for state in [*others, *(update.state for _ in attackers)]]
        attacked = {name: centre[name] for name in names}
        sent = self.attack(states, attacked, attackers)[int(context.node_config["partition-id"])]
        return replace(update, state={**update.state, **sent})
