"""Over a hostile wire sites act on what was asked, in order and once, and the coordinator takes what was answered."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from pathlib import Path

from flwr.app import RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.envelopes.envelope import Envelope, Header
from fedtune.envelopes.nonces import FileNonces
from fedtune.envelopes.streams import DELIVERIES
from fedtune.flower.sealed import ENVELOPE, seal_answer
from tests.support.parties import COORDINATOR, NOON, OTHER_STUDY, STUDY, Forgetful, code_of
from tests.support.sealed_world import SITES, World, ask, envelope, same, update, with_body, with_envelope


def history(world: World) -> tuple[list[tuple[RecordDict, str, str]], list[tuple[RecordDict, str]]]:
    """Return the requests to bank-1 of two studies and its answers, all of them delivered once."""
    requests, answers = [], []
    for number in range(1, 13):
        for study in (STUDY, OTHER_STUDY):
            for kind in ("train", "evaluate"):
                world.now += 1
                content = ask(world.coordinator, study, number, kind, ("bank-1",))["bank-1"]
                answer = world.serve("bank-1", content, study, kind)
                world.take("bank-1", answer, study)
                requests.append((content, study, kind))
                answers.append((answer, study))
    return requests, answers


def test_ten_thousand_replays_are_refused_also_after_a_restart(tmp_path: Path) -> None:
    world = World()
    for name in (COORDINATOR, "bank-1"):
        world.ends[name] = world.join(name, FileNonces(tmp_path / name, lambda: NOON))
    requests, answers = history(world)
    acts, again, rng = len(world.acts), 0, random.Random(1)
    for at in range(10_000):
        if at == 5_000:
            for name in (COORDINATOR, "bank-1"):
                world.ends[name] = world.join(name, FileNonces(tmp_path / name))
        if at % 2:
            content, study = rng.choice(answers)
            assert code_of(lambda c=content, s=study: world.take("bank-1", c, s))[:9] == "envelope."
        else:
            content, study, kind = rng.choice(requests)
            again += not code_of(lambda c=content, s=study, k=kind: world.open("bank-1", c, s, k))
    assert len(world.acts) == acts
    assert again == 2 * (DELIVERIES - 1)  # the newest request of each study, answered by what was kept


def test_the_same_replays_go_through_where_numbers_are_not_remembered() -> None:
    world = World()
    requests, answers = history(world)
    for name in (COORDINATOR, "bank-1"):
        memory = Forgetful(sent=world.memories[name])  # type: ignore[arg-type] # what it has sent, it knows
        world.ends[name] = world.join(name, memory)
    acts, rng = len(world.acts), random.Random(1)
    for at in range(10_000):
        if at % 2:
            world.take("bank-1", *answers[-1])
        else:
            world.open("bank-1", *rng.choice(requests))
    assert len(world.acts) == acts + 5_000


@dataclass
class Packet:
    """What is under way: `study` and `kind` are what the transport says, which its host may change as it likes."""

    content: RecordDict
    site: str
    study: str
    kind: str
    up: bool


@dataclass
class Wire:
    """Drops, keeps, repeats, reorders, mixes and relabels whatever passes; delivers to whom it likes."""

    world: World
    rng: random.Random
    seen: list[Packet] = field(default_factory=list)
    asked: dict[str, RecordDict] = field(default_factory=dict)
    answered: dict[str, RecordDict] = field(default_factory=dict)
    acted: list[tuple[str, Header, str, RecordDict]] = field(default_factory=list)
    taken: list[tuple[str, Header, str, RecordDict]] = field(default_factory=list)
    codes: set[str] = field(default_factory=set)

    def ask(self) -> None:
        study, kind = self.rng.choice([STUDY, OTHER_STUDY]), self.rng.choice(["train", "evaluate"])
        self.world.now += self.rng.randrange(3)
        contents = ask(self.world.coordinator, study, self.rng.randrange(1, 4), kind)
        for site, content in contents.items():
            self.asked[envelope(content).digest] = content
            self.seen.append(Packet(content, site, study, kind, up=False))

    def twist(self, packet: Packet) -> Packet:
        other = self.rng.choice(self.seen)
        content = packet.content
        match self.rng.randrange(8):
            case 0:
                content = with_body(content, other.content)
            case 1:
                content = with_envelope(content, envelope(other.content))
            case 2:
                return replace(packet, site=other.site)
            case 3:
                return replace(packet, study=other.study)
            case 4:
                return replace(packet, kind=other.kind)
            case 5:
                return replace(packet, up=not packet.up)
            case 6:
                signed = envelope(content)
                header = signed.header
                changed = replace(header, round=header.round + 1, sequence=header.sequence + 1)
                content = with_envelope(content, Envelope(changed.to_bytes(), signed.signature))
            case _:
                return packet
        return replace(packet, content=content)

    def deliver(self, packet: Packet) -> None:
        try:
            if packet.up:
                opened = self.world.take(packet.site, packet.content, packet.study)
                self.taken.append((packet.site, opened.header, opened.taken.digest, opened.content))
                return
            opened = self.world.open(packet.site, packet.content, packet.study, packet.kind)
            if not opened.taken.again:
                self.acted.append((packet.site, opened.header, opened.taken.digest, opened.content))
            value = float(opened.header.sequence % 1000)
            reply = update(packet.study, packet.site, opened.header.round, value)
            answer = seal_answer(self.world.ends[packet.site], opened, reply)
        except Exception as error:  # noqa: BLE001 - any other than a refusal fails here
            self.codes.add(getattr(error, "code", repr(error)))
            return
        self.answered.setdefault(envelope(answer).digest, answer)
        self.seen.append(replace(packet, content=answer, up=True))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32))
def test_over_a_hostile_wire_sites_act_on_what_was_asked_and_the_coordinator_takes_what_was_answered(seed: int) -> None:
    wire = Wire(World(), random.Random(seed))
    wire.ask()
    wire.deliver(wire.seen[0])
    wire.deliver(wire.seen[-1])
    assert (len(wire.acted), len(wire.taken)) == (1, 1)  # the control: what nobody twists goes through
    for _ in range(60):
        match wire.rng.randrange(6):
            case 0:
                wire.ask()
            case 1:
                wire.world.restart(wire.rng.choice([COORDINATOR, *SITES]))
            case 2:
                wire.deliver(wire.rng.choice(wire.seen[-4:]))
            case _:
                wire.deliver(wire.twist(wire.rng.choice(wire.seen)))
    for made, happened in ((wire.asked, wire.acted), (wire.answered, wire.taken)):
        digests = [digest for _, _, digest, _ in happened]
        assert len(digests) == len(set(digests))
        for site, header, digest, content in happened:
            assert site == (header.receiver if header.direction == "request" else header.sender)
            assert same(RecordDict({**content, ENVELOPE: made[digest][ENVELOPE]}), made[digest])
        streams: dict[tuple[str, str], list[int]] = {}
        for site, header, _, _ in happened:
            streams.setdefault((site, header.study), []).append(header.sequence)
        assert all(numbers == sorted(set(numbers)) for numbers in streams.values())
    replies = [header.reply_to for _, header, _, _ in wire.taken]
    assert len(replies) == len(set(replies))
    assert all(code.startswith(("envelope.", "message.")) for code in wire.codes), wire.codes
