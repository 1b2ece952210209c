"""How a study chooses its clipping, and that the plan, the site and every text agree on it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from fedtune.errors import PrivacyError
from fedtune.privacy.plan import PrivacyPlan
from tests.support.bench import make_bench

if TYPE_CHECKING:
    from pathlib import Path

TERMS = {"noise_multiplier": 1.0, "delta": 1e-5, "clip_norm": 0.5, "sampling_rate": 0.2, "max_steps": 40}


def test_the_setting_reaches_the_plan_and_its_statement(tmp_path: Path) -> None:
    promise = make_bench(tmp_path, privacy__clipping="auto-s").plan.promise
    assert promise.clipping == "auto-s"
    assert "clipped to norm 0.5 (auto-s)" in promise.statement


def test_clipping_is_fixed_unless_said_otherwise(tmp_path: Path) -> None:
    assert make_bench(tmp_path).plan.promise.clipping == "fixed"


def test_the_spent_privacy_does_not_depend_on_it() -> None:
    plan = PrivacyPlan.from_noise(**TERMS)
    other = PrivacyPlan.from_dict(plan.to_dict() | {"clipping": "auto-v"})
    assert (other.event(40), other.forecast()) == (plan.event(40), plan.forecast())


def test_a_site_refuses_a_plan_with_a_clipping_it_does_not_know() -> None:
    values = PrivacyPlan.from_noise(**TERMS).to_dict() | {"clipping": "adaptive"}
    with pytest.raises(PrivacyError, match="clips by 'adaptive'"):
        PrivacyPlan.from_dict(values)
