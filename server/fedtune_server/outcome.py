"""How a study ends: the released adapter and the summary, written once and last."""

from __future__ import annotations

import json
from typing import Any

from fedtune.aggregation.lora.plain import plain_adapter
from fedtune.config.machine import Machine
from fedtune.config.plan import StudyPlan
from fedtune.evaluation.metrics import Tally
from fedtune.evaluation.site_metrics import measured_on
from fedtune.model.layout import AdapterState
from fedtune.model.workspace import Workspace
from fedtune.release.adapter import save_adapter
from fedtune.release.statement import privacy_facts
from fedtune.run.files import write_whole
from fedtune.run.versions import versions
from fedtune.simulation.sites import test_examples
from fedtune.simulation.workspace import open_workspace
from fedtune.training.evaluate import evaluate
from fedtune_server.facts import SiteFacts
from fedtune_server.merging import Merging
from fedtune_server.scorecard import CentralTest
from fedtune_server.study import Study


def central_test(plan: StudyPlan, machine: Machine, workspace: Workspace, merging: Merging) -> CentralTest | None:
    """Return a function that measures an adapter on the coordinator's test file, or None without one.

    A rule that keeps a part at each site leaves the coordinator no whole adapter: the sites alone can measure theirs.
    """
    if machine.test_path is None or not merging.algorithm.traits.releases:
        return None
    examples = test_examples(plan, machine, workspace.tokenizer)

    def measure(adapter: AdapterState) -> Tally:
        return evaluate(workspace, adapter, examples, plan.evaluation.batch_size)

    return measure


def release(study: Study, machine: Machine) -> None:
    """Write the adapter, where there is one, and then the summary, whose presence says that the study has ended."""
    summary = summarise(study)
    algorithm, layout = study.merging.algorithm, study.merging.layout
    if algorithm.traits.releases:
        adapter = plain_adapter(algorithm, layout, study.released)
        save_adapter(study.folder.adapter, open_workspace(study.plan, machine), adapter, study.plan, summary)
    text = json.dumps(summary, indent=2, ensure_ascii=False, sort_keys=True, allow_nan=False)
    write_whole(study.folder.summary_file, (text + "\n").encode())


def summarise(study: Study) -> dict[str, Any]:
    """Return the result of a study as plain JSON values."""
    plan, facts = study.plan, study.facts
    return {
        "study": plan.name,
        "plan_sha256": plan.sha256,
        "rounds": study.round,
        "task": plan.task.style,
        "algorithm": plan.aggregation.algorithm,
        "released": study.merging.algorithm.traits.releases,
        "sites": [_site(site, plan) for site in facts.sites.values()],
        "refused": facts.refused,
        "metrics": {
            "headline": study.evaluator.headline,
            "measured_on": "test file" if study.evaluator.central is not None else measured_on(plan),
            "initial": facts.initial,
            "final": facts.final,
            "records": facts.records or None,
        },
        "privacy": privacy_facts(plan.promise, facts.max_epsilon(plan.promise)),
        "traffic": {"bytes_up": study.exchange.traffic.up, "bytes_down": study.exchange.traffic.down},
        "seconds": round(facts.seconds, 3),
        "versions": versions(),
        "run_dir": str(study.folder.path),
    }


def _site(site: SiteFacts, plan: StudyPlan) -> dict[str, Any]:
    return {
        "name": site.name,
        "units": site.units,
        "events": [event.to_dict() for event in site.events],
        "epsilon": site.epsilon(plan.promise),
        "delta": plan.promise.delta if plan.promise.mode == "dp" else None,
        "rounds": site.rounds,
        "failed": sum(site.failures.values()),
        "failures": site.failures,
        "quarantine": site.quarantine or None,
        "metrics": {"initial": site.initial, "final": site.final},
    }
