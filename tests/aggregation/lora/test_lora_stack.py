"""The stack: what goes in comes out, from memory or from disk, in the order of names."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.aggregation.lora.factors import nothing
from fedtune.aggregation.lora.gather import Collector
from fedtune.aggregation.lora.stack import SpillingStack
from fedtune.errors import AggregationError, RunError
from fedtune.model.layout import AdapterLayout, TensorSpec

HEAD = AdapterLayout((TensorSpec("x", (3,), "head"),))


def reply(seed: int, rank: int = 2) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {"a": generator.standard_normal((rank, 5)).astype(np.float32), "b": generator.standard_normal((7, rank))}


@given(st.lists(st.integers(0, 4), min_size=1, max_size=6), st.integers(0, 800), st.randoms(use_true_random=False))
def test_every_tensor_comes_back_bit_for_bit_whatever_was_spilled(ranks: list[int], bound: int, random: object) -> None:
    replies = {f"site-{at}": reply(at, rank) for at, rank in enumerate(ranks)}
    stack, arrival = SpillingStack(most_bytes=bound), list(replies)
    random.shuffle(arrival)
    for site in arrival:
        stack.add(site, replies[site], 1 + ranks[int(site[5:])])
    for name in ("a", "b"):
        for found, site in zip(stack.tensors(name), sorted(replies), strict=True):
            assert (found.shape, found.dtype) == (replies[site][name].shape, replies[site][name].dtype)
            assert found.tobytes() == replies[site][name].tobytes()
    assert stack.shares == pytest.approx([(1 + rank) / sum(1 + r for r in ranks) for rank in ranks])
    stack.close()


def test_memory_stays_under_the_bound_and_the_rest_is_on_disk(tmp_path: Path) -> None:
    array = {"a": np.ones((256, 1024), np.float32)}  # 1 MiB
    stack = SpillingStack(most_bytes=3 * 2**20, folder=tmp_path)
    tracemalloc.start()
    for site in range(20):
        stack.add(f"{site:02d}", {"a": array["a"] + np.float32(site)}, 1.0)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 4 * 2**20
    assert stack.spilled == 17 * 2**20
    assert [found[0, 0] for found in stack.tensors("a")] == [1 + site for site in range(20)]
    stack.close()


def test_nothing_of_the_file_has_a_name_in_the_folder(tmp_path: Path) -> None:
    stack = SpillingStack(most_bytes=0, folder=tmp_path)
    stack.add("a", reply(0), 1.0)
    assert stack.spilled
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_an_error_that_names_it(tmp_path: Path) -> None:
    stack = SpillingStack(most_bytes=0, folder=tmp_path / "missing")
    with pytest.raises(RunError) as caught:
        stack.add("a", reply(0), 1.0)
    assert "missing" in caught.value.message
    assert stack.shares == ()


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_a_weight_that_is_none_is_refused(weight: float) -> None:
    with pytest.raises(AggregationError) as caught:
        SpillingStack().add("a", reply(0), weight)
    assert caught.value.code == "aggregation.bad-weight"


@pytest.mark.parametrize("layouts", [(HEAD, nothing()), (nothing(), HEAD), (HEAD, HEAD)])
def test_a_site_counts_once_in_mean_and_stack_alike(layouts: tuple[AdapterLayout, AdapterLayout]) -> None:
    collector = Collector(*layouts)
    one, two = ({"x": np.full(3, value, np.float32)} for value in (1, 2))
    collector.add("a", one, 1.0)
    with pytest.raises(AggregationError) as caught:
        collector.add("a", two, 1.0)
    assert caught.value.code == "aggregation.duplicate-site"
    assert collector.count == 1


def test_a_reply_that_the_mean_refuses_is_not_in_the_stack_either() -> None:
    collector = Collector(HEAD, HEAD)
    collector.add("a", {"x": np.ones(3, np.float32)}, 1.0)
    with pytest.raises(AggregationError):
        collector.add("b", {"x": np.full(3, np.nan, np.float32)}, 1.0)
    gathered = collector.result()
    assert gathered.stack.shares == (1.0,)
    assert len(gathered.stack.tensors("x")) == collector.count == 1


def test_a_round_without_any_reply_has_no_result() -> None:
    with pytest.raises(AggregationError) as caught:
        Collector(HEAD, HEAD).result()
    assert caught.value.code == "aggregation.no-site"
