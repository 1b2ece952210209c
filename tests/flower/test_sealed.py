"""What is sealed is opened where, when and for what it was meant, whole and once; anything else is refused unread."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from flwr.app import ConfigRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from hypothesis import given
from hypothesis import strategies as st

from fedtune.envelopes.envelope import CONTEXT, Envelope
from fedtune.envelopes.nonces import MemoryNonces
from fedtune.envelopes.peers import Rotation, revoked, rotated
from fedtune.envelopes.streams import DELIVERIES
from fedtune.flower.messages import Refusal, Update, decode_instruction, decode_update, encode_reply
from fedtune.flower.sealed import ENVELOPE, open_request, seal_answer, seal_requests
from tests.support.parties import COORDINATOR, FEDERATION, OTHER_STUDY, STUDY, Forgetful, new_key, refused
from tests.support.sealed_world import (
    JOURNALS,
    SITES,
    World,
    ask,
    envelope,
    instruction,
    same,
    update,
    with_body,
    with_envelope,
)


@pytest.fixture
def world() -> World:
    return World()


def test_a_round_goes_down_and_up(world: World) -> None:
    requests = ask(world.coordinator)
    for at, site in enumerate(SITES):
        opened = world.open(site, requests[site])
        assert (opened.header.round, opened.header.kind, opened.taken.again) == (1, "train", False)
        assert decode_instruction(opened.content, STUDY).adapter["w"].tolist() == [at] * 3
        reply = update(STUDY, site, 1)
        answer = world.take(site, seal_answer(world.ends[site], opened, reply))
        assert same(answer.content, reply)
        assert isinstance(decode_update(answer.content, STUDY), Update)
    assert [site for site, _ in world.acts] == list(SITES)


def test_arrays_stay_where_they_are(world: World) -> None:
    shared = instruction(STUDY, 1)
    sealed = seal_requests(world.coordinator, (STUDY, 1, "train"), dict.fromkeys(SITES, shared), 60.0)
    for site in SITES:
        assert sealed[site]["arrays"] is shared["arrays"]
        opened = world.open(site, sealed[site])
        assert opened.content["arrays"]["w"] is shared["arrays"]["w"]


def test_a_message_whose_names_come_in_another_order_comes_out_as_it_was_signed(world: World) -> None:
    content = ask(world.coordinator)["bank-1"]
    backwards = RecordDict({name: content[name] for name in reversed(list(content))})
    assert list(backwards) != list(content)
    assert list(world.open("bank-1", backwards).content) == ["arrays", "fedtune"]


def test_a_sealed_message_survives_flowers_way_of_sending_it(world: World) -> None:
    content = ask(world.coordinator)["bank-1"]
    parts = {name: part.deflate() for name, part in get_all_nested_objects(content).items()}
    received = inflate_object_from_contents(content.object_id, parts)
    assert isinstance(received, RecordDict)
    assert same(world.open("bank-1", received).content, instruction(STUDY, 1, 0.0))


def test_a_refusal_is_sealed_too(world: World) -> None:
    request = world.open("bank-1", ask(world.coordinator)["bank-1"])
    sealed = seal_answer(world.ends["bank-1"], request, encode_reply(Refusal("policy.refused")))
    assert decode_update(world.take("bank-1", sealed).content, STUDY) == Refusal("policy.refused")


# --- what is refused unread -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spoil",
    [
        lambda content: RecordDict({name: r for name, r in content.items() if name != ENVELOPE}),
        lambda content: RecordDict({**content, ENVELOPE: ConfigRecord()}),
        lambda content: RecordDict({**content, ENVELOPE: content["arrays"]}),
        lambda content: RecordDict({**content, ENVELOPE: ConfigRecord({**content[ENVELOPE], "more": 1})}),
        lambda content: RecordDict({**content, ENVELOPE: ConfigRecord({"header": "x", "signature": b"x"})}),
        lambda content: RecordDict({**content, ENVELOPE: ConfigRecord({"header": bytes(10**6), "signature": b"x"})}),
    ],
)
def test_without_an_envelope_nothing_is_read(world: World, spoil: Callable[[RecordDict], RecordDict]) -> None:
    content = ask(world.coordinator)["bank-1"]
    assert refused(lambda: world.open("bank-1", spoil(content))) == "envelope.missing"
    assert world.open("bank-1", content)


def test_a_swapped_body_under_a_valid_header_is_refused_and_spends_no_number(world: World) -> None:
    content = ask(world.coordinator)["bank-1"]
    other = with_body(content, instruction(STUDY, 1, 666.0))
    signed = envelope(other)
    key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(signed.header.key))
    key.verify(signed.signature, CONTEXT + signed.raw)  # the control: by its signature alone it is good
    assert decode_instruction(RecordDict({n: r for n, r in other.items() if n != ENVELOPE}), STUDY)
    assert refused(lambda: world.open("bank-1", other)) == "envelope.other-body"
    assert world.acts == []
    assert not world.open("bank-1", content).taken.again


def test_an_answers_body_swapped_for_another_sites_is_refused(world: World) -> None:
    requests = ask(world.coordinator)
    answers = {site: world.serve(site, requests[site]) for site in SITES}
    swapped = with_body(answers["bank-1"], update(STUDY, "bank-1", 1, 666.0))
    assert refused(lambda: world.take("bank-1", swapped)) == "envelope.other-body"
    assert world.take("bank-1", answers["bank-1"])


def test_a_record_added_taken_away_or_renamed_is_another_body(world: World) -> None:
    content = ask(world.coordinator)["bank-1"]
    changed = [
        RecordDict({**content, "more": ConfigRecord()}),
        RecordDict({name: r for name, r in content.items() if name != "arrays"}),
        RecordDict({("arrayz" if name == "arrays" else name): r for name, r in content.items()}),
    ]
    for other in changed:
        assert refused(lambda other=other: world.open("bank-1", other)) == "envelope.other-body"
    assert world.open("bank-1", content)


def test_messages_moved_between_studies_sites_kinds_and_directions_are_refused(world: World) -> None:
    requests = ask(world.coordinator)
    request = requests["bank-1"]
    assert refused(lambda: world.open("bank-1", request, study=OTHER_STUDY)) == "envelope.other-study"
    assert refused(lambda: world.open("bank-2", request)) == "envelope.other-receiver"
    assert refused(lambda: world.open("bank-1", request, kind="evaluate")) == "envelope.other-kind"
    assert refused(lambda: world.take("bank-1", request)) == "envelope.other-sender"
    assert world.acts == []
    answers = {site: world.serve(site, requests[site]) for site in SITES}
    answer = answers["bank-1"]
    ask(world.coordinator, OTHER_STUDY)
    assert refused(lambda: world.take("bank-2", answer)) == "envelope.other-sender"
    assert refused(lambda: world.take("bank-1", answer, OTHER_STUDY)) == "envelope.other-study"
    assert refused(lambda: world.open("bank-1", answer)) == "envelope.other-sender"
    reflected = lambda: open_request(world.coordinator, answer, "bank-1", STUDY, "train")  # noqa: E731 - said once
    assert refused(reflected) == "envelope.other-direction"
    assert all(world.take(site, answers[site]) for site in SITES)  # the control: where they belong, they are taken


def test_an_answer_to_an_earlier_round_is_refused(world: World) -> None:
    late = world.serve("bank-1", ask(world.coordinator)["bank-1"])
    request = ask(world.coordinator, number=2)["bank-1"]
    assert refused(lambda: world.take("bank-1", late)) == "envelope.other-round"
    assert world.take("bank-1", world.serve("bank-1", request)).header.round == 2


def test_an_answer_to_an_earlier_request_of_the_same_round_is_refused(world: World) -> None:
    late = world.serve("bank-1", ask(world.coordinator)["bank-1"])
    again = ask(world.coordinator)["bank-1"]
    assert refused(lambda: world.take("bank-1", late)) == "envelope.other-reply-to"
    assert world.take("bank-1", world.serve("bank-1", again))


def test_an_answer_that_nobody_asked_for_is_refused(world: World) -> None:
    answer = world.serve("bank-1", ask(world.coordinator)["bank-1"])
    stranger = World(keys=world.keys, known=world.known)
    assert refused(lambda: stranger.take("bank-1", answer)) == "envelope.unasked"


def test_a_request_that_is_late_is_refused_before_it_is_acted_on(world: World) -> None:
    content = ask(world.coordinator)["bank-1"]
    world.now += 600_000 + 120_001
    assert refused(lambda: world.open("bank-1", content)) == "envelope.expired"
    assert world.acts == []


def test_a_body_that_contradicts_its_header_is_refused(world: World) -> None:
    for body in (instruction(STUDY, 2), instruction(OTHER_STUDY, 1)):
        sealed = seal_requests(world.coordinator, (STUDY, 1, "train"), {"bank-1": body}, 60.0)["bank-1"]
        assert refused(lambda sealed=sealed: world.open("bank-1", sealed)) == "envelope.contradiction"
    request = world.open("bank-1", ask(world.coordinator)["bank-1"])
    sealed = seal_answer(world.ends["bank-1"], request, update(STUDY, "bank-2", 1))
    assert refused(lambda: world.take("bank-1", sealed)) == "envelope.contradiction"


def test_a_revoked_site_is_neither_heard_nor_asked(world: World) -> None:
    answer = world.serve("bank-1", ask(world.coordinator)["bank-1"])
    world.known = revoked(world.known, "bank-1")
    assert refused(lambda: world.take("bank-1", answer)) == "envelope.revoked"
    assert refused(lambda: ask(world.coordinator, number=2)) == "envelope.revoked"
    assert ask(world.coordinator, number=2, sites=("bank-2", "bank-3"))


def test_a_key_is_rotated_in_the_middle_of_a_round(world: World) -> None:
    before = world.serve("bank-1", ask(world.coordinator)["bank-1"])
    old, world.keys["bank-1"] = world.keys["bank-1"], new_key()
    rotation = Rotation.sign(FEDERATION, "bank-1", (old, world.keys["bank-1"]), world.now)
    world.known = rotated(world.known, rotation, FEDERATION, world.now)
    world.restart("bank-1")
    world.now += 1000
    assert world.take("bank-1", before)
    request = ask(world.coordinator, number=2)["bank-1"]
    assert world.take("bank-1", world.serve("bank-1", request)).header.key == world.known["bank-1"][1].key
    thief = replace(envelope(before).header, sequence=world.now + 9, reply_to=envelope(request).digest, round=2)
    backdated = with_envelope(update(STUDY, "bank-1", 2), Envelope.sign(thief, old))
    assert refused(lambda: world.take("bank-1", backdated)) == "envelope.retired-key"


# --- again, after a crash ---------------------------------------------------------------------------------------------


def test_a_request_that_comes_again_is_answered_by_the_same_bytes(world: World) -> None:
    content = ask(world.coordinator)["bank-1"]
    first = world.serve("bank-1", content)
    world.restart("bank-1")
    JOURNALS["bank-1"].write()  # sending again is written down, so the head has moved on
    second = world.serve("bank-1", content)
    assert envelope(second) == envelope(first)
    assert same(second, first)
    assert len(world.acts) == 1
    assert world.take("bank-1", first)
    assert refused(lambda: world.take("bank-1", second)) == "envelope.replayed"


def test_a_request_whose_site_died_before_it_answered_is_acted_on_again(world: World) -> None:
    content = ask(world.coordinator)["bank-1"]
    world.open("bank-1", content)
    world.restart("bank-1")
    opened = world.open("bank-1", content)
    assert (opened.taken.again, opened.taken.kept) == (True, None)
    assert world.take("bank-1", seal_answer(world.ends["bank-1"], opened, update(STUDY, "bank-1", 1)))


def test_an_answer_with_other_arrays_is_a_new_one_and_only_one_of_both_is_taken(world: World) -> None:
    content = ask(world.coordinator)["bank-1"]
    first = world.serve("bank-1", content)
    opened = world.open("bank-1", content)
    second = seal_answer(world.ends["bank-1"], opened, encode_reply(Refusal("consent.revoked")))
    assert decode_update(world.take("bank-1", second).content, STUDY) == Refusal("consent.revoked")
    assert refused(lambda: world.take("bank-1", first)) == "envelope.replayed"
    third = seal_answer(world.ends["bank-1"], opened, update(STUDY, "bank-1", 1, 3.0))
    assert refused(lambda: world.take("bank-1", third)) == "envelope.answered"


def test_a_request_is_not_taken_forever(world: World) -> None:
    content = ask(world.coordinator)["bank-1"]
    for _ in range(DELIVERIES):
        world.serve("bank-1", content)
    assert refused(lambda: world.serve("bank-1", content)) == "envelope.replayed"
    assert len(world.acts) == 1
    assert world.serve("bank-1", ask(world.coordinator)["bank-1"])  # a fresh request for the same round


def test_a_coordinator_that_died_asks_anew_and_takes_the_answer_to_that(world: World) -> None:
    before = world.serve("bank-1", ask(world.coordinator)["bank-1"])
    assert world.take("bank-1", before)
    world.restart(COORDINATOR)  # the answer was taken, and lost before a checkpoint
    again = world.serve("bank-1", ask(world.coordinator)["bank-1"])
    assert same(world.take("bank-1", again).content, RecordDict({n: r for n, r in before.items() if n != ENVELOPE}))


def test_a_site_that_lost_its_memory_takes_nothing_from_before(world: World) -> None:
    content = ask(world.coordinator)["bank-1"]
    world.serve("bank-1", content)
    world.now += 1
    world.ends["bank-1"] = world.join("bank-1", MemoryNonces(lambda: world.now))
    assert refused(lambda: world.serve("bank-1", content)) == "envelope.before-memory"
    assert world.serve("bank-1", ask(world.coordinator)["bank-1"])
    forgetful = world.join("bank-1", Forgetful())  # the control: one that does not know when it began
    assert open_request(forgetful, content, COORDINATOR, STUDY, "train")


@given(st.data())
def test_every_bit_of_a_body_is_signed(data: st.DataObject) -> None:
    world = World()
    content = ask(world.coordinator)["bank-1"]
    twin = instruction(STUDY, 1, 0.0)
    array = twin["arrays"]["w"]
    bit = data.draw(st.integers(0, 8 * len(array.data) - 1))
    number = int.from_bytes(array.data, "little") ^ (1 << bit)
    array.data = number.to_bytes(len(array.data), "little")
    assert refused(lambda: world.open("bank-1", with_body(content, twin))) == "envelope.other-body"


def test_random_headers_and_signatures_are_refused(world: World) -> None:
    content = ask(world.coordinator)["bank-1"]
    for size in (0, 1, 64, 700):
        noise = Envelope(os.urandom(size), os.urandom(64))
        assert refused(lambda noise=noise: world.open("bank-1", with_envelope(content, noise))) == "envelope.bad-header"
