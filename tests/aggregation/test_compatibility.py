"""What cannot work together is refused when the plan is made; everything else runs, and a table says which."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from fedtune.aggregation.assembly import assemble, codec_of
from fedtune.aggregation.compatibility import check
from fedtune.aggregation.lora.registry import ALGORITHMS
from fedtune.aggregation.matrix import ALL_RULES, as_markdown, matrix, row_of
from fedtune.config.schema import Settings
from fedtune.errors import AggregationError

OPTIMIZERS = ("fedavg", "fedavgm", "fedadam", "fedyogi", "fedadagrad")
ADAPTIVE = ("fedadam", "fedyogi", "fedadagrad")
NAMES = list(ALGORITHMS)


def settings(**words: Any) -> Settings:
    """Return settings: `lora__ranks=(4, 8)` sets `lora.ranks`."""
    groups: dict[str, dict[str, Any]] = {}
    for word, value in words.items():
        group, key = word.split("__")
        groups.setdefault(group, {})[key] = value
    return Settings.model_validate({"model": {"base": "x"}, **groups} if "model" not in groups else groups)


def with_algorithm(name: str, **words: Any) -> Settings:
    return settings(aggregation__algorithm=name, **words)


def refusal(words: Settings) -> AggregationError | None:
    try:
        check(words)
    except AggregationError as error:
        return error
    return None


@pytest.mark.parametrize("name", NAMES)
def test_every_algorithm_runs_with_the_defaults(name: str) -> None:
    check(with_algorithm(name))


@pytest.mark.parametrize(("name", "optimizer"), list(itertools.product(NAMES, OPTIMIZERS)))
def test_a_server_optimiser_is_refused_where_the_table_does_not_name_it(name: str, optimizer: str) -> None:
    found = refusal(with_algorithm(name, aggregation__server_optimizer=optimizer))
    assert (found is None) == (optimizer in row_of(name).traits.optimizers)
    assert found is None or "aggregation." in found.hint


@pytest.mark.parametrize("optimizer", ADAPTIVE)
def test_fedsvd_with_a_second_moment_is_refused_and_the_nearest_that_works_is_named(optimizer: str) -> None:
    found = refusal(with_algorithm("fedsvd", aggregation__server_optimizer=optimizer))
    assert found is not None
    assert found.code == "aggregation.adaptive-with-fedsvd"
    assert "server_optimizer=fedavgm" in found.hint
    assert "algorithm=ffa" in found.hint


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("optimizer", [{"training__momentum": 0.9}, {"training__optimizer": "adamw"}])
def test_moments_stay_at_a_site_only_where_their_coordinates_stay(name: str, optimizer: dict[str, Any]) -> None:
    found = refusal(with_algorithm(name, training__optimizer_state="keep", **optimizer))
    assert (found is None) == row_of(name).keeps_moments
    assert found is None or found.code == f"aggregation.kept-state-with-{name}"


def test_a_site_optimizer_that_remembers_nothing_may_keep_its_state() -> None:
    check(with_algorithm("fedsvd", training__optimizer_state="keep"))


@pytest.mark.parametrize("name", NAMES)
def test_variates_and_residuals_are_kept_only_where_their_coordinates_stay(name: str) -> None:
    assert (refusal(with_algorithm(name, training__variates="scaffold")) is None) == row_of(name).keeps_variates
    feedback = with_algorithm(name, aggregation__upload="int4", aggregation__error_feedback=True)
    assert (refusal(feedback) is None) == row_of(name).keeps_residuals


@pytest.mark.parametrize(
    "words", [{"aggregation__local_head": True}, {"aggregation__robust": "median"}, {"lora__ranks": "hardware"}]
)
def test_variates_of_all_that_is_trained_need_all_of_it_to_be_averaged(words: dict[str, Any]) -> None:
    found = refusal(with_algorithm("ffa", training__variates="scaffold", **words))
    assert found is not None


@pytest.mark.parametrize(("name", "rule"), list(itertools.product(NAMES, ALL_RULES)))
def test_a_robust_rule_is_refused_where_the_table_does_not_name_it(name: str, rule: str) -> None:
    words = {"aggregation__robust": rule, "aggregation__attackers": 1, "federation__sites": 20}
    found = refusal(with_algorithm(name, **words))
    assert (found is None) == (rule in row_of(name).robust)
    assert found is None or (found.code == "aggregation.no-robust-form" and "aggregation." in found.hint)


def test_a_robust_rule_needs_enough_sites_in_the_smallest_round_that_counts() -> None:
    words = {"aggregation__robust": "krum", "aggregation__attackers": 2, "federation__sites": 10}
    found = refusal(with_algorithm("ffa", federation__quorum=0.5, **words))
    assert found is not None
    assert found.code == "aggregation.too-few-sites"
    check(with_algorithm("ffa", federation__quorum=0.7, **words))


def test_attackers_without_a_rule_are_refused() -> None:
    found = refusal(with_algorithm("fedsvd", aggregation__attackers=1))
    assert found is not None
    assert found.code == "aggregation.no-defence"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("base", [{"model__dtype": "bfloat16"}, {"model__quantization": "4bit"}])
def test_a_base_that_rounds_increments_off_is_refused_where_there_are_any(name: str, base: dict[str, Any]) -> None:
    words = {"model__base": "x", **base}
    assert (refusal(with_algorithm(name, **words)) is None) == row_of(name).rounded_base


@pytest.mark.parametrize("name", NAMES)
def test_ranks_of_their_own_are_for_rules_that_know_them(name: str) -> None:
    words = {"lora__ranks": (8, 4, 2), "federation__sites": 3}
    assert (refusal(with_algorithm(name, **words)) is None) == row_of(name).ranks


@pytest.mark.parametrize(
    "words",
    [
        {"lora__ranks": (8, 4), "federation__sites": 3},
        {"lora__ranks": (16, 4, 4), "federation__sites": 3},
        {"lora__ranks": "hardware", "lora__min_rank": 9},
    ],
)
def test_ranks_that_fit_no_site_are_refused(words: dict[str, Any]) -> None:
    found = refusal(with_algorithm("flexlora", **words))
    assert found is not None
    assert found.code == "aggregation.bad-ranks"


@pytest.mark.parametrize(
    "words",
    [
        {"aggregation__train_both": True},
        {"aggregation__robust_threshold": 1.0},
        {"aggregation__robust_chosen": 2},
        {"aggregation__error_feedback": True},
    ],
)
def test_a_word_that_nothing_uses_is_not_passed_over_in_silence(words: dict[str, Any]) -> None:
    found = refusal(with_algorithm("ffa", **words))
    assert found is not None
    assert found.code == "aggregation.unused"


@pytest.mark.parametrize("words", [{"aggregation__algorithm": "fedsa"}, {"aggregation__local_head": True}])
def test_a_mean_of_adapters_that_are_only_parts_is_refused(words: dict[str, Any]) -> None:
    found = refusal(settings(aggregation__average_last=3, **words))
    assert found is not None
    assert found.code == "aggregation.average-of-parts"


@pytest.mark.parametrize("name", ["flora", "fedex"])
def test_a_mean_of_adapters_whose_base_has_moved_is_refused(name: str) -> None:
    found = refusal(with_algorithm(name, aggregation__average_last=3))
    assert found is not None
    assert found.code == "aggregation.average-with-increments"


def test_the_assembled_algorithm_is_what_the_words_say() -> None:
    words = with_algorithm("ffa", aggregation__robust="krum", aggregation__upload="int8", federation__sites=9)
    algorithm = assemble(words.aggregation, words.training, words.lora, words.seed)
    assert not algorithm.traits.linear  # the coordinator sees every update
    codec = codec_of(words.aggregation)
    assert codec is not None
    assert codec_of(with_algorithm("ffa").aggregation) is None


def test_the_table_has_a_row_for_every_algorithm() -> None:
    table = as_markdown()
    assert [row.name for row in matrix()] == NAMES
    assert all(f"| `{name}` |" in table for name in NAMES)
