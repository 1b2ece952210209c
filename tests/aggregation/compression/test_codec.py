import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.aggregation.compression.codec import FORMATS, Codec, largest, make_codec
from fedtune.aggregation.compression.formats import Float32, Integers
from fedtune.aggregation.compression.payload import Payload
from fedtune.errors import AggregationError, FedtuneError
from fedtune.model.layout import AdapterLayout, TensorSpec
from fedtune.privacy.random import SeededSource

State = dict[str, np.ndarray]
seeds = st.integers(0, 2**32 - 1)
keeps = st.sampled_from([0.01, 0.1, 0.5, 1.0])
CODECS = [
    make_codec(values, keep, feedback=feedback) for values in FORMATS for keep in (0.1, 1.0) for feedback in (0, 1)
]


def flat(state: State) -> np.ndarray:
    return np.concatenate([state[name].ravel().astype(float) for name in sorted(state)])


@given(values=st.sampled_from(list(FORMATS)), keep=keeps, seed=seeds)
def test_the_entries_that_are_sent_arrive_and_the_others_stay_at_the_reference(
    values: str, keep: float, seed: int, layout: AdapterLayout, make_state: Callable[..., State]
) -> None:
    reference, state = make_state(layout, seed), make_state(layout, seed + 1)
    codec = Codec(Integers(8) if values == "int8" else FORMATS[values], keep)
    payload, _ = codec.encode(state, reference, layout, {}, SeededSource("trip", seed))
    decoded = codec.decode(payload, reference, layout)
    assert [(name, array.shape, array.dtype) for name, array in decoded.items()] == [
        (spec.name, spec.shape, np.float32) for spec in layout.tensors
    ]
    wanted, reached, start = flat(state), flat(decoded), flat(reference)
    changed = np.flatnonzero(reached != start)
    assert len(changed) <= math.ceil(keep * layout.size)
    step = np.abs(wanted - start)
    allowed = {"fp32": 0, "fp16": 2**-10, "bf16": 2**-7, "int8": 0.009, "int4": 0.16}[values] * step.max()
    assert (np.abs(reached - wanted)[changed] <= allowed + 1e-6).all()
    untouched = np.setdiff1d(np.arange(layout.size), changed)
    if keep < 1 and values == "fp32":
        assert step[untouched].max(initial=0) <= step[changed].min() + 1e-6


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_the_reported_bytes_are_the_bytes_of_the_payload_and_known_before(
    codec: Codec, layout: AdapterLayout, make_state: Callable[..., State]
) -> None:
    payload, _ = codec.encode(make_state(layout, 1), make_state(layout, 0), layout, {}, SeededSource("size"))
    assert {name: len(array) for name, array in payload.arrays.items()} == codec.lengths(layout)
    assert payload.nbytes == sum(len(array.tobytes()) for array in payload.arrays.values())
    assert all(array.dtype == np.uint8 for array in payload.arrays.values())


def test_the_bytes_of_a_real_adapter() -> None:
    # 24 layers of 1024 × 1024 at rank 8, B alone, against A and B in float32.
    names = [f"h.{i:02d}" for i in range(24)]
    b = AdapterLayout(tuple(TensorSpec(f"{name}.lora_B.weight", (1024, 8), "lora_B", name) for name in names))
    whole = 2 * b.size * 4
    sizes = {
        (values, keep): sum(make_codec(values, keep).lengths(b).values())
        for values, keep in [("fp16", 1.0), ("int8", 1.0), ("int4", 1.0), ("int4", 0.1)]
    }
    assert sizes[("fp16", 1.0)] * 4 == whole
    assert sizes[("int8", 1.0)] == b.size + 2 * b.size // 128
    assert sizes[("int4", 1.0)] * 15 < whole
    assert sizes[("int4", 0.1)] * 60 < whole


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_equal_streams_give_equal_bytes(codec: Codec, layout: AdapterLayout, make_state: Callable[..., State]) -> None:
    state, reference = make_state(layout, 1), make_state(layout, 0)
    one, other = (codec.encode(state, reference, layout, {}, SeededSource("same", 3))[0] for _ in range(2))
    assert {name: array.tobytes() for name, array in one.arrays.items()} == {
        name: array.tobytes() for name, array in other.arrays.items()
    }


