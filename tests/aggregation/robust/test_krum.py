from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.aggregation.robust.krum import bulyan_selection, krum, multi_krum, scores
from fedtune.errors import AggregationError

Clouds = Callable[..., np.ndarray]
Distances = Callable[[np.ndarray], np.ndarray]

attackers_ = st.integers(0, 3)
more = st.integers(0, 4)
seeds = st.integers(0, 2**32 - 1)


def naive_scores(rows: np.ndarray, attackers: int) -> list[float]:
    n, result = len(rows), []
    for i in range(n):
        others = sorted(float(np.linalg.norm(rows[i] - rows[j])) ** 2 for j in range(n) if j != i)
        result.append(sum(others[: n - attackers - 2]))
    return result


def naive_bulyan(rows: np.ndarray, attackers: int) -> list[int]:
    left, chosen = list(range(len(rows))), []
    for _ in range(len(rows) - 2 * attackers):
        best = min(left, key=lambda i: _left_score(rows, left, i, attackers))
        left.remove(best)
        chosen.append(best)
    return sorted(chosen)


def _left_score(rows: np.ndarray, left: list[int], i: int, attackers: int) -> tuple[float, float]:
    others = sorted(float(((rows[i] - rows[j]) ** 2).sum()) for j in left if j != i)
    return sum(others[: max(1, len(left) - attackers - 2)]), sum(others)


@given(attackers=attackers_, extra=more, seed=seeds)
def test_krum_and_multi_krum_choose_what_a_loop_over_the_paper_chooses(
    attackers: int, extra: int, seed: int, make_cloud: Clouds, distances: Distances
) -> None:
    rows = make_cloud(2 * attackers + 3 + extra, 3, seed)
    expected = naive_scores(rows, attackers)
    squared = distances(rows)
    np.testing.assert_allclose(scores(squared, attackers), expected, rtol=1e-9)
    assert expected[krum(squared, attackers)] == pytest.approx(min(expected))
    for chosen in range(1, len(rows) - attackers):
        best = sorted(np.sort(expected)[:chosen])
        assert sorted(expected[i] for i in multi_krum(squared, attackers, chosen)) == pytest.approx(best)


@given(attackers=attackers_, extra=more, seed=seeds)
def test_bulyan_selects_what_a_loop_over_the_paper_selects(
    attackers: int, extra: int, seed: int, make_cloud: Clouds, distances: Distances
) -> None:
    rows = make_cloud(4 * attackers + 3 + extra, 3, seed)
    assert bulyan_selection(distances(rows), attackers) == naive_bulyan(rows, attackers)


@given(attackers=attackers_, extra=more, seed=seeds)
def test_a_permutation_of_the_sites_permutes_the_choice(
    attackers: int, extra: int, seed: int, make_cloud: Clouds, distances: Distances
) -> None:
    squared = distances(make_cloud(4 * attackers + 3 + extra, 3, seed))
    order = np.random.default_rng(seed).permutation(len(squared))
    mixed = squared[np.ix_(order, order)]
    assert order[krum(mixed, attackers)] == krum(squared, attackers)
    assert sorted(order[multi_krum(mixed, attackers)]) == multi_krum(squared, attackers)
    assert sorted(order[bulyan_selection(mixed, attackers)]) == bulyan_selection(squared, attackers)


@given(attackers=st.integers(1, 3), extra=more, seed=seeds, away=st.floats(0, 4))
def test_whatever_is_chosen_lies_as_near_to_an_honest_update_as_the_bound_says(
    attackers: int, extra: int, seed: int, away: float, make_cloud: Clouds, distances: Distances
) -> None:
    n = 2 * attackers + 3 + extra
    honest = make_cloud(n - attackers, 3, seed)
    rows = np.concatenate([honest, np.full((attackers, 3), away)])  # attackers close to each other, at any distance
    squared = distances(rows)
    worst_honest = scores(squared, attackers)[: len(honest)].max()
    bound = np.sqrt(worst_honest / (n - 2 * attackers - 1))
    for chosen in multi_krum(squared, attackers):
        assert np.sqrt(squared[chosen, : len(honest)].min()) <= bound + 1e-12


def test_krum_of_one_site_more_than_needed_never_takes_a_far_attacker(make_cloud: Clouds, distances: Distances) -> None:
    rows = np.concatenate([make_cloud(7, 4, seed=0), np.full((3, 4), 1e6)])
    assert krum(distances(rows), 3) < 7
    assert max(multi_krum(distances(rows), 3)) < 7


def test_krum_is_taken_over_when_the_attackers_are_more_than_it_was_told(
    make_cloud: Clouds, distances: Distances
) -> None:
    # The control: five colluding sites of ten are each other's company.
    rows = np.concatenate([make_cloud(5, 4, seed=0), np.full((5, 4), 1e6)])
    assert krum(distances(rows), 3) >= 5


def test_no_attacker_leaves_every_site_in_multi_krum_and_bulyan(make_cloud: Clouds, distances: Distances) -> None:
    squared = distances(make_cloud(5, 3, seed=1))
    assert multi_krum(squared, 0) == list(range(5))
    assert bulyan_selection(squared, 0) == list(range(5))


def test_multi_krum_of_one_is_krum(make_cloud: Clouds, distances: Distances) -> None:
    squared = distances(make_cloud(9, 3, seed=2))
    assert multi_krum(squared, 2, 1) == [krum(squared, 2)]


@pytest.mark.parametrize("chosen", [0, 8, -1])
def test_multi_krum_refuses_to_average_more_than_it_can_trust(
    chosen: int, make_cloud: Clouds, distances: Distances
) -> None:
    with pytest.raises(AggregationError) as caught:
        multi_krum(distances(make_cloud(9, 2, seed=0)), 2, chosen)
    assert caught.value.code == "aggregation.bad-selection"
    assert "1 to 7" in caught.value.hint
