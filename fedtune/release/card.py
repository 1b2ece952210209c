"""The card of a released adapter: what it is for, what it rests on, what was promised and what was not."""

from __future__ import annotations

from typing import Any

from fedtune.config.plan import StudyPlan

_USE_POOLED = """```python
from peft import PeftModel
from transformers import AutoModel

base = AutoModel.from_pretrained("{base}")  # SHA-256 of the content: {sha256}
encoder = PeftModel.from_pretrained(base, "adapter")  # the LoRA part; the head is head.safetensors
```"""
_USE_OTHER = """```python
from peft import PeftModel
from transformers import {loader}

base = {loader}.from_pretrained("{base}"{arguments})  # SHA-256 of the content: {sha256}
model = PeftModel.from_pretrained(base, "adapter")
```"""


def render_card(plan: StudyPlan, summary: dict[str, Any]) -> str:
    """Return the card in Markdown."""
    parts = [
        f"# {plan.name}: a LoRA adapter for {plan.model.name}",
        _first_words(plan, summary),
        _facts(plan, summary),
        _metrics(summary),
        "## Use\n\n`fedtune predict` and `fedtune evaluate` use the whole; other tools load the LoRA part:\n\n"
        + _use(plan),
    ]
    return "\n\n".join(parts) + "\n"


def _first_words(plan: StudyPlan, summary: dict[str, Any]) -> str:
    note = ""
    if plan.promise.mode == "dp" and plan.promise.noise == "seeded":
        note = "\n\n**Not for release:** the noise came from a seeded generator, as in a study."
    return (
        f"Trained by {len(summary['sites'])} sites in {plan.federation.rounds} rounds with fedtune; "
        f"no record left its site.\n\n**Privacy:** {summary['privacy']['statement']}{note}"
    )


def _facts(plan: StudyPlan, summary: dict[str, Any]) -> str:
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
        ("clip norm", f"{plan.promise.clip_norm:g} ({plan.promise.clipping})"),
        ("largest ε spent by a site", spent),
        ("rounds", str(plan.federation.rounds)),
        ("sites", str(len(summary["sites"]))),
        ("aggregation", f"{plan.aggregation.algorithm}, {plan.aggregation.server_optimizer}"),
        ("plan SHA-256", plan.sha256),
    ]
    return "## Facts\n\n| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in rows)


def _metrics(summary: dict[str, Any]) -> str:
    initial, final = summary["metrics"]["initial"], summary["metrics"]["final"]
    if not final:
        return "## Metrics\n\nNone was measured."
    rows = "\n".join(
        f"| {name} | {initial.get(name, float('nan')):.4f} | {value:.4f} |" for name, value in final.items()
    )
    note = _how(summary["metrics"])
    return f"## Metrics\n\n| held out | before | after |\n|---|---|---|\n{rows}\n\n{note}"


def _how(metrics: dict[str, Any]) -> str:
    where = metrics.get("measured_on", "held-out records")
    if any(name.endswith("_noise") for name in metrics["final"]):
        return f"Measured on {where}; NAME_noise is the standard deviation of the noise in NAME."
    return f"Measured on {where}; these numbers are not covered by ε."


def _use(plan: StudyPlan) -> str:
    if plan.model.head == "pooled":
        return _USE_POOLED.format(base=plan.model.name, sha256=plan.model.sha256)
    causal = plan.model.head == "none"
    loader = "AutoModelForCausalLM" if causal else "AutoModelForSequenceClassification"
    arguments = "" if causal else f", num_labels={len(plan.task.labels)}"
    return _USE_OTHER.format(base=plan.model.name, sha256=plan.model.sha256, loader=loader, arguments=arguments)
