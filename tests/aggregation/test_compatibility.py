import itertools

import pytest

from fedtune.aggregation.compatibility import check
from fedtune.config.schema import AggregationSettings, TrainingSettings
from fedtune.errors import AggregationError

OPTIMIZERS = ("fedavg", "fedavgm", "fedadam", "fedyogi", "fedadagrad")
ADAPTIVE = ("fedadam", "fedyogi", "fedadagrad")
KEEPS = TrainingSettings(optimizer_state="keep", momentum=0.9)


@pytest.mark.parametrize("optimizer", ADAPTIVE)
def test_fedsvd_with_a_second_moment_is_refused_and_the_nearest_that_works_is_named(optimizer: str) -> None:
    with pytest.raises(AggregationError) as caught:
        check(AggregationSettings(algorithm="fedsvd", server_optimizer=optimizer), TrainingSettings())
    assert caught.value.code == "aggregation.adaptive-with-fedsvd"
    check(AggregationSettings(algorithm="fedsvd", server_optimizer="fedavgm"), TrainingSettings())
    check(AggregationSettings(algorithm="ffa", server_optimizer=optimizer), TrainingSettings())
    assert "server_optimizer=fedavgm" in caught.value.hint
    assert "algorithm=ffa" in caught.value.hint


@pytest.mark.parametrize("training", [KEEPS, TrainingSettings(optimizer_state="keep", optimizer="adamw")])
def test_fedsvd_with_moments_that_stay_at_a_site_is_refused(training: TrainingSettings) -> None:
    with pytest.raises(AggregationError) as caught:
        check(AggregationSettings(algorithm="fedsvd"), training)
    assert caught.value.code == "aggregation.kept-state-with-fedsvd"
    check(AggregationSettings(algorithm="fedsvd"), training.model_copy(update={"optimizer_state": "reset"}))


def test_fedsvd_with_a_site_optimizer_that_remembers_nothing_may_keep_its_state() -> None:
    check(AggregationSettings(algorithm="fedsvd"), TrainingSettings(optimizer_state="keep"))


@pytest.mark.parametrize(("algorithm", "optimizer"), list(itertools.product(["fedit", "ffa"], OPTIMIZERS)))
def test_every_other_combination_works(algorithm: str, optimizer: str) -> None:
    check(AggregationSettings(algorithm=algorithm, server_optimizer=optimizer), KEEPS)
