"""The card of a release: what it is for, what it rests on, what was promised and what was not.

Every number comes from the plan, the summary and the sites' heads; nothing is said that none of them says. Metadata and
text are a `huggingface_hub.ModelCard`, which needs no network.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fedtune.config.plan import StudyPlan
from fedtune.display import epsilon_text
from fedtune.journal.witness import Receipt
from fedtune.release.intervals import wilson
from fedtune.release.usage import use_of

Kind = str  # peft | merged | gguf | ollama
_TITLES = {
    "peft": "a LoRA adapter for",
    "merged": "a LoRA adapter merged into",
    "gguf": "a LoRA adapter in GGUF for",
    "ollama": "an Ollama model of a LoRA adapter for",
}
_PIPELINES = {"none": "text-generation", "architecture": "text-classification", "pooled": "text-classification"}
_PER_SITE = "| site | units | ε | δ | journal | record | head |"
_NO_HEAD = "none witnessed"


def render_card(
    plan: StudyPlan,
    summary: Mapping[str, Any],
    *,
    kind: Kind = "peft",
    use: str = "",
    heads: Mapping[str, Receipt] | None = None,
    pad_id: int | None = None,
) -> str:
    """Return the card in Markdown with its metadata; `use` replaces how a release of this kind is used.

    `heads` are the newest countersigned heads of the sites' journals; without them the card names none. `pad_id` is
    the token that fills batches.
    """
    from huggingface_hub import ModelCard

    parts = [
        f"# {plan.name}: {_TITLES[kind]} {plan.model.name}",
        _first_words(plan, summary),
        _facts(plan, summary),
        _privacy(plan, summary, heads),
        _data(plan, summary),
        _metrics(summary),
        "## Use\n\n" + (use or use_of(plan, kind, pad_id)),
        _verify(heads),
    ]
    return str(ModelCard(f"---\n{_metadata(plan, kind)}\n---\n\n" + "\n\n".join(filter(None, parts)) + "\n"))


def _metadata(plan: StudyPlan, kind: Kind) -> str:
    from huggingface_hub import ModelCardData

    named = plan.model.name if "/" in plan.model.name else None  # a Hub id; anything else the Hub would refuse
    library = {"peft": "peft", "merged": "transformers"}.get(kind)
    tags = ["lora", "federated-learning", "fedtune"]
    tags += ["differential-privacy"] if plan.promise.mode == "dp" else []
    tags += [kind] if library is None else []
    pipeline = _PIPELINES[plan.model.head]
    data = ModelCardData(base_model=named, library_name=library, pipeline_tag=pipeline, tags=tags)
    return str(data.to_yaml()).strip()


def _first_words(plan: StudyPlan, summary: Mapping[str, Any]) -> str:
    note = ""
    if plan.promise.mode == "dp" and plan.promise.noise == "seeded":
        note = "\n\n**Not for release:** the noise came from a seeded generator, as in a study."
    if "personal" in summary:
        return (
            f"The adapter of {cell(summary['personal'])} alone: a part of it was trained there and never left, the "
            f"rest by all sites of the study.\n\n**Privacy:** {summary['privacy']['statement']}{note}"
        )
    return (
        f"Trained by {len(summary['sites'])} sites in {plan.federation.rounds} rounds with fedtune; "
        f"no record left its site.\n\n**Privacy:** {summary['privacy']['statement']}{note}"
    )


def _facts(plan: StudyPlan, summary: Mapping[str, Any]) -> str:
    privacy = summary["privacy"]
    spent = "NOT PRIVATE" if privacy["mode"] == "off" else f"{privacy['max_epsilon']:.4g} at δ = {privacy['delta']:.3g}"
    rows = [
        ("task", plan.task.style),
        ("labels", str(len(plan.task.labels)) if plan.task.labels else "none"),
        ("base model", f"{plan.model.name} ({plan.model.architecture})"),
        ("base SHA-256", plan.model.sha256),
        ("privacy unit", plan.promise.unit),
        ("neighbouring relation", f"{plan.promise.relation}: {plan.promise.one_unit} added or removed"),
        ("sampler", f"{plan.promise.sampler}, rate {plan.promise.sampling_rate:g}"),
        ("accountant", plan.promise.accountant),
        ("noise multiplier", f"{plan.promise.noise_multiplier:.4g}"),
        ("noise source", plan.promise.noise if plan.promise.mode == "dp" else "none"),
        ("clip norm", f"{plan.promise.clip_norm:g} ({plan.promise.clipping})"),
        ("largest ε spent by a site", spent),
        ("rounds", str(plan.federation.rounds)),
        ("sites", str(len(summary["sites"]))),
        ("aggregation", f"{plan.aggregation.algorithm}, {plan.aggregation.server_optimizer}"),
        ("plan SHA-256", plan.sha256),
    ]
    return "## Facts\n\n| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in rows)


def _privacy(plan: StudyPlan, summary: Mapping[str, Any], heads: Mapping[str, Receipt] | None) -> str:
    rows = "\n".join(f"| {' | '.join(_site(plan, site, heads or {}))} |" for site in summary["sites"])
    return (
        f"## Privacy of each site\n\n{_PER_SITE}\n|---|---|---|---|---|---|---|\n{rows}\n\n"
        "ε is what the site's journal was charged for this study; each site adds its own full noise. A journal is "
        "named by the hash of its first record; the head is the hash of the record up to which the coordinator has "
        f"countersigned it.\n\n{_not_protected(plan)}"
    )


def _site(plan: StudyPlan, site: Mapping[str, Any], heads: Mapping[str, Receipt]) -> tuple[str, ...]:
    delta = "-" if plan.promise.mode == "off" else f"{plan.promise.delta:.3g}"
    units = f"about {site['units']:,}" if site.get("units") is not None else "-"
    cells = cell(site["name"]), units, spent_text(plan, site.get("epsilon")), delta
    if site["name"] not in heads:
        return (*cells, "-", "-", _NO_HEAD)
    head = heads[site["name"]].head
    return (*cells, head.site, str(head.sequence), head.digest)


def spent_text(plan: StudyPlan, epsilon: float | str | None) -> str:
    """Return a site's ε as the card shows it: three decimals, rounded up."""
    if plan.promise.mode == "off":
        return "NOT PRIVATE"
    return "-" if epsilon is None else epsilon_text(float(epsilon))


