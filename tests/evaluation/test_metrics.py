import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.errors import MessageError
from fedtune.evaluation.metrics import Confusion, Tally, classification_metrics, language_metrics, total

CLASSES = 5
pairs_of_classes = st.lists(st.tuples(st.integers(0, CLASSES - 1), st.integers(0, CLASSES - 1)), max_size=30)


def tally_of(pairs: list[tuple[int, int]], loss_sum: float = 1.0) -> Tally:
    truth, prediction = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    return Tally(loss_sum, len(pairs), confusion=Confusion.of(truth, prediction, CLASSES))


@given(pairs_of_classes.filter(bool))
def test_the_metrics_are_those_of_scikit_learn(pairs: list[tuple[int, int]]) -> None:
    from sklearn.metrics import accuracy_score, precision_recall_fscore_support

    truth, prediction = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    precision, recall, f1, _ = precision_recall_fscore_support(truth, prediction, average="macro", zero_division=0)
    expected = {
        "accuracy": accuracy_score(truth, prediction),
        "macro_precision": precision,
        "macro_recall": recall,
        "macro_f1": f1,
        "loss": 3.0 / len(pairs),
    }
    confusion = Confusion.of(truth, prediction, CLASSES)
    assert classification_metrics(confusion, 3.0, len(pairs)) == pytest.approx(expected, abs=1e-12)


def test_rows_are_truth_and_columns_are_predictions() -> None:
    assert Confusion.of([0, 0, 1], [1, 1, 1], 2).counts.tolist() == [[0, 2], [0, 1]]


@pytest.mark.parametrize(("truth", "prediction"), [([0], [2]), ([2], [0]), ([-1], [1]), ([1], [-1])])
def test_a_class_out_of_range_is_not_counted_as_another(truth: list[int], prediction: list[int]) -> None:
    with pytest.raises(ValueError, match="out of range"):
        Confusion.of(truth, prediction, 2)


@given(st.lists(pairs_of_classes, min_size=1, max_size=5))
def test_the_global_metrics_are_those_of_all_records_together(sites: list[list[tuple[int, int]]]) -> None:
    together = tally_of([pair for pairs in sites for pair in pairs], loss_sum=float(len(sites)))
    assert total(tally_of(pairs) for pairs in sites).metrics() == pytest.approx(together.metrics())


def test_the_global_metrics_are_not_the_mean_of_the_sites_metrics() -> None:
    large, small = tally_of([(0, 0)] * 9), tally_of([(1, 0)])
    assert (large + small).metrics()["accuracy"] == 0.9


@given(st.lists(st.floats(-1e30, 1e30), min_size=1, max_size=8), st.randoms(use_true_random=False))
def test_the_sum_over_sites_has_the_same_bits_in_every_order(losses: list[float], random: Any) -> None:
    tallies = [Tally(loss, 1, tokens=3) for loss in losses]
    assert total(tallies).loss_sum == total(random.sample(tallies, len(tallies))).loss_sum


def test_language_loss_is_per_token_and_perplexity_its_exponential() -> None:
    site = Tally(loss_sum=2.0, records=1, tokens=1) + Tally(loss_sum=4.0, records=1, tokens=5)
    assert site.metrics() == {"loss": 1.0, "perplexity": pytest.approx(math.e)}


def test_a_loss_beyond_the_exponential_has_no_perplexity_instead_of_an_infinity() -> None:
    assert language_metrics(1000.0, 1) == {"loss": 1000.0}


@pytest.mark.parametrize(
    "empty",
    [Tally(0.0, 0), Tally(0.0, 0, confusion=Confusion.of([], [], CLASSES)), total([]), Tally(0.0, 2, tokens=0)],
)
def test_no_held_out_record_means_no_metrics_and_no_nan(empty: Tally) -> None:
    assert empty.metrics() == {}


def test_a_site_without_records_leaves_the_global_metrics_alone() -> None:
    full = tally_of([(0, 0), (1, 0)])
    assert (full + tally_of([], loss_sum=0.0)).metrics() == full.metrics()


@given(pairs_of_classes)
def test_a_tally_travels_as_arrays(pairs: list[tuple[int, int]]) -> None:
    tally = tally_of(pairs, loss_sum=0.1)
    assert Tally.from_arrays(tally.to_arrays(), CLASSES).metrics() == tally.metrics()
    language = Tally(0.1, 3, tokens=7)
    assert Tally.from_arrays(language.to_arrays(), None).metrics() == language.metrics()


@pytest.mark.parametrize(
    "spoiled",
    [
        {"loss_sum": np.array([math.nan])},
        {"loss_sum": np.array([math.inf])},
        {"loss_sum": np.array([1.0, 2.0])},
        {"loss_sum": np.array([1.0], np.float32)},
        {"counts": np.array([-1, 0])},
        {"counts": np.array([3, 0])},
        {"confusion": np.array([[4, -2], [0, 0]])},
        {"confusion": np.zeros((3, 3), np.int64)},
        {"confusion": np.array([[2.0, 0.0], [0.0, 0.0]])},
        {"extra": np.zeros(1)},
    ],
)
def test_a_tally_that_no_records_can_have_is_refused(spoiled: dict[str, np.ndarray]) -> None:
    good = Tally(1.0, 2, confusion=Confusion.of([0, 1], [0, 1], 2)).to_arrays()
    Tally.from_arrays(good, 2)
    with pytest.raises(MessageError) as caught:
        Tally.from_arrays(good | spoiled, 2)
    assert caught.value.code == "message.broken-tally"


def test_a_tally_of_the_other_task_is_refused() -> None:
    with pytest.raises(MessageError):
        Tally.from_arrays(Tally(1.0, 2, tokens=3).to_arrays(), CLASSES)
    with pytest.raises(MessageError):
        Tally.from_arrays(tally_of([(0, 0)]).to_arrays(), None)
