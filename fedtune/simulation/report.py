"""What a finished study looks like on a screen, from the content of its `summary.json` and nothing else.

The renderables adapt to a terminal and read well as plain text; `show` chooses the width. Computes no number.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from fedtune.display import bytes_text, change_text, epsilon_text, metric_text, printable, seconds_text

Summary = Mapping[str, Any]

headline_metrics = ("accuracy", "perplexity", "loss")  # the first that a study has is its headline
plain_width = 100  # columns when the output is not a terminal
most_sites = 20  # a longer table goes to summary.json


def show(renderable: RenderableType, stream: TextIO) -> None:
    """Print on a terminal at its width, elsewhere as plain text of 100 columns."""
    console = Console(file=stream, highlight=False)
    if not console.is_terminal:
        console = Console(file=stream, highlight=False, width=plain_width, color_system=None)
    console.print(renderable)


def headline_metric(summary: Summary) -> str | None:
    """Choose the metric that stands for a study: accuracy, perplexity, loss, else the first; None without any."""
    final = summary["metrics"].get("final") or {}
    return next((name for name in headline_metrics if name in final), next(iter(final), None))


def render_summary(summary: Summary) -> RenderableType:
    """Render one study: metrics before and after, sites, the privacy statement, cost, and what to do next.

    `summary` is what `summary.json` holds; a missing value of a site or of a metric is shown as `-`. With
    `privacy.mode` other than `dp`, NOT PRIVATE stands in words and ε nowhere.
    """
    parts: list[RenderableType] = [_title(summary), _metrics_table(summary), _sites_table(summary)]
    hidden = len(summary["sites"]) - most_sites
    if hidden > 0:
        parts.append(Text(f"  and {hidden} more sites in summary.json"))
    return Group(*parts, _privacy(summary), _cost(summary), Text(), _next_steps(summary))


def render_comparison(runs: Sequence[tuple[Sequence[str], Summary]]) -> RenderableType:
    """Render a sweep: one row a run, one column for each override that differs between the runs."""
    varying = _varying_keys([overrides for overrides, _ in runs])
    metric = next((name for _, summary in runs if (name := headline_metric(summary))), None)
    table = _table(f"{len(runs)} runs compared")
    for key in varying:
        table.add_column(Text(printable(key).replace(".", ".\n")), min_width=max(map(len, key.split("."))) + 1)
    for name in ("ε", f"{metric or 'metric'} before", "after", "up", "time"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("run folder", overflow="fold")
    for overrides, summary in runs:
        values = _by_key(overrides)
        table.add_row(*[Text(printable(values.get(key, "-"))) for key in varying], *_comparison_cells(summary, metric))
    return table


def _title(summary: Summary) -> Text:
    name, rounds, sites = printable(summary["study"]), summary["rounds"], len(summary["sites"])
    title = Text.assemble((name, "bold"), f": {rounds} rounds, {sites} sites")
    metric = headline_metric(summary)
    if metric is not None:
        before, after = (_metric_at(summary["metrics"], when, metric) for when in ("initial", "final"))
        title.append(f", {metric} {metric_text(before)} → ")
        title.append(metric_text(after), style="bold green")
    return title


def _metrics_table(summary: Summary) -> Table:
    where = str(summary.get("metrics", {}).get("measured_on", "held-out records of all sites"))
    table = _table(printable(where[:1].upper() + where[1:]))
    table.add_column("metric")
    for heading in ("before", "after", "change"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name in summary["metrics"].get("final") or {}:
        if not name.endswith("_noise"):
            before, after = (_metric_at(summary["metrics"], when, name) for when in ("initial", "final"))
            cells = (_metric_cell(summary["metrics"], when, name) for when in ("initial", "final"))
            table.add_row(Text(printable(name)), *cells, change_text(before, after))
    return table


def _sites_table(summary: Summary) -> Table:
    metric = headline_metric(summary)
    table = _table("Sites")
    table.add_column("site", overflow="fold")
    for heading in ("units", "rounds", "failed", "ε", "δ", f"{metric or 'metric'} before", "after", "change"):
        table.add_column(heading, justify="right", no_wrap=True)
    for site in summary["sites"][:most_sites]:
        table.add_row(*_site_cells(site, metric, private=_is_private(summary)))
    return table


def _site_cells(site: Mapping[str, Any], metric: str | None, *, private: bool) -> list[Text]:
    before, after = (_metric_at(site.get("metrics") or {}, when, metric) for when in ("initial", "final"))
    promise = [epsilon_text(site.get("epsilon")), _delta_text(site.get("delta"))] if private else ["none", "none"]
    failed = site.get("failed", 0)
    cells = [printable(site["name"]), _count(site.get("units")), _count(site.get("rounds")), _count(failed), *promise]
    cells += [_metric_cell(site.get("metrics") or {}, when, metric) for when in ("initial", "final")]
    cells.append(change_text(before, after))
    texts = [Text(cell) for cell in cells]
    texts[3].stylize("yellow" if failed else "")
    return texts


def _privacy(summary: Summary) -> Text:
    privacy = summary["privacy"]
    if not _is_private(summary):
        return Text(
            "NOT PRIVATE: privacy.mode=off, nothing protects a record; the adapter can reveal what it was trained on.",
            style="bold red",
        )
    text = Text(
        f"Privacy: ε ≤ {epsilon_text(privacy['max_epsilon'])} at δ = {_delta_text(privacy['delta'])} for "
        f"{printable(privacy['one_unit'])} ({privacy['relation']}), {privacy['sampler']} sampling, "
        f"{privacy['accountant']} accountant."
    )
    if privacy.get("statement"):
        text.append(f"\n{printable(privacy['statement'])}")
    if privacy["noise"] != "secure":
        warning = "Seeded noise: reproducible, so not for release; run again with privacy.noise=secure to release."
        text.append(f"\n{warning}", style="yellow")
    return text


def _cost(summary: Summary) -> Text:
    traffic = summary["traffic"]
    up, down = bytes_text(traffic["bytes_up"]), bytes_text(traffic["bytes_down"])
    return Text(f"Traffic {up} up, {down} down; {seconds_text(summary['seconds'])}; plan {summary['plan_sha256'][:12]}")


def _next_steps(summary: Summary) -> Text:
    folder = shlex.quote(printable(summary["run_dir"]))
    if not summary.get("released", True):
        text = f"Run folder {printable(summary['run_dir'])} (each site keeps an adapter of its own, none is released)"
        return Text(text, overflow="fold")
    lines = [
        f"Run folder {printable(summary['run_dir'])} (adapter/ loads with peft)",
        f"  fedtune evaluate {folder} DATA",
        f"  fedtune predict {folder} DATA",
        f"  fedtune release {folder} --to peft --out RELEASE",
    ]
    return Text("\n".join(lines), overflow="fold")


def _comparison_cells(summary: Summary, metric: str | None) -> list[Text]:
    private = _is_private(summary)
    before, after = (_metric_at(summary["metrics"], when, metric) for when in ("initial", "final"))
    return [
        Text(epsilon_text(summary["privacy"]["max_epsilon"])) if private else Text("NOT PRIVATE", style="bold red"),
        Text(metric_text(before)),
        Text(metric_text(after), style="bold"),
        Text(bytes_text(summary["traffic"]["bytes_up"])),
        Text(seconds_text(summary["seconds"])),
        Text(printable(summary["run_dir"])),
    ]


def _varying_keys(runs: Sequence[Sequence[str]]) -> list[str]:
    keys = dict.fromkeys(key for overrides in runs for key in _by_key(overrides))
    return [key for key in keys if len({_by_key(overrides).get(key) for overrides in runs}) > 1]


def _by_key(overrides: Sequence[str]) -> dict[str, str]:
    return {key: value for key, _, value in (override.partition("=") for override in overrides)}


def _is_private(summary: Summary) -> bool:
    return bool(summary["privacy"]["mode"] == "dp")


def _metric_at(metrics: Mapping[str, Any], when: str, name: str | None) -> float | None:
    value = (metrics.get(when) or {}).get(name)
    return None if value is None else float(value)


def _metric_cell(metrics: Mapping[str, Any], when: str, name: str | None) -> str:
    noise = _metric_at(metrics, when, f"{name}_noise")
    return metric_text(_metric_at(metrics, when, name)) + ("" if noise is None else f" ± {noise:#.2g}")


def _delta_text(delta: float | None) -> str:
    return "-" if delta is None else f"{delta:.3g}"


def _count(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