@given(seed=seeds, count=st.integers(1, 30))
def test_the_largest_entries_are_chosen_and_of_equal_ones_the_first(seed: int, count: int) -> None:
    vector = np.round(np.random.default_rng(seed).standard_normal(30), 1).astype(np.float32)
    expected = sorted(sorted(range(30), key=lambda i: (-abs(vector[i]), i))[:count])
    assert largest(vector, count).tolist() == expected


@pytest.mark.parametrize("values", ["fp32", "int8", "int4"])
def test_the_residual_is_what_the_coordinator_did_not_get(
    values: str, layout: AdapterLayout, make_state: Callable[..., State]
) -> None:
    codec = make_codec(values, 0.1, feedback=True)
    reference, memory, source = make_state(layout, 0), {}, SeededSource("feedback")
    owed = np.zeros(layout.size)
    for turn in range(4):
        state = make_state(layout, turn + 1)
        payload, memory = codec.encode(state, reference, layout, memory, source)
        owed += flat(state) - flat(reference)
        owed -= flat(codec.decode(payload, reference, layout)) - flat(reference)
        np.testing.assert_allclose(flat(memory), owed, atol=1e-5)


def test_the_memory_keeps_residuals_of_tensors_that_another_round_sends(
    layout: AdapterLayout, make_state: Callable[..., State]
) -> None:
    codec, only_b = make_codec("int4", 0.2, feedback=True), layout.without("lora_A")
    state, reference = make_state(layout, 1), make_state(layout, 0)
    _, memory = codec.encode(state, reference, layout, {}, SeededSource("all"))
    _, after = codec.encode(state, reference, only_b, memory, SeededSource("b"))
    assert after.keys() == memory.keys()
    for spec in layout.tensors:
        name = f"residual/{spec.name}"
        assert (after[name].tobytes() == memory[name].tobytes()) == (spec.role == "lora_A")


def test_without_feedback_nothing_is_remembered_or_added(
    layout: AdapterLayout, make_state: Callable[..., State]
) -> None:
    codec = make_codec("fp32", 0.1)
    state, reference = make_state(layout, 1), make_state(layout, 0)
    first, memory = codec.encode(state, reference, layout, {}, SeededSource("x"))
    assert memory == {}
    stale = {f"residual/{name}": array for name, array in make_state(layout, 2).items()}
    second, _ = codec.encode(state, reference, layout, stale, SeededSource("x"))
    assert first.arrays["values"].tobytes() == second.arrays["values"].tobytes()


def descent(codec: Codec, rounds: int = 400) -> float:
    """Distance to the optimum of ½·Σ (xⱼ − 1)² over nineteen entries after compressed gradient steps of one site.

    A twentieth entry's gradient is always the longest, though its mean is zero.
    """
    layout = AdapterLayout((TensorSpec("x", (20,), "head"),))
    state, memory, source = {"x": np.zeros(20, np.float32)}, {}, SeededSource("descent")
    for turn in range(rounds):
        gradient = state["x"] - 1
        gradient[0] = 2.5 if turn % 2 else -2.5
        moved = {"x": state["x"] - np.float32(0.02) * gradient}
        payload, memory = codec.encode(moved, state, layout, memory, source)
        state = codec.decode(payload, state, layout)
    return float(np.linalg.norm(state["x"][1:] - 1))


@pytest.mark.parametrize("values", ["fp32", "bf16", "int8", "int4"])
def test_feedback_reaches_the_optimum_where_plain_top_k_never_leaves_the_start(values: str) -> None:
    start = math.sqrt(19)
    assert descent(make_codec(values, 0.05)) == pytest.approx(start)
    assert descent(make_codec(values, 0.05, feedback=True)) < 0.1 * start


