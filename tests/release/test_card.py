"""The card says what the adapter is for, what it rests on, and what is and is not promised."""

from __future__ import annotations

import ast
import math
import re
from typing import TYPE_CHECKING, Any

import pytest
from huggingface_hub import ModelCard

from fedtune.config.plan import StudyPlan
from fedtune.release.card import render_card
from fedtune.release.intervals import wilson
from tests.support.bench import Bench, changed, summary_of

if TYPE_CHECKING:
    from pathlib import Path


def card(site: Bench, plan: StudyPlan | None = None, **metrics: float) -> str:
    return render_card(plan or site.plan, summary_of(plan or site.plan, **metrics))


def facts(text: str) -> dict[str, str]:
    rows = re.findall(r"^\| ([^|]+?) \| ([^|]+?) \|$", text, re.MULTILINE)
    return {name: value for name, value in rows if set(name) != {"-"}}


def test_every_fact_that_a_reader_needs_is_there(pooled: Bench) -> None:
    plan, found = pooled.plan, facts(card(pooled))
    assert found["task"] == "classification"
    assert found["labels"] == "3"
    assert found["base SHA-256"] == plan.model.sha256
    assert found["plan SHA-256"] == plan.sha256
    assert found["privacy unit"] == "record"
    assert found["neighbouring relation"] == "add/remove one: one record added or removed"
    assert found["sampler"] == "poisson, rate 0.5"
    assert found["accountant"] == "pld"
    assert (found["rounds"], found["sites"]) == ("2", "2")
    spent = re.fullmatch(r"([\d.]+) at δ = 1e-05", found["largest ε spent by a site"])
    assert spent is not None
    assert float(spent[1]) == pytest.approx(plan.promise.forecast(), rel=1e-3)


def test_seeded_noise_is_not_for_release(pooled: Bench) -> None:
    assert "**Not for release:**" in card(pooled)
    assert "Not for release" not in card(pooled, changed(pooled.plan, privacy__noise="secure"))


def test_without_privacy_the_card_says_so_and_names_no_epsilon(pooled: Bench) -> None:
    off = changed(pooled.plan, privacy__mode="off")
    text = card(pooled, off)
    assert text.count("NOT PRIVATE") >= 2
    assert facts(text)["largest ε spent by a site"] == "NOT PRIVATE"
    assert "differential privacy for one" not in text
    assert "Not for release" not in text


def test_a_private_card_never_says_not_private(pooled: Bench) -> None:
    assert "NOT PRIVATE" not in card(pooled)


def test_metrics_stand_beside_what_they_do_not_promise(pooled: Bench) -> None:
    text = card(pooled, accuracy=0.75)
    assert "| accuracy | 0.2500 | 0.7500 | - |" in text
    assert "not covered by ε" in text
    assert "None was measured" in card(pooled)


def test_a_metric_that_was_not_measured_before_is_shown_as_missing(pooled: Bench) -> None:
    summary: dict[str, Any] = summary_of(pooled.plan, accuracy=0.75)
    summary["metrics"]["initial"] = {}
    assert f"| accuracy | {math.nan} | 0.7500 | - |" in render_card(pooled.plan, summary)


def test_an_accuracy_over_counted_records_has_an_interval_and_no_other_number_has(pooled: Bench) -> None:
    summary = summary_of(pooled.plan, accuracy=0.75, loss=0.5)
    summary["metrics"]["records"] = 200
    text = render_card(pooled.plan, summary)
    low, high = wilson(0.75, 200)
    assert f"| accuracy | 0.2500 | 0.7500 | {low:.4f} to {high:.4f} |" in text
    assert "| loss | 0.2500 | 0.5000 | - |" in text
    assert "Measured on 200 held-out records" in text
    noisy = summary_of(pooled.plan, accuracy=0.75, accuracy_noise=0.01)
    noisy["metrics"]["records"] = 200
    assert " to " not in render_card(pooled.plan, noisy).split("## Metrics")[1].split("##")[0]


def test_each_site_has_its_epsilon_delta_and_head(pooled: Bench) -> None:
    summary = summary_of(pooled.plan)
    summary["sites"] = [{"name": "mercy", "units": 1200, "epsilon": 2.50001}, {"name": "a|b", "epsilon": 1.0}]
    text = render_card(pooled.plan, summary)
    assert "| mercy | about 1,200 | 2.501 | 1e-05 | - | - | none witnessed |" in text
    assert r"| a\|b | - | 1.000 | 1e-05 |" in text
    assert "## Verify" not in text


def test_of_the_data_only_the_sites_own_words_are_said(pooled: Bench) -> None:
    summary = summary_of(pooled.plan)
    assert "The sites have said nothing more about it." in render_card(pooled.plan, summary)
    summary["sites"][0]["description"] = "Letters of 2024,\n# cardiology"
    text = render_card(pooled.plan, summary)
    assert "In the sites' own words:\n\n- site-0: Letters of 2024, # cardiology\n" in text
    assert "site-1:" not in text


def test_the_metadata_is_what_the_hub_reads(pooled: Bench, language: Bench) -> None:
    found = ModelCard(card(pooled)).data
    assert (found.library_name, found.pipeline_tag) == ("peft", "text-classification")
    assert {"lora", "differential-privacy"} <= set(found.tags)
    assert found.base_model is None  # a folder's name is no repository, and the Hub would refuse it
    assert ModelCard(card(language)).data.pipeline_tag == "text-generation"
    public = changed(language.plan, model__name="org/base")
    assert ModelCard(card(language, public)).data.base_model == "org/base"


def test_noisy_metrics_say_where_their_noise_stands(pooled: Bench) -> None:
    text = card(pooled, accuracy=0.75, accuracy_noise=0.01)
    assert "| accuracy_noise | 0.2500 | 0.0100 | - |" in text
    assert "NAME_noise is the standard deviation of the noise in NAME" in text
    assert "not covered by ε" not in text


@pytest.mark.parametrize("site", ["pooled", "language"])
def test_the_code_of_the_card_is_python_for_this_kind_of_model(site: str, request: pytest.FixtureRequest) -> None:
    bench: Bench = request.getfixturevalue(site)
    (code,) = re.findall(r"```python\n(.*?)```", card(bench), re.DOTALL)
    ast.parse(code)
    assert ("AutoModelForCausalLM" in code) == (site == "language")
    assert bench.plan.model.sha256 in code


@pytest.mark.parametrize("site", ["pooled", "language"])
def test_the_code_of_the_card_runs_beside_the_base(
    site: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedtune.release.adapter import save_adapter

    bench: Bench = request.getfixturevalue(site)
    save_adapter(tmp_path / "adapter", bench.workspace, bench.alive(), bench.plan, summary_of(bench.plan))
    (tmp_path / bench.plan.model.name).symlink_to(bench.machine.model_folder)
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "adapter" / "README.md").read_text(), re.DOTALL)
    exec(compile(code, "card", "exec"), {})
