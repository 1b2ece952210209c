"""A plan and a policy around it, made of plain values: no model, no record, no file."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from fedtune.config.canonical import canonical_json
from fedtune.config.plan import StudyPlan
from fedtune.config.schema import (
    AggregationSettings,
    EvaluationSettings,
    FederationSettings,
    LoraSettings,
    PartitionSettings,
    TrainingSettings,
)
from fedtune.privacy.plan import PrivacyPlan
from fedtune_client.policy.schema import Policy

Tree = dict[str, Any]
MakePlan = Callable[..., StudyPlan]
MakePolicy = Callable[..., Policy]


def plan_tree() -> Tree:
    """A private classification study of six sites that every rule of `policy_tree` lets pass, just so."""
    promise = PrivacyPlan("dp", 3.0, 1e-6, 1.0, 1.0, 0.1, 100, noise="secure").about("patient_id", 8)
    return {
        "schema_version": 1,
        "name": "study",
        "purpose": "research",
        "seed": 7,
        "data": {
            "name": "claims",
            "source": "file",
            "task": {
                "style": "classification",
                "columns": {"text": "note", "label": "category"},
                "labels": ["card/lost", "loan"],
            },
            "max_tokens": 128,
            "holdout": 0.2,
            "limit": None,
            "partition": PartitionSettings().model_dump(mode="json"),
        },
        "model": {
            "name": "org/tiny",
            "sha256": "ab" * 32,
            "architecture": "bert",
            "head": "pooled",
            "head_init": "zero",
            "head_center": "none",
            "head_scale": 1.0,
            "dtype": "float32",
            "attention": "auto",
            "quantization": "none",
        },
        "lora": LoraSettings(rank=8, targets=("q_proj", "v_proj")).model_dump(mode="json"),
        "adapter": {
            "numbers": 200,
            "trained": 100,
            "upload": 100,
            "upload_bytes": 400,
            "download": 200,
            "layout_sha256": "cd" * 32,
        },
        "privacy": promise.to_dict(),
        "training": TrainingSettings(local_steps=5).model_dump(mode="json"),
        "aggregation": AggregationSettings().model_dump(mode="json"),
        "federation": FederationSettings(sites=6, rounds=20, quorum=1.0, sites_per_round=4).model_dump(mode="json"),
        "evaluation": EvaluationSettings(site_metrics="off").model_dump(mode="json"),
    }


def policy_tree() -> Tree:
    """A policy whose every limit is exactly what `plan_tree` asks for."""
    return {
        "models": [{"name": "tiny", "sha256": "ab" * 32}],
        "data": {
            "claims": {
                "purposes": ["research"],
                "units": ["patient_id"],
                "columns": ["note", "category", "patient_id"],
                "lifetime_epsilon": 3.0,
                "consent": {"opt_in": {"column": "consent", "values": ["yes"]}},
                "min_units": 100,
            }
        },
        "tasks": ["classification"],
        "privacy": {
            "study_epsilon": 3.0,
            "delta": 1e-6,
            "min_noise_multiplier": 1.0,
            "require_secure_noise": True,
            "clip_norm": {"min": 1.0, "max": 1.0},
            "allow_off": False,
        },
        "training": {"max_rounds": 20, "max_local_steps": 5, "max_total_steps": 100, "max_tokens": 128},
        "adapter": {"max_rank": 8, "targets": ["q_proj", "v_proj"], "max_upload_bytes": 400},
        "federation": {"require_secure_aggregation": False, "min_sites": 6, "min_sites_per_round": 4},
        "evaluation": {"site_metrics": "off"},
        "require_approval": True,
    }


def placed(tree: Tree, changes: Tree) -> Tree:
    """Return the tree with other values at dotted keys; `del` removes a key."""
    changed: Tree = json.loads(json.dumps(tree))
    for key, value in changes.items():
        *groups, last = key.split(".")
        place = changed
        for group in groups:
            place = place.setdefault(group, {})
        if value == "del":
            del place[last]
        else:
            place[last] = value
    return changed


def plan_text(**changes: Any) -> str:
    """Return the canonical text that a coordinator would send; `privacy__unit=...` sets `privacy.unit`."""
    return canonical_json(placed(plan_tree(), {key.replace("__", "."): value for key, value in changes.items()}))


@pytest.fixture
def make_plan() -> MakePlan:
    return lambda **changes: StudyPlan.from_json(plan_text(**changes))


@pytest.fixture
def make_policy() -> MakePolicy:
    def make(**changes: Any) -> Policy:
        dotted = {key.replace("__", "."): value for key, value in changes.items()}
        return Policy.model_validate(placed(policy_tree(), dotted))

    return make