def hostile(payload: Payload, name: str, array: np.ndarray | None) -> Payload:
    arrays = {key: value for key, value in payload.arrays.items() if key != name}
    return Payload(arrays if array is None else {**arrays, name: array})


@pytest.mark.parametrize("name", ["positions", "values", "scales"])
def test_arrays_of_other_names_lengths_and_types_are_refused(
    name: str, layout: AdapterLayout, make_state: Callable[..., State]
) -> None:
    codec, reference = make_codec("int4", 0.2), make_state(layout, 0)
    payload, _ = codec.encode(make_state(layout, 1), reference, layout, {}, SeededSource("h"))
    good = payload.arrays[name]
    bad = {
        "message.missing-key": hostile(payload, name, None),
        "message.unknown-key": hostile(payload, "more", good),
        "message.wrong-dtype": hostile(payload, name, good.view(np.int8)),
        "message.wrong-shape": hostile(payload, name, good[:-1]),
    }
    two_dimensional = hostile(payload, name, good.reshape(1, -1))
    for code, broken in [*bad.items(), ("message.wrong-shape", two_dimensional)]:
        with pytest.raises(FedtuneError) as caught:
            codec.decode(broken, reference, layout)
        assert caught.value.code == code


@pytest.mark.parametrize("codec", CODECS[::2], ids=str)
@given(data=st.data())
def test_random_bytes_are_refused_or_a_finite_state(
    codec: Codec, data: st.DataObject, layout: AdapterLayout, make_state: Callable[..., State]
) -> None:
    reference = make_state(layout, 0)
    generator = np.random.default_rng(data.draw(seeds))
    arrays = {name: generator.integers(0, 256, n, dtype=np.uint8) for name, n in codec.lengths(layout).items()}
    try:
        state = codec.decode(Payload(arrays), reference, layout)
    except FedtuneError as error:
        assert error.code in {"message.wrong-encoding", "aggregation.not-finite"}  # noqa: PT017 - either may happen
        return
    assert np.isfinite(flat(state)).all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("keep", [0.1, 1.0])
def test_a_state_that_is_not_finite_is_never_sent(
    value: float, keep: float, layout: AdapterLayout, make_state: Callable[..., State]
) -> None:
    state = make_state(layout, 1)
    state["score.weight"][0, 0] = value
    with pytest.raises(AggregationError) as caught:
        make_codec("int8", keep).encode(state, make_state(layout, 0), layout, {}, SeededSource("x"))
    assert caught.value.code == "aggregation.not-finite"


def test_a_difference_or_a_sum_beyond_float32_is_refused(make_layout: Callable, make_state: Callable) -> None:
    layout = make_layout({"a": (1, 2, 2)}, None)
    high = {name: np.full_like(array, 3e38) for name, array in make_state(layout, 0).items()}
    low = {name: -array for name, array in high.items()}
    with pytest.raises(AggregationError):
        make_codec("fp32").encode(high, low, layout, {}, SeededSource("x"))
    zero = {name: 0 * array for name, array in high.items()}
    payload, _ = make_codec("fp32").encode(high, zero, layout, {}, SeededSource("x"))
    with pytest.raises(AggregationError):
        make_codec("fp32").decode(payload, high, layout)


@pytest.mark.parametrize("keep", [0.0, -0.1, 1.1, math.nan])
def test_keeping_nothing_or_more_than_all_is_refused(keep: float) -> None:
    with pytest.raises(AggregationError) as caught:
        Codec(Float32(), keep)
    assert caught.value.code == "aggregation.bad-compression"


def test_an_unknown_format_names_those_there_are() -> None:
    with pytest.raises(AggregationError) as caught:
        make_codec("int2")
    assert all(name in caught.value.hint for name in FORMATS)
