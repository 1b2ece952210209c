import math
from collections.abc import Callable

import numpy as np
import pytest

from fedtune.aggregation.validation import validate
from fedtune.errors import FedtuneError
from fedtune.model.layout import AdapterLayout

State = dict[str, np.ndarray]


@pytest.fixture
def reference(layout: AdapterLayout, make_state: Callable[..., State]) -> State:
    return make_state(layout, seed=0)


def refusal(state: State, layout: AdapterLayout, reference: State, max_norm: float = 1e4) -> FedtuneError:
    with pytest.raises(FedtuneError) as caught:
        validate(state, layout, max_norm=max_norm, reference=reference)
    return caught.value


def test_a_good_reply_passes(layout: AdapterLayout, reference: State, make_state: Callable[..., State]) -> None:
    validate(make_state(layout, seed=1), layout, max_norm=1e4, reference=reference)


def test_only_the_uploaded_tensors_of_the_reference_are_looked_at(
    layout: AdapterLayout, reference: State, make_state: Callable[..., State]
) -> None:
    upload = layout.without("lora_A")
    validate(make_state(upload, seed=1), upload, max_norm=1e4, reference=reference)


@pytest.mark.parametrize(
    ("spoil", "code"),
    [
        (lambda state: state.pop("score.weight"), "message.missing-key"),
        (lambda state: state.update(extra=np.zeros(1, np.float32)), "message.unknown-key"),
        (lambda state: state.update({"score.weight": state["score.weight"].T}), "message.wrong-shape"),
        (lambda state: state.update({"score.weight": state["score.weight"].astype(float)}), "message.wrong-dtype"),
        (lambda state: state.update({"score.weight": state["score.weight"].astype(">f4")}), "message.wrong-dtype"),
        (lambda state: state.update({"score.weight": np.full((3, 5), None)}), "message.wrong-dtype"),
        (lambda state: np.put(state["score.weight"], 7, math.nan), "aggregation.not-finite"),
        (lambda state: np.put(state["score.weight"], 7, math.inf), "aggregation.not-finite"),
        (lambda state: np.put(state["score.weight"], 7, 3e38), "aggregation.oversized-norm"),
    ],
)
def test_a_bad_reply_is_refused_with_its_code(
    layout: AdapterLayout,
    reference: State,
    make_state: Callable[..., State],
    spoil: Callable[[State], object],
    code: str,
) -> None:
    state = make_state(layout, seed=1)
    spoil(state)
    assert refusal(state, layout, reference).code == code


def test_a_swapped_name_is_both_missing_and_unknown_and_reported_as_missing(
    layout: AdapterLayout, reference: State, make_state: Callable[..., State]
) -> None:
    state = make_state(layout, seed=1)
    state["scores.weight"] = state.pop("score.weight")
    error = refusal(state, layout, reference)
    assert error.code == "message.missing-key"
    assert "score.weight" in error.message


def test_the_bound_is_on_the_whole_difference_and_not_on_the_state(layout: AdapterLayout, reference: State) -> None:
    step = 1 / math.sqrt(layout.size)  # a difference of norm 1
    state = {name: array + np.float32(step) for name, array in reference.items()}
    validate(state, layout, max_norm=1.001, reference=reference)
    assert refusal(state, layout, reference, max_norm=0.999).code == "aggregation.oversized-norm"


def test_a_refusal_quotes_no_value_of_a_tensor(
    layout: AdapterLayout, reference: State, make_state: Callable[..., State]
) -> None:
    state = make_state(layout, seed=1)
    state["score.weight"][0, 0] = 123456.0
    error = refusal(state, layout, reference)
    assert "1234" not in error.message + error.hint


def test_an_unknown_name_is_quoted_short_and_without_control_characters(
    layout: AdapterLayout, reference: State, make_state: Callable[..., State]
) -> None:
    state = make_state(layout, seed=1)
    state["evil\x1b[2J\n" + "x" * 10_000] = np.zeros(1, np.float32)
    message = refusal(state, layout, reference).message
    assert len(message) < 200
    assert message.isprintable()
