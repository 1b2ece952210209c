"""The privacy plan: sampler, clip norm, noise and accounting event in one value, so that they cannot drift apart.

Knows nothing of models, optimisers or messages. A site that receives a plan calls `check` before it trains: the promise
must follow from the noise, whoever wrote the plan.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal

from fedtune.errors import PrivacyError
from fedtune.privacy.accounting import AccountantName, Event, Relation, SamplerName, as_poisson, epsilon
from fedtune.privacy.calibration import calibrate

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fedtune.privacy.clipping import ClippingName
    from fedtune.privacy.engines import EngineName
    from fedtune.privacy.random import NoiseName

_SAMPLED: dict[SamplerName, str] = {
    "poisson": "Poisson-sampled steps",
    "shuffle": "shuffled steps (no amplification claimed)",
}
NOT_PRIVATE = "NOT PRIVATE: privacy.mode=off, no noise is added and nothing bounds what one record reveals."


@dataclass(frozen=True, slots=True)
class PrivacyPlan:
    """What every site promises about each of its privacy units, and the mechanism that keeps the promise.

    `epsilon` (the target; ∞ when `mode` is off) and `delta` hold for `max_steps` steps at `sampling_rate`, each clipped
    to `clip_norm` and noised with standard deviation `noise_multiplier`·`clip_norm` on the sum.

    `unit` is `record`, or the name of the column whose equal values make a unit of several records; a step then uses at
    most `max_records_per_unit` of them. Neither ε nor σ depends on it; δ and the expected batch are counted in units.
    `clipping` says how contributions are scaled to `clip_norm`; the sensitivity is that norm with each way.

    `evaluations` counts the noisy evaluations on held-out units that ε covers besides, 0 where none is promised; each
    is a Gaussian mechanism over all of them, of sensitivity 1 and standard deviation `evaluation_noise_multiplier`.
    """

    mode: Literal["dp", "off"]
    epsilon: float
    delta: float
    noise_multiplier: float
    clip_norm: float
    sampling_rate: float
    max_steps: int
    unit: str = "record"
    max_records_per_unit: int | None = None
    relation: Relation = "add/remove one"
    sampler: SamplerName = "poisson"
    accountant: AccountantName = "pld"
    noise: NoiseName = "seeded"
    engine: EngineName = "lora"
    clipping: ClippingName = "fixed"
    evaluations: int = 0
    evaluation_noise_multiplier: float = 0.0

    def __post_init__(self) -> None:
        promised = self.mode == "dp" and self.epsilon >= 0 and 0 < self.delta < 1 and self.noise_multiplier > 0
        if not (promised or (self.mode == "off" and math.isinf(self.epsilon))):
            raise PrivacyError(
                "plan",
                f"no plan of mode {self.mode!r} has ε = {self.epsilon}, δ = {self.delta} and the noise multiplier "
                f"{self.noise_multiplier}.",
            )
        bound = self.max_records_per_unit
        grouped = self.unit not in {"", "record"} and isinstance(bound, int) and bound >= 1
        if not (grouped or (self.unit == "record" and bound is None)):
            raise PrivacyError("plan", f"no plan is about the unit {self.unit!r} with at most {bound!r} records of it.")
        if self.clipping not in {"fixed", "auto-s", "auto-v"}:
            raise PrivacyError("plan", f"no plan clips by {self.clipping!r}.", hint="fixed, auto-s or auto-v")
        self.event(self.max_steps)  # which checks its own terms
        self.evaluation_event(self.evaluations)
        covered = self.evaluations > 0, self.evaluation_noise_multiplier > 0
        if covered not in {(False, False), (self.mode == "dp",) * 2}:
            raise PrivacyError(
                "plan",
                f"no plan of mode {self.mode!r} has {self.evaluations} evaluations with the noise multiplier "
                f"{self.evaluation_noise_multiplier}.",
            )

    @classmethod
    def calibrated(  # noqa: PLR0913 - these are the terms of the promise, by keyword
        cls,
        *,
        epsilon: float,
        delta: float,
        clip_norm: float,
        sampling_rate: float,
        max_steps: int,
        sampler: SamplerName = "poisson",
        noise: NoiseName = "seeded",
        evaluations: int = 0,
        evaluation_noise_multiplier: float = 0.0,
    ) -> PrivacyPlan:
        """Return the plan with the least training noise that keeps (ε, δ) over all steps and evaluations."""
        rate, steps = as_poisson(sampler, sampling_rate, max_steps)
        also = ((float(evaluation_noise_multiplier), 1.0, evaluations),) if evaluations else ()
        return cls(
            "dp",
            epsilon,
            delta,
            calibrate(epsilon, delta, rate, steps, also),
            clip_norm,
            sampling_rate,
            max_steps,
            sampler=sampler,
            noise=noise,
            evaluations=evaluations,
            evaluation_noise_multiplier=evaluation_noise_multiplier,
        )

    @classmethod
    def from_noise(  # noqa: PLR0913 - these are the terms of the promise, by keyword
        cls,
        *,
        noise_multiplier: float,
        delta: float,
        clip_norm: float,
        sampling_rate: float,
        max_steps: int,
        sampler: SamplerName = "poisson",
        noise: NoiseName = "seeded",
        evaluations: int = 0,
        evaluation_noise_multiplier: float = 0.0,
    ) -> PrivacyPlan:
        """Return the plan for a given noise multiplier; its ε is what the accountant makes of all that is planned."""
        plan = cls(
            "dp",
            math.inf,
            delta,
            noise_multiplier,
            clip_norm,
            sampling_rate,
            max_steps,
            sampler=sampler,
            noise=noise,
            evaluations=evaluations,
            evaluation_noise_multiplier=evaluation_noise_multiplier,
        )
        return replace(plan, epsilon=plan.forecast())

    @classmethod
    def off(
        cls, *, sampling_rate: float, max_steps: int, clip_norm: float = 1.0, sampler: SamplerName = "poisson"
    ) -> PrivacyPlan:
        """Return the plan of a study without privacy: sampled alike, neither clipped nor noised, ε = ∞."""
        return cls("off", math.inf, 0.0, 0.0, clip_norm, sampling_rate, max_steps, sampler=sampler)

    def about(self, unit: str, max_records_per_unit: int) -> PrivacyPlan:
        """Return the same plan about another unit; the bound on a unit's records says nothing where it is a record."""
        return replace(self, unit=unit, max_records_per_unit=None if unit == "record" else max_records_per_unit)

    def event(self, steps: int) -> Event:
        """Return the accounting event of `steps` steps of this plan."""
        return Event(
            self.noise_multiplier,
            self.sampling_rate,
            steps,
            self.clip_norm,
            unit=self.unit,
            relation=self.relation,
            sampler=self.sampler,
            noise=self.noise,
        )

    def evaluation_event(self, evaluations: int = 1) -> Event:
        """Return the accounting event of so many noisy evaluations, each over every held-out unit."""
        return Event(
            self.evaluation_noise_multiplier,
            1.0,
            evaluations,
            1.0,
            unit=self.unit,
            relation=self.relation,
            noise=self.noise,
        )

    def spent(self, steps: int, evaluations: int = 0) -> float:
        """Return ε after so many steps and evaluations: 0 before the first; ∞ after any step without privacy."""
        if self.mode == "off":
            return math.inf if steps else 0.0
        return epsilon([self.event(steps), self.evaluation_event(evaluations)], self.delta, self.accountant)

    def forecast(self) -> float:
        """Return ε after `max_steps` steps and all evaluations, at most the target."""
        return self.spent(self.max_steps, self.evaluations)

    def expected_batch(self, units: int) -> float:
        """Return q·N for a site of `units` units, with the public N: what noisy sums are divided by."""
        return self.sampling_rate * public_count(units)

    def check(self) -> None:
        """Refuse a plan whose noise does not keep its ε, whoever wrote it."""
        if self.mode == "off":
            return
        forecast = self.forecast()
        if not forecast <= self.epsilon * (1 + 1e-9):
            raise PrivacyError(
                "overspends",
                f"the plan promises ε = {self.epsilon:g}, but its noise multiplier {self.noise_multiplier:g} at rate "
                f"{self.sampling_rate:g} over {self.max_steps} steps{self._evaluated} spends {forecast:.4g} "
                f"(δ = {self.delta:g}).",
                hint="Leave privacy.noise_multiplier out, so that the noise is calibrated to ε.",
            )

    @property
    def noun(self) -> str:
        """What a text calls one unit after it has said what a unit is."""
        return "record" if self.unit == "record" else "unit"

    @property
    def one_unit(self) -> str:
        """What neighbouring data sets differ in, in words."""
        if self.unit == "record":
            return "one record"
        return (
            f"one unit (all records with the same {self.unit}, of which at most {self.max_records_per_unit} are used "
            "in a step)"
        )

    @property
    def statement(self) -> str:
        """One sentence for every output: what is promised, about whom, by which means, and what is not."""
        if self.mode == "off":
            return NOT_PRIVATE
        source = (
            "a cryptographic generator"
            if self.noise == "secure"
            else "a seeded generator (whoever knows the seed can remove it: not for release)"
        )
        return (
            f"(ε = {self.epsilon:.4g}, δ = {self.delta:.3g})-differential privacy for {self.one_unit} added to or "
            f"removed from a site, over at most {self.max_steps} {_SAMPLED[self.sampler]} at rate "
            f"{self.sampling_rate:g}, each contribution clipped to norm {self.clip_norm:g} ({self.clipping}), by the "
            f"{self.accountant.upper()} accountant{self._evaluated}; noise from {source}; not protected: facts "
            f"repeated in several {self.noun}s, {self._unprotected}."
        )

    @property
    def _evaluated(self) -> str:
        if not self.evaluations:
            return ""
        return f", {self.evaluations} evaluations at noise multiplier {self.evaluation_noise_multiplier:.4g} included"

    @property
    def _unprotected(self) -> str:
        count = f"a site's rounded number of {self.noun}s"
        return f"and {count}" if self.evaluations else f"{count}, and held-out metrics that leave a site"

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; ∞, which JSON does not have, becomes null."""
        return {**asdict(self), "epsilon": self.epsilon if math.isfinite(self.epsilon) else None}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PrivacyPlan:
        """Return the plan; an unknown or missing key, or a value of another type, is an error."""
        if set(values) != {field.name for field in fields(cls)}:
            raise PrivacyError("plan", f"a privacy plan has the keys {sorted(values)}, which are not a plan's.")
        try:
            return cls(**{**values, "epsilon": math.inf if values["epsilon"] is None else values["epsilon"]})
        except TypeError as error:
            raise PrivacyError("plan", "a privacy plan holds a value of the wrong type.") from error


def default_delta(units: int) -> float:
    """Return δ = N^(-1.1), below 1/N for every N ≥ 2."""
    if units < 2:  # noqa: PLR2004 - 1^(-1.1) is 1, no promise
        raise PrivacyError(
            "too-few-units",
            f"δ = 1/N^1.1 promises nothing for N = {units}.",
            hint="Use a site with more records (of more units, if privacy.unit names a column), or set privacy.delta.",
        )
    return float(units**-1.1)


def delta_warning(delta: float, units: int, noun: str = "record") -> str | None:
    """Return why δ is too large for N units, or None; `noun` is what the message calls a unit.

    A mechanism that publishes each unit with probability δ is (0, δ)-private: at δ ≥ 1/N it publishes one on average.
    """
    if delta * units < 1:
        return None
    return (
        f"δ = {delta:g} is at least 1/N for N = {units}: a mechanism that publishes {max(1, round(delta * units))} of "
        f"the {noun}s outright on average would satisfy it. Choose δ below {1 / units:.2g}."
    )


def public_count(units: int) -> int:
    """Return N rounded to two significant digits: the only form in which a site's size is used or leaves it.

    N changes by one between neighbouring data sets, so it is itself private. The rounded number almost never changes
    with one unit; where even that is too much, or N is below 100 and rounding hides nothing, let the study's contract
    fix the number. As the normaliser q·N it only scales the step.
    """
    digits = len(str(abs(units)))
    return round(units, min(0, 2 - digits))
