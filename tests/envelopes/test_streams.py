"""A stream's numbers only go up, on both sides, and its state stays as small as one message's header."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.envelopes.envelope import Envelope, Header
from fedtune.envelopes.streams import DELIVERIES, Kept, Letter, Receiver, Sender, Stream
from tests.support.parties import BODY, COORDINATOR, FEDERATION, NOON, STUDY, Federation, code_of, refused

FED = Federation()
FED.join(COORDINATOR)
FED.join("bank-1")
KEY = FED.keys[COORDINATOR]
LETTER = Letter(FEDERATION, Stream(COORDINATOR, "bank-1", STUDY, "request"), 1, "train", BODY, 60_000)
REQUEST = FED.header()


def numbered(sequence: int, reply_to: str = "") -> Header:
    return replace(REQUEST, sequence=sequence, reply_to=reply_to, direction="answer" if reply_to else "request")


def name(sequence: int) -> str:
    return f"{sequence:064x}"


@given(st.lists(st.integers(0, 10**14), min_size=1, max_size=20))
def test_a_senders_numbers_go_up_whatever_its_clock_does(times: list[int]) -> None:
    sender, numbers = Sender(), []
    for now in times:
        sender, envelope = Sender.from_bytes(sender.to_bytes()).sign(LETTER, KEY, now)
        numbers.append(envelope.header.sequence)
    assert numbers == sorted(set(numbers))


def test_a_sender_that_lost_its_memory_does_not_use_a_number_again() -> None:
    old, first = Sender().sign(LETTER, KEY, NOON)
    _, second = old.sign(LETTER, KEY, NOON + 10)
    _, after_restore = old.sign(LETTER, KEY, NOON + 20)
    _, after_loss = Sender().sign(LETTER, KEY, NOON + 30)
    numbers = [envelope.header.sequence for envelope in (first, second, after_restore, after_loss)]
    assert numbers == sorted(set(numbers))


def test_an_envelope_says_what_the_letter_does() -> None:
    sender, envelope = Sender().sign(replace(LETTER, reply_to="d" * 64), KEY, NOON)
    assert envelope.header == FED.header(reply_to="d" * 64)
    assert sender.newest == envelope
    assert Stream.of(envelope.header) == LETTER.stream


@given(st.lists(st.tuples(st.integers(0, 30), st.sampled_from("abc")), max_size=60))
def test_answers_are_taken_in_order_and_one_a_request(coming: list[tuple[int, str]]) -> None:
    state, highest, newest = Receiver(), -1, ""
    for sequence, letter in coming:
        header, digest = numbered(sequence, letter * 64), name(sequence)
        code = code_of(lambda state=state, header=header, digest=digest: state.accept(header, digest, 0))
        if sequence <= highest:
            assert code == "envelope.replayed"
        elif letter == newest:
            assert code == "envelope.answered"
        else:
            assert not code
            state = Receiver.from_bytes(state.to_bytes()).accept(header, digest, 0)
            highest, newest = sequence, letter


@given(st.lists(st.integers(0, 30), max_size=60))
def test_requests_are_taken_in_order_and_the_newest_again_a_few_times(sequences: list[int]) -> None:
    state, taken = Receiver(), []
    for sequence in sequences:
        fits = sequence > max(taken, default=-1) or (taken[-1] == sequence and taken.count(sequence) < DELIVERIES)
        if code_of(lambda state=state, sequence=sequence: state.accept(numbered(sequence), name(sequence), 0)):
            assert not fits
        else:
            state = state.accept(numbered(sequence), name(sequence), 0)
            taken.append(sequence)
            assert state.deliveries == taken.count(sequence)
            assert fits
    assert taken == sorted(taken)


def test_another_message_under_the_newest_number_is_refused() -> None:
    state = Receiver().accept(numbered(5), name(5), 0)
    assert state.accept(numbered(5), name(5), 0).deliveries == 2
    assert refused(lambda: state.accept(numbered(5), name(6), 0)) == "envelope.replayed"


def test_an_answer_is_never_taken_again() -> None:
    state = Receiver().accept(numbered(5, "d" * 64), name(5), 0)
    assert refused(lambda: state.accept(numbered(5, "d" * 64), name(5), 0)) == "envelope.replayed"
    assert refused(lambda: state.accept(numbered(6, "d" * 64), name(6), 0)) == "envelope.answered"
    assert state.accept(numbered(6, "e" * 64), name(6), 0).sequence == 6


def test_once_a_newer_key_has_spoken_an_older_is_not_heard() -> None:
    state = Receiver().accept(numbered(5), name(5), 1)
    assert refused(lambda: state.accept(numbered(6), name(6), 0)) == "envelope.retired-key"
    assert Receiver().accept(numbered(6), name(6), 0).generation == 0  # the control: nobody newer has spoken
    assert state.accept(numbered(6), name(6), 2).generation == 2


def test_an_answer_is_kept_for_the_newest_request_only() -> None:
    kept = Kept(Envelope.sign(REQUEST, KEY), b"\0small\xff")
    state = Receiver().accept(numbered(5), name(5), 0)
    assert state.answered(name(4), kept) == state
    answered = state.answered(name(5), kept)
    assert Receiver.from_bytes(answered.to_bytes()) == answered
    assert answered.accept(numbered(5), name(5), 0).kept == kept
    assert answered.accept(numbered(6), name(6), 0).kept is None


def test_a_stream_that_has_not_begun_has_no_bytes() -> None:
    assert Receiver.from_bytes(None) == Receiver()
    assert Sender.from_bytes(None) == Sender()
    assert Sender.from_bytes(Sender().to_bytes()) == Sender()


@pytest.mark.parametrize("count", [100_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_the_state_after_a_million_messages_is_that_after_one(count: int) -> None:
    state = first = Receiver().accept(numbered(10**9), name(10**9), 0)
    header = REQUEST
    for sequence in range(10**9 + 1, 10**9 + count):
        object.__setattr__(header, "sequence", sequence)
        state = state.accept(header, name(10**9), 0)
    assert state.sequence == 10**9 + count - 1
    assert len(state.to_bytes()) == len(first.to_bytes()) < 500


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"7", b"{}", b'{"newest":null,"more":1}'])
def test_a_state_that_nobody_wrote_is_refused(raw: bytes) -> None:
    assert refused(lambda: Sender.from_bytes(raw)) == "envelope.damaged-memory"
    assert refused(lambda: Receiver.from_bytes(raw)) == "envelope.damaged-memory"
