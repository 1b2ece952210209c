from __future__ import annotations

import copy
import io
from typing import Any

import pytest

from fedtune.simulation.report import headline_metric, render_comparison, render_summary, show


def site(index: int, **changes: Any) -> dict[str, Any]:
    metrics = {"initial": {"accuracy": 0.25}, "final": {"accuracy": 0.75}}
    base = {"name": f"site-{index}", "units": 1000 + index, "epsilon": 7.9912, "delta": 1e-5, "rounds": 10, "failed": 0}
    return base | {"metrics": metrics} | changes


summary: dict[str, Any] = {
    "study": "banks",
    "plan_sha256": "0123456789abcdef" * 4,
    "rounds": 10,
    "sites": [site(0), site(1, rounds=9, failed=1), site(2, metrics=None, units=None)],
    "metrics": {"initial": {"loss": 4.25, "accuracy": 0.125}, "final": {"loss": 0.5, "accuracy": 0.875}},
    "privacy": {
        "mode": "dp",
        "max_epsilon": 7.9912,
        "delta": 1e-5,
        "accountant": "pld",
        "unit": "record",
        "one_unit": "one record",
        "relation": "add or remove one",
        "sampler": "Poisson",
        "noise": "seeded",
        "statement": "Each site's updates are differentially private.",
    },
    "traffic": {"bytes_up": 12_000_000, "bytes_down": 34_000},
    "seconds": 83.0,
    "versions": {"fedtune": "0.1.0"},
    "run_dir": "runs/banks/my run",
}


def text(renderable: Any) -> str:
    stream = io.StringIO()
    show(renderable, stream)
    return stream.getvalue()


def changed(**changes: Any) -> dict[str, Any]:
    return copy.deepcopy(summary) | changes


def without_privacy() -> dict[str, Any]:
    return changed(privacy=summary["privacy"] | {"mode": "off", "max_epsilon": None, "delta": None})


def test_the_first_line_is_the_result_before_and_after() -> None:
    assert text(render_summary(summary)).splitlines()[0] == "banks: 10 rounds, 3 sites, accuracy 0.1250 → 0.8750"


def test_metrics_stand_before_and_after_with_their_change() -> None:
    rows = [line.split() for line in text(render_summary(summary)).splitlines()]
    assert ["loss", "4.250", "0.5000", "-3.750"] in rows
    assert ["accuracy", "0.1250", "0.8750", "+0.7500"] in rows


def test_each_site_has_its_units_rounds_failures_epsilon_delta_and_metric() -> None:
    rows = [line.split() for line in text(render_summary(summary)).splitlines()]
    assert ["site-1", "1,001", "9", "1", "7.992", "1e-05", "0.2500", "0.7500", "+0.5000"] in rows
    assert ["site-2", "-", "10", "0", "7.992", "1e-05", "-", "-", "-"] in rows


def test_noisy_metrics_are_shown_with_their_noise() -> None:
    metrics = {
        "measured_on": "held-out units of all sites, noise charged to ε",
        "initial": {"accuracy": 0.125, "accuracy_noise": 0.0062},
        "final": {"accuracy": 0.875, "accuracy_noise": 0.0062},
    }
    shown = text(render_summary(changed(metrics=metrics, sites=[site(0, metrics=metrics)])))
    assert "Held-out units of all sites, noise charged to ε" in shown
    assert shown.count("0.8750 ± 0.0062") == 2
    assert "accuracy_noise" not in shown


def test_the_privacy_statement_says_what_is_promised_and_that_seeded_noise_is_not_for_release() -> None:
    shown = " ".join(text(render_summary(summary)).split())
    for part in ("ε ≤ 7.992 at δ = 1e-05 for one record", "add or remove one", "Poisson", "pld", "updates are"):
        assert part in shown
    assert "not for release" in shown
    secure = changed(privacy=summary["privacy"] | {"noise": "secure"})
    assert "not for release" not in text(render_summary(secure))
    about = changed(privacy=summary["privacy"] | {"one_unit": "one unit (all records with the same patient_id)"})
    assert "δ = 1e-05 for one unit (all records with the same patient_id)" in text(render_summary(about))


@pytest.mark.parametrize(
    "render",
    [lambda: render_summary(without_privacy()), lambda: render_comparison([(["privacy=off"], without_privacy())])],
)
def test_without_privacy_not_private_stands_in_words(render: Any) -> None:
    shown = text(render())
    assert "NOT PRIVATE" in shown
    assert "ε ≤" not in shown
    assert "7.99" not in shown


def test_the_run_folder_and_the_next_commands_can_be_copied() -> None:
    shown = text(render_summary(summary))
    assert "fedtune evaluate 'runs/banks/my run' DATA" in shown
    assert "fedtune predict 'runs/banks/my run' DATA" in shown
    assert "12.0 MB up, 34.0 kB down; 1m23s; plan 0123456789ab" in shown


def test_many_sites_are_cut_with_a_word_on_where_the_rest_is() -> None:
    shown = text(render_summary(changed(sites=[site(index) for index in range(1000)])))
    assert "site-19" in shown
    assert "site-20 " not in shown
    assert "and 980 more sites in summary.json" in shown


def test_plain_text_fits_100_columns_without_escape_codes() -> None:
    long = changed(run_dir="runs/" + "a" * 300, sites=[site(0, name="n" * 150)])
    comparison = render_comparison([([f"privacy.epsilon={epsilon}", "study.name=x"], long) for epsilon in (3, 8)])
    for shown in (text(render_summary(long)), text(comparison)):
        assert "\x1b" not in shown
        assert max(len(line.rstrip()) for line in shown.splitlines()) <= 100


def test_foreign_names_are_neither_markup_nor_commands() -> None:
    shown = text(render_summary(changed(study="[bold]x[/bold]", sites=[site(0, name="\x1b[2J[red]")])))
    assert "[bold]x[/bold]: " in shown
    assert "\\x1b[2J[red]" in shown


def test_a_study_without_metrics_still_has_a_report() -> None:
    shown = text(render_summary(changed(metrics={"initial": {}, "final": {}}, sites=[site(0, metrics={})])))
    assert shown.startswith("banks: 10 rounds, 1 sites\n")


@pytest.mark.parametrize(
    ("names", "headline"),
    [(("loss", "accuracy"), "accuracy"), (("loss", "perplexity"), "perplexity"), (("f1",), "f1"), ((), None)],
)
def test_the_headline_is_accuracy_then_perplexity_then_loss(names: tuple[str, ...], headline: str | None) -> None:
    assert headline_metric(changed(metrics={"final": dict.fromkeys(names, 0.5)})) == headline


def test_a_comparison_has_a_row_for_each_run_and_a_column_for_each_key_that_differs() -> None:
    runs = [
        (["experiment=banking77", f"privacy.epsilon={epsilon}", f"aggregation={algorithm}"], summary)
        for epsilon in (3, 8)
        for algorithm in ("ffa", "fedsvd")
    ]
    shown = text(render_comparison(runs))
    lines = [line.split() for line in shown.splitlines()]
    assert (
        sum(line[:2] == [epsilon, algorithm] for line in lines for epsilon in "38" for algorithm in ("ffa", "fedsvd"))
        == 4
    )
    assert any(line[:2] == ["epsilon", "aggregation"] for line in lines)
    assert "experiment" not in shown
    assert "4 runs compared" in shown
