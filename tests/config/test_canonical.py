from __future__ import annotations

import hashlib
import json
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.config.canonical import canonical_json, sha256_hex
from fedtune.errors import ConfigError

texts = st.text(st.characters(exclude_categories=["Cs"]))
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts
json_values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4), max_leaves=20
)


def shuffled(value: object, seed: int) -> object:
    """Rebuild every mapping with its keys in another order."""
    if isinstance(value, dict):
        items = list(value.items())
        random.Random(seed).shuffle(items)
        return {key: shuffled(entry, seed) for key, entry in items}
    return [shuffled(entry, seed) for entry in value] if isinstance(value, list) else value


def typed(value: object) -> object:
    """Distinguish what `==` does not: 1, 1.0, True, -0.0."""
    if isinstance(value, dict):
        return {key: typed(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [typed(entry) for entry in value]
    return (type(value).__name__, repr(value))


@given(json_values)
def test_reading_the_canonical_text_gives_the_same_value_with_the_same_types(value: object) -> None:
    assert typed(json.loads(canonical_json(value))) == typed(value)


@given(json_values, st.integers(0, 99))
def test_the_order_of_keys_does_not_matter(value: object, seed: int) -> None:
    assert canonical_json(shuffled(value, seed)) == canonical_json(value)


@given(json_values)
def test_the_canonical_text_is_its_own_canonical_text(value: object) -> None:
    text = canonical_json(value)
    assert canonical_json(json.loads(text)) == text


@given(json_values, json_values)
def test_two_values_share_a_text_only_if_they_are_the_same(one: object, other: object) -> None:
    assert (canonical_json(one) == canonical_json(other)) == (typed(one) == typed(other))


def test_the_form_is_sorted_without_spaces_and_in_plain_utf8() -> None:
    assert canonical_json({"ε": 8.0, "b": (1, 1e-5), "a": None}) == '{"a":null,"b":[1,1e-05],"ε":8.0}'


@pytest.mark.parametrize("value", [math.nan, math.inf, {1: 2}, "\ud800", {"\udfff": 1}, {1, 2}, b"x", object()])
def test_what_json_cannot_say_is_refused_with_its_path(value: object) -> None:
    with pytest.raises(ConfigError, match=r"\$\.outer\[0\]") as caught:
        canonical_json({"outer": [value]})
    assert caught.value.code == "config.not-canonical"


def test_the_hash_is_sha256_of_the_utf8_bytes() -> None:
    assert sha256_hex("ε") == hashlib.sha256(b"\xce\xb5").hexdigest()
    assert sha256_hex("") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
