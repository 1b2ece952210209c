"""The canonical order of an adapter's tensors."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.model.adapters import layout_of
from fedtune.model.layout import AdapterLayout, TensorSpec

NAMES = st.sets(st.sampled_from([f"l{i}.{m}" for i in (0, 1, 2, 10) for m in "qv"]), max_size=8)


def parameters(layers: set[str]) -> list[tuple[str, tuple[int, ...]]]:
    factors = [(f"{layer}.lora_{role}.weight", (2, 5) if role == "A" else (3, 2)) for layer in layers for role in "AB"]
    return [*factors, ("head.weight", (4, 3))]


@given(layers=NAMES, shuffle=st.randoms())
def test_the_layout_does_not_depend_on_the_order_of_the_parameters(layers: set[str], shuffle: random.Random) -> None:
    found = parameters(layers)
    shuffle.shuffle(found)
    layout = layout_of(found)
    assert layout == layout_of(parameters(layers))
    assert list(layout.names) == sorted(layout.names)
    assert layout.size == 16 * len(layers) + 12


@given(layers=NAMES)
def test_pairs_join_the_factors_of_a_layer(layers: set[str]) -> None:
    pairs = layout_of(parameters(layers)).pairs
    assert [spec_a.layer for spec_a, _ in pairs] == [spec_b.layer for _, spec_b in pairs] == sorted(layers)
    assert {(spec_a.role, spec_b.role) for spec_a, spec_b in pairs} <= {("lora_A", "lora_B")}


@given(layers=NAMES)
def test_without_a_role_the_rest_keeps_its_order(layers: set[str]) -> None:
    layout = layout_of(parameters(layers))
    rest = layout.without("lora_A")
    assert rest.names == tuple(name for name in layout.names if not name.endswith("lora_A.weight"))
    assert "head.weight" in rest.names


def test_what_is_not_a_factor_is_a_head() -> None:
    (spec,) = layout_of([("base_model.model.classifier.bias", (3,))]).tensors
    assert (spec.role, spec.layer, spec.size) == ("head", "", 3)


@pytest.mark.parametrize("names", [("b", "a"), ("a", "a")])
def test_an_order_that_others_would_not_walk_cannot_be_made(names: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="sorted"):
        AdapterLayout(tuple(TensorSpec(name, (1,), "head") for name in names))
