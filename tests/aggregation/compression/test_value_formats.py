import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fedtune.aggregation.compression.formats import BFloat16, Float16, Float32, Format, Integers
from fedtune.aggregation.compression.rounding import from_bfloat16
from fedtune.errors import AggregationError, MessageError
from fedtune.privacy.random import SeededSource

FORMATS: dict[str, Format] = {
    "fp32": Float32(),
    "fp16": Float16(),
    "bf16": BFloat16(),
    "int8": Integers(8, block=16),
    "int4": Integers(4, block=16),
}
sizes_ = st.lists(st.integers(1, 40), min_size=1, max_size=4)
vectors = st.integers(0, 2**32 - 1)


def vector_of(sizes: list[int], seed: int, scale: float = 1.0) -> np.ndarray:
    """Tensors of very different magnitude, as A and B are."""
    generator = np.random.default_rng(seed)
    parts = [scale * 10.0 ** generator.uniform(-6, 3) * generator.standard_normal(size) for size in sizes]
    return np.clip(np.concatenate(parts), -60000, 60000).astype(np.float32)


def block_maxima(vector: np.ndarray, sizes: list[int], block: int) -> np.ndarray:
    """Each number's block's largest magnitude, by loops."""
    result, start = [], 0
    for size in sizes:
        for first in range(0, size, block):
            part = vector[start + first : start + min(first + block, size)]
            result += [float(np.abs(part).max())] * len(part)
        start += size
    return np.array(result)


def largest_error(name: str, vector: np.ndarray, sizes: list[int]) -> np.ndarray:
    magnitude = np.abs(vector.astype(float))
    if name == "fp32":
        return np.zeros(len(vector))
    if name == "fp16":
        return np.maximum(2.0**-10 * magnitude, 2.0**-24)
    if name == "bf16":
        return np.maximum(2.0**-7 * magnitude, 2.0**-133)
    levels = {"int8": 127, "int4": 7}[name]
    return (1 + 2.0**-7) * block_maxima(vector, sizes, 16) / levels + 2.0**-133 + 1e-6 * magnitude


@pytest.mark.parametrize("name", list(FORMATS))
@given(sizes=sizes_, seed=vectors)
def test_a_round_trip_errs_by_no_more_than_the_table_says(name: str, sizes: list[int], seed: int) -> None:
    chosen, vector = FORMATS[name], vector_of(sizes, seed)
    written = chosen.encode(vector, sizes, SeededSource("trip", seed))
    assert {key: len(value) for key, value in written.items()} == chosen.lengths(sizes)
    decoded = chosen.decode(written, sizes)
    assert decoded.dtype == np.float32
    assert (np.abs(decoded.astype(float) - vector) <= largest_error(name, vector, sizes)).all()


@pytest.mark.parametrize("name", list(FORMATS))
def test_the_mean_of_many_round_trips_is_the_vector(name: str) -> None:
    sizes, times = [37, 5], 1500
    chosen, vector = FORMATS[name], vector_of(sizes, seed=5)
    source, total = SeededSource("unbiased", name), np.zeros(42)
    for _ in range(times):
        total += chosen.decode(chosen.encode(vector, sizes, source), sizes)
    # Hoeffding: a mean of numbers within `width` misses its expectation by more than this once in 10⁹ per entry.
    width = largest_error(name, vector, sizes)
    allowed = width * math.sqrt(math.log(2e9) / (2 * times)) + 1e-7 * np.abs(vector)
    assert (np.abs(total / times - vector) <= allowed).all()


@pytest.mark.parametrize(
    ("name", "expected"), [("fp32", 4000), ("fp16", 2000), ("bf16", 2000), ("int8", 1000 + 126), ("int4", 500 + 126)]
)
def test_the_bytes_are_those_of_the_table(name: str, expected: int) -> None:
    sizes = [990, 10]  # 62 blocks of 16 in the first, one in the second: none spans both
    assert sum(FORMATS[name].lengths(sizes).values()) == expected


@pytest.mark.parametrize("name", list(FORMATS))
def test_zeros_stay_zeros(name: str) -> None:
    zeros = np.zeros(33, np.float32)
    assert not FORMATS[name].decode(FORMATS[name].encode(zeros, [33], SeededSource("0")), [33]).any()


@pytest.mark.parametrize("name", list(FORMATS))
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_never_encoded(name: str, value: float) -> None:
    vector = np.array([1, value, 2], np.float32)
    with pytest.raises(AggregationError) as caught:
        FORMATS[name].encode(vector, [3], SeededSource("x"))
    assert caught.value.code == "aggregation.not-finite"


@pytest.mark.parametrize("name", ["int8", "int4"])
@given(vector=arrays.arrays(np.float32, 20, elements=st.floats(-(2.0**127), 2.0**127, width=32)))
def test_integers_hold_numbers_of_any_magnitude(name: str, vector: np.ndarray) -> None:
    decoded = FORMATS[name].decode(FORMATS[name].encode(vector, [20], SeededSource("any")), [20])
    error = np.abs(decoded.astype(float) - vector)
    assert (error <= largest_error(name, vector, [20])).all()


@pytest.mark.parametrize("name", list(FORMATS))
@given(data=st.data())
def test_no_bytes_decode_to_anything_that_is_not_finite(name: str, data: st.DataObject) -> None:
    sizes = [5, 3]
    written = {
        key: np.frombuffer(data.draw(st.binary(min_size=length, max_size=length)), np.uint8)
        for key, length in FORMATS[name].lengths(sizes).items()
    }
    try:
        decoded = FORMATS[name].decode(written, sizes)
    except MessageError as error:
        assert error.code == "message.wrong-encoding"  # noqa: PT017 - some random bytes are numbers
        return
    assert np.isfinite(decoded).all()


def scales_of(*numbers: float) -> np.ndarray:
    return (np.array(numbers, np.float32).view(np.uint32) >> 16).astype("<u2").view(np.uint8)


@pytest.mark.parametrize("scale", [-1.0, math.inf, math.nan, -0.0])
def test_a_scale_that_no_encoder_writes_is_refused(scale: float) -> None:
    values = np.array([1, 2, 3], np.uint8)
    assert from_bfloat16(np.frombuffer(scales_of(1.5).tobytes(), "<u2"))[0] == 1.5
    FORMATS["int8"].decode({"values": values, "scales": scales_of(1.5)}, [3])
    with pytest.raises(MessageError) as caught:
        FORMATS["int8"].decode({"values": values, "scales": scales_of(scale)}, [3])
    assert caught.value.code == "message.wrong-encoding"


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("int8", [0x80, 0, 0]),  # −128, outside the symmetric range
        ("int4", [0x80, 0x08]),  # −8
        ("int4", [0x88, 0x18]),  # bits after the third number
    ],
)
def test_a_number_that_no_encoder_writes_is_refused(name: str, values: list[int]) -> None:
    with pytest.raises(MessageError):
        FORMATS[name].decode({"values": np.array(values, np.uint8), "scales": scales_of(1.0)}, [3])


def test_a_zero_scale_has_zeros_only() -> None:
    with pytest.raises(MessageError):
        FORMATS["int8"].decode({"values": np.array([0, 1], np.uint8), "scales": scales_of(0.0)}, [2])


@pytest.mark.parametrize(("bits", "block"), [(3, 128), (8, 0), (4, -1), (16, 128)])
def test_a_format_that_does_not_exist_is_refused(bits: int, block: int) -> None:
    with pytest.raises(AggregationError) as caught:
        Integers(bits, block)  # type: ignore[arg-type]
    assert caught.value.code == "aggregation.bad-compression"
