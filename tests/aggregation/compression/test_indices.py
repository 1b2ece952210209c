import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.aggregation.compression import indices
from fedtune.errors import MessageError


@st.composite
def chosen(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    size = draw(st.integers(1, 3000))
    positions = draw(st.sets(st.integers(0, size - 1), min_size=1, max_size=60))
    return np.array(sorted(positions), np.int64), size


@given(chosen())
def test_positions_survive_and_their_length_is_known_before(case: tuple[np.ndarray, int]) -> None:
    positions, size = case
    code = indices.encode(positions, size)
    assert code.dtype == np.uint8
    assert len(code) == indices.encoded_length(len(positions), size)
    assert indices.decode(code, len(positions), size).tolist() == positions.tolist()


@pytest.mark.parametrize("size", [1, 2, 7, 8, 64, 1000])
def test_all_positions_and_each_single_one_survive(size: int) -> None:
    everything = np.arange(size)
    assert indices.decode(indices.encode(everything, size), size, size).tolist() == everything.tolist()
    for position in range(size):
        assert indices.decode(indices.encode(np.array([position]), size), 1, size).tolist() == [position]


@given(chosen(), st.data())
def test_no_bytes_decode_to_anything_but_what_an_encoder_writes(
    case: tuple[np.ndarray, int], data: st.DataObject
) -> None:
    positions, size = case
    count, length = len(positions), indices.encoded_length(len(positions), size)
    code = np.frombuffer(data.draw(st.binary(min_size=length, max_size=length)), np.uint8)
    try:
        decoded = indices.decode(code, count, size)
    except MessageError as error:
        assert error.code == "message.wrong-encoding"  # noqa: PT017 - most random bytes are refused, some are a code
        return
    assert indices.encode(decoded, size).tobytes() == code.tobytes()
    assert sorted(set(decoded.tolist())) == decoded.tolist()
    assert 0 <= decoded.min() <= decoded.max() < size


@given(chosen(), st.data())
def test_a_flipped_bit_is_another_code_or_refused(case: tuple[np.ndarray, int], data: st.DataObject) -> None:
    positions, size = case
    code = indices.encode(positions, size).copy()
    code[data.draw(st.integers(0, len(code) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        assert indices.decode(code, len(positions), size).tolist() != positions.tolist()
    except MessageError:
        return


def test_one_in_a_hundred_costs_less_than_nine_bits() -> None:
    size, count = 1_000_000, 10_000
    bits = 8 * indices.encoded_length(count, size) / count
    least = (math.lgamma(size + 1) - math.lgamma(count + 1) - math.lgamma(size - count + 1)) / math.log(2) / count
    assert bits < 9
    assert bits < least + 0.6


@pytest.mark.parametrize("positions", [[10], [15], [9, 8], [8, 8], [3, 10]])
def test_positions_beyond_the_adapter_twice_or_out_of_order_are_refused(positions: list[int]) -> None:
    # They have a code of the right length with the right number of ones.
    code = indices.encode(np.array(positions), 10)
    with pytest.raises(MessageError) as caught:
        indices.decode(code, len(positions), 10)
    assert caught.value.code == "message.wrong-encoding"