def cell(text: str) -> str:
    """Return foreign text for one cell of a Markdown table."""
    return "".join(char if char.isprintable() else " " for char in text).replace("|", r"\|")


def _not_protected(plan: StudyPlan) -> str:
    listed = "who takes part, labels, column names and the rounded counts above"
    if plan.promise.mode == "off":
        return f"Nothing is protected, {listed} included."
    held_out = {
        "clear": "At each evaluation counts of held-out records left a site, and no ε covers them.",
        "coarse": "At each evaluation rounded means over held-out units left a site, and no ε covers them.",
        "noisy": "At each evaluation noisy means over held-out units left a site, which ε covers.",
        "off": "Nothing of the held-out records left a site.",
    }[plan.evaluation.site_metrics]
    return (
        f"Not protected: facts that several {plan.promise.noun}s repeat; {listed}; timing and traffic. {held_out} ε is "
        "of this study alone: what the same people's records gave to others adds up."
    )


def _data(plan: StudyPlan, summary: Mapping[str, Any]) -> str:
    told = [f"- {cell(site['name'])}: {_one_line(site['description'])}" for site in summary["sites"] if _told(site)]
    words = "In the sites' own words:\n\n" + "\n".join(told) if told else "The sites have said nothing more about it."
    columns = ", ".join(f"`{column}`" for column in plan.task.used)
    return (
        f"## Data\n\nEach site has let its data set named `{plan.data.name}` serve the purpose `{plan.purpose}`; the "
        f"columns {columns} are read. {words}"
    )


def _told(site: Mapping[str, Any]) -> bool:
    return bool(str(site.get("description") or "").strip())


def _one_line(text: str) -> str:
    return " ".join("".join(char if char.isprintable() else " " for char in text).split())


def _metrics(summary: Mapping[str, Any]) -> str:
    metrics = summary["metrics"]
    initial, final = metrics["initial"], metrics["final"]
    if not final:
        return "## Metrics\n\nNone was measured."
    rows = "\n".join(
        f"| {name} | {initial.get(name, math.nan):.4f} | {value:.4f} | {_interval(name, value, metrics)} |"
        for name, value in final.items()
    )
    return f"## Metrics\n\n| held out | before | after | 95 % interval |\n|---|---|---|---|\n{rows}\n\n{_how(metrics)}"


def _interval(name: str, value: float, metrics: Mapping[str, Any]) -> str:
    """Return the interval of an accuracy over counted records; of anything else none is known."""
    records = metrics.get("records")
    if name != "accuracy" or not records or not 0 <= value <= 1 or _is_noisy(metrics):
        return "-"
    low, high = wilson(value, int(records))
    return f"{low:.4f} to {high:.4f}"


def _is_noisy(metrics: Mapping[str, Any]) -> bool:
    return any(name.endswith("_noise") for name in metrics["final"])


def _how(metrics: Mapping[str, Any]) -> str:
    where = metrics.get("measured_on", "held-out records")
    if _is_noisy(metrics):
        return f"Measured on {where}; NAME_noise is the standard deviation of the noise in NAME."
    counted = f"{metrics['records']:,} " if metrics.get("records") else ""
    interval = " The interval is Wilson's, as if these records were drawn independently." if counted else ""
    return f"Measured on {counted}{where}; these numbers are not covered by ε.{interval}"


def _verify(heads: Mapping[str, Receipt] | None) -> str:
    if heads is None:
        return ""
    return (
        "## Verify\n\nWith fedtune from a source that you trust, and keys that you were told by another way than this "
        "folder:\n\n```sh\nfedtune release verify . --coordinator-key KEY --base BASE --journal SITE.journal\n```\n\n"
        "It checks that every file is the one that the coordinator signed, that each site's head is signed by the "
        "site, and, with journals that sites hand out (`fedtune client journal export`), that no site spent more than "
        "is said here. Exit code 0 means that nothing was found, 5 that something was."
    )
