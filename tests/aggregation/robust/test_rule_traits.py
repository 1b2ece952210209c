import pytest

from fedtune.aggregation.robust.rules import RobustRule
from fedtune.aggregation.robust.traits import RULES, check_shares, check_sites
from fedtune.errors import AggregationError

LEAST = {
    "median": [1, 3, 5, 7],
    "trimmed_mean": [1, 3, 5, 7],
    "geometric_median": [1, 3, 5, 7],
    "norm_clip": [1, 3, 5, 7],
    "krum": [3, 5, 7, 9],
    "multi_krum": [3, 5, 7, 9],
    "bulyan": [3, 7, 11, 15],
}


def refused(name: str, sites: int, attackers: int) -> AggregationError:
    with pytest.raises(AggregationError) as caught:
        check_sites(name, sites, attackers)
    return caught.value


def test_every_rule_has_its_published_least_number_of_sites() -> None:
    assert {name: [rule.least_sites(f) for f in range(4)] for name, rule in RULES.items()} == LEAST


@pytest.mark.parametrize("name", list(RULES))
@pytest.mark.parametrize("attackers", range(4))
def test_one_site_less_than_a_rule_needs_is_refused_with_the_need_and_its_source(name: str, attackers: int) -> None:
    least = LEAST[name][attackers]
    check_sites(name, least, attackers)
    error = refused(name, least - 1, attackers)
    assert error.code == "aggregation.too-few-sites"
    assert RULES[name].needs in error.message
    assert "arXiv" in error.message
    assert f"use {least} or more sites" in error.hint


def test_the_refusal_names_the_most_attackers_that_would_do() -> None:
    assert "at most 1 attackers" in refused("bulyan", 10, 2).hint
    assert "at most" not in refused("krum", 2, 0).hint


def test_a_negative_number_of_attackers_is_refused() -> None:
    assert refused("krum", 9, -1).code == "aggregation.bad-attackers"


def test_an_unknown_rule_names_those_there_are() -> None:
    with pytest.raises(AggregationError) as caught:
        RobustRule("crum", attackers=1)
    assert caught.value.code == "aggregation.unknown-rule"
    assert all(name in caught.value.hint for name in RULES)


@pytest.mark.parametrize("threshold", [0.0, -1.0, float("nan"), float("inf")])
def test_a_threshold_that_is_no_length_is_refused(threshold: float) -> None:
    with pytest.raises(AggregationError) as caught:
        RobustRule("norm_clip", attackers=1, threshold=threshold)
    assert caught.value.code == "aggregation.bad-threshold"


@pytest.mark.parametrize("name", list(RULES))
def test_unequal_weights_are_honoured_or_refused_and_never_ignored(name: str) -> None:
    shares = [0.04, 0.16, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1]
    if name in {"geometric_median", "norm_clip"}:
        check_shares(name, shares, 1)
        return
    with pytest.raises(AggregationError) as caught:
        check_shares(name, shares, 1)
    assert caught.value.code == "aggregation.unequal-weights"
    assert "geometric_median" in caught.value.hint


def test_a_site_with_half_of_all_weight_cannot_be_one_of_the_attackers() -> None:
    check_shares("geometric_median", [0.4, 0.3, 0.3], 1)
    with pytest.raises(AggregationError) as caught:
        check_shares("geometric_median", [0.5, 0.25, 0.25], 1)
    assert caught.value.code == "aggregation.heavy-sites"
