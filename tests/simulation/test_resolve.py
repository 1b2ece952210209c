from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from fedtune.config.compose import compose
from fedtune.config.plan import StudyPlan
from fedtune.errors import FedtuneError, PrivacyError
from fedtune.privacy.accounting import epsilon
from fedtune.simulation.resolve import Resolved, resolve
from tests.support.runs import Study
from tests.support.tiny import bank_csv, tiny_base


def resolved(study: Study, *changes: str) -> Resolved:
    return resolve(compose(study.words(*changes)))


def test_a_plan_survives_its_journey_as_one_string(study: Study) -> None:
    plan = resolved(study).plan
    assert StudyPlan.from_json(plan.json_text) == plan
    assert StudyPlan.from_json(plan.json_text).sha256 == plan.sha256


def test_a_plan_names_no_place_of_this_machine(study: Study) -> None:
    text = resolved(study, f"run.dir={study.folder / 'run'}").plan.json_text
    assert str(study.folder) not in text
    assert str(Path.home()) not in text.replace('"/"', "")


@pytest.mark.parametrize(
    "change", ["run.threads=2", "run.dir=elsewhere", "run.root=elsewhere", "run.workers=7", "run.device=auto"]
)
def test_facts_of_the_machine_do_not_change_the_plan(study: Study, change: str) -> None:
    assert resolved(study, change).plan.sha256 == resolved(study).plan.sha256


@pytest.mark.parametrize(
    "change",
    [
        "seed=1",
        "privacy.epsilon=7",
        "privacy.noise=secure",
        "privacy.clip_norm=0.5",
        "training.learning_rate=0.7",
        "lora.rank=3",
        "aggregation=ffa",
        "federation.rounds=3",
        "data.max_tokens=23",
        "data.holdout=0.3",
        "model.head_scale=2.0",
        "study.name=other",
    ],
)
def test_whatever_defines_the_study_changes_the_plan(study: Study, change: str) -> None:
    assert resolved(study, change).plan.sha256 != resolved(study).plan.sha256


def test_the_same_model_in_another_folder_with_other_bytes_changes_the_plan(study: Study, tmp_path: Path) -> None:
    same, other = tiny_base(tmp_path / "1" / "base"), tiny_base(tmp_path / "2" / "base", seed=1)
    assert resolved(study, f"model.base={same}").plan.sha256 == resolved(study).plan.sha256
    assert resolved(study, f"model.base={other}").plan.sha256 != resolved(study).plan.sha256


@pytest.mark.parametrize("target", [0.5, 3.0, 8.0])
def test_the_noise_keeps_the_promise_and_wastes_little_of_it(study: Study, target: float) -> None:
    promise = resolved(study, f"privacy.epsilon={target}", "federation.rounds=5").plan.promise
    assert 0.98 * target < epsilon([promise.event(5)], promise.delta) <= target


def test_a_noise_multiplier_replaces_the_calibration(study: Study) -> None:
    promise = resolved(study, "privacy.noise_multiplier=1.5", "privacy.epsilon=0.001").plan.promise
    assert promise.noise_multiplier == 1.5
    assert promise.epsilon == promise.forecast()


def test_noisy_metrics_are_covered_by_the_same_promise(study: Study) -> None:
    changes = ("federation.rounds=5", "evaluation.every=2", "evaluation.site_metrics=noisy", "data.holdout=0.2")
    promise = resolved(study, "privacy.epsilon=3", *changes).plan.promise
    both = [promise.event(5), promise.evaluation_event(4)]
    assert promise.evaluations == 4
    assert 0.98 * 3 < epsilon(both, promise.delta) <= 3
    more = resolved(study, "privacy.epsilon=3", *changes, "evaluation.budget_share=0.2").plan.promise
    assert more.evaluation_noise_multiplier == pytest.approx(promise.evaluation_noise_multiplier / 2)
    assert more.noise_multiplier > promise.noise_multiplier
    given = resolved(study, "privacy.noise_multiplier=1.5", *changes).plan.promise
    assert given.noise_multiplier == 1.5
    assert given.epsilon == given.forecast() > given.spent(5)


