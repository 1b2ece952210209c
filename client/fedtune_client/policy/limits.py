"""How much a plan may spend on a data set: of plan and policy, the stricter; and the policy of simulated sites.

Knows neither a ledger nor what has been spent.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedtune.config.plan import StudyPlan
from fedtune.errors import PolicyError
from fedtune.privacy.plan import PrivacyPlan
from fedtune_client.policy.schema import Policy

_NO_PROMISE = 1e-6  # the δ of a policy for a plan that has none


@dataclass(frozen=True, slots=True)
class Limits:
    """ε at most for one study on a data set, and for all studies together, each at its δ."""

    study_epsilon: float
    study_delta: float
    lifetime_epsilon: float
    lifetime_delta: float


def caps(plan: StudyPlan, policy: Policy, data_name: str) -> Limits:
    """Return the stricter of plan and policy, number by number; `policy.unknown-data` for a data set it does not name.

    Of a study without privacy the plan limits nothing: its ε is ∞ and it has no δ.
    """
    if data_name not in policy.data:
        hint = "add it to the policy and adopt that: fedtune client policy adopt"
        raise PolicyError("unknown-data", f"the policy names no data set {data_name}", hint=hint)
    promise, privacy = plan.promise, policy.privacy
    delta = privacy.delta if promise.mode == "off" else min(promise.delta, privacy.delta)
    lifetime = policy.data[data_name].lifetime_epsilon
    return Limits(min(promise.epsilon, privacy.study_epsilon), delta, lifetime, privacy.delta)


def simulation_policy(plan: StudyPlan) -> Policy:
    """Return the policy under which simulated sites act when the researcher gives none: it allows what the plan asks.

    Each number is the plan's own, so nothing beyond this plan is allowed, and its name says so.
    """
    promise, private = plan.promise, plan.promise.mode == "dp"
    steps = max(plan.total_steps, promise.max_steps)
    tree = {
        "name": "simulation: allows whatever its one plan asks for",
        "models": [{"name": plan.model.name[:200], "sha256": plan.model.sha256}],
        "data": {
            plan.data.name: {
                "purposes": [plan.purpose],
                "units": [promise.unit],
                "columns": "any",
                "lifetime_epsilon": promise.epsilon if private else 0.0,
                "consent": "none",
                "min_units": 0,
            }
        },
        "tasks": [plan.task.kind],
        "privacy": {
            "study_epsilon": promise.epsilon if private else 0.0,
            "delta": promise.delta if private else _NO_PROMISE,
            "min_noise_multiplier": _least_noise(promise),
            "require_secure_noise": promise.noise == "secure",
            "allow_off": not private,
        },
        "training": {
            "max_rounds": plan.federation.rounds,
            "max_local_steps": plan.training.local_steps,
            "max_total_steps": steps,
            "max_tokens": plan.data.max_tokens,
        },
        "adapter": {"max_rank": plan.lora.rank, "targets": "any", "max_upload_bytes": plan.adapter.upload_bytes},
        "federation": {"require_secure_aggregation": False, "min_sites": 0, "min_sites_per_round": 0},
        "evaluation": {"site_metrics": plan.evaluation.site_metrics},
        "require_approval": False,
    }
    return Policy.model_validate(tree)


def _least_noise(promise: PrivacyPlan) -> float:
    """Return the smaller noise multiplier of training and noisy evaluations."""
    evaluated = promise.evaluation_noise_multiplier if promise.evaluations else promise.noise_multiplier
    return min(promise.noise_multiplier, evaluated)
