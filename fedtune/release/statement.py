"""What a summary says of privacy: the plan's terms, what was spent, and the sentence that is true of both."""

from __future__ import annotations

from typing import Any

from fedtune.privacy.plan import PrivacyPlan

_ROUNDING = 1e-9


def privacy_facts(promise: PrivacyPlan, spent: float | None) -> dict[str, Any]:
    """Return the terms as plain JSON values; `spent` is the largest ε of any site, None without privacy."""
    private = promise.mode == "dp"
    return {
        "mode": promise.mode,
        "max_epsilon": spent,
        "delta": promise.delta if private else None,
        "accountant": promise.accountant if private else None,
        "unit": promise.unit,
        "max_records_per_unit": promise.max_records_per_unit,
        "one_unit": promise.one_unit,
        "relation": promise.relation,
        "sampler": promise.sampler,
        "noise": promise.noise if private else None,
        "noise_multiplier": promise.noise_multiplier,
        "clip_norm": promise.clip_norm,
        "clipping": promise.clipping,
        "statement": statement_of(promise, spent),
    }


def statement_of(promise: PrivacyPlan, spent: float | None) -> str:
    """Return the plan's statement, and what is true instead where a site has spent more than the plan promised."""
    if spent is None or spent <= promise.epsilon * (1 + _ROUNDING):
        return promise.statement
    return (
        f"EXCEEDED: ε = {spent:.4g} was spent: a site charged more than the plan's rounds, as fedtune's own refuse to. "
        f"Planned was: {promise.statement}"
    )