@pytest.mark.parametrize(
    ("change", "code"), [("privacy=off", "privacy.noisy-metrics"), ("data.holdout=0", "config.nothing-held-out")]
)
def test_noise_that_protects_nothing_is_refused(study: Study, change: str, code: str) -> None:
    with pytest.raises(FedtuneError) as caught:
        resolved(study, "evaluation.site_metrics=noisy", change)
    assert caught.value.code == code


def test_delta_is_below_one_in_the_largest_site_unless_it_is_given(study: Study, tmp_path: Path) -> None:
    big = bank_csv(tmp_path / "big.csv", rows=300)
    found = resolved(study, f"data.path={big}", "data.partition.scheme=quantity")
    largest = max(site.units for site in found.sites)
    assert found.plan.promise.delta == pytest.approx(largest**-1.1)
    assert resolved(study, "privacy.delta=0.001").plan.promise.delta == 0.001


def test_a_delta_that_is_too_large_for_the_smallest_site_is_a_warning(study: Study, tmp_path: Path) -> None:
    assert not [text for text in resolved(study).warnings if "1/N" in text]
    assert [text for text in resolved(study, "privacy.delta=0.07").warnings if "at least 1/N for N = 16" in text]
    big = bank_csv(tmp_path / "big.csv", rows=300)
    skewed = resolved(study, f"data.path={big}", "data.partition.scheme=quantity", "data.partition.alpha=0.3")
    smallest = min(site.units for site in skewed.sites)
    assert bool([text for text in skewed.warnings if "1/N" in text]) == (skewed.plan.promise.delta * smallest >= 1)


def test_sizes_are_told_rounded(study: Study, tmp_path: Path) -> None:
    big = bank_csv(tmp_path / "big.csv", rows=469)
    found = resolved(study, f"data.path={big}", "federation.sites=1", "data.holdout=0.1")
    assert [(site.units, site.held_out) for site in found.sites] == [(420, 47)]


def test_what_travels_depends_on_the_algorithm(study: Study) -> None:
    size = {name: resolved(study, f"aggregation={name}").plan.adapter for name in ("fedit", "ffa", "fedsvd")}
    assert size["fedit"].upload == size["fedit"].numbers == size["fedit"].trained
    assert size["ffa"].upload == size["ffa"].download < size["ffa"].numbers
    assert size["fedsvd"].upload < size["fedsvd"].download == size["fedsvd"].numbers


def test_resolving_writes_nothing(study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    resolved(study, "run.root=runs")
    assert list(tmp_path.iterdir()) == []


def test_a_refusal_has_a_code_and_a_hint(study: Study) -> None:
    with pytest.raises(PrivacyError) as caught:
        resolved(study, "privacy.epsilon=0")
    assert caught.value.code == "privacy.epsilon"
    assert "privacy=off" in caught.value.hint
    with pytest.raises(FedtuneError, match=r"federation\.sites_per_round=9 is above federation\.sites=3"):
        resolved(study, "federation.sites_per_round=9")


def test_a_resolved_study_cannot_be_changed(study: Study) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        resolved(study).plan = None  # type: ignore[misc, assignment]


def test_a_base_that_routes_tokens_of_the_whole_batch_is_refused_before_a_run_begins(tmp_path: Path) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    base = tiny_base(tmp_path / "base", "llama")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MixtralConfig(vocab_size=300, num_key_value_heads=2, num_local_experts=2, **sizes)
    MixtralForCausalLM(config).save_pretrained(base)
    records = bank_csv(tmp_path / "bank.csv")
    words = [f"data.path={records}", "data.text=text", f"model.base={base}", "federation.sites=2", "lora.layers=null"]
    with pytest.raises(PrivacyError) as caught:
        resolve(compose([*words, "lora.targets=[q_proj]", "model.head_init=zero", "model.head_center=none"]))
    assert caught.value.code == "privacy.coupled-records"
    assert resolve(compose([*words, "lora.targets=[q_proj]", "model.head_init=zero", "privacy=off"])).plan.sha256
