"""What was spent: mechanism events, their composition, and ε at a fixed δ.

Events, not ε, are what a ledger keeps: any accountant can recompute from them later. Knows nothing of training; torch
is imported only for the two cross-check accountants.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from fedtune.errors import PrivacyError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

AccountantName = Literal["pld", "rdp", "prv"]
Relation = Literal["add/remove one"]
SamplerName = Literal["poisson", "shuffle"]
Mechanism = tuple[float, float, int]  # (noise multiplier σ, sampling rate q, steps)

LEAST_INTERVAL = 1e-5  # an ε far below this is overstated by it; a finer grid would take minutes for rare sampling
PESSIMISM = 1e-4  # sets the grid of the PLD, which overstates ε (measured: by 2e-5 to 3e-3 of it), never understates it


@dataclass(frozen=True, slots=True)
class Event:
    """`steps` adaptive runs of the subsampled Gaussian mechanism.

    Each clips the contribution of every unit drawn to `clip_norm` (L2) and adds noise of standard deviation
    `noise_multiplier`·`clip_norm` to the sum. `noise_multiplier=0` is a step without privacy. The sampler `poisson`
    draws each unit in each step with probability q = `sampling_rate`; `shuffle` deals each unit to one of the 1/q steps
    of an epoch, and `steps` are whole epochs.
    `noise` says where the draws came from; it does not change ε, but a `seeded` run is not for release.
    """

    noise_multiplier: float
    sampling_rate: float
    steps: int
    clip_norm: float
    unit: str = "record"
    relation: Relation = "add/remove one"
    sampler: SamplerName = "poisson"
    noise: Literal["seeded", "secure"] = "seeded"

    def __post_init__(self) -> None:
        _require(math.isfinite(self.noise_multiplier) and self.noise_multiplier >= 0, "noise_multiplier", self)
        _require(0 < self.sampling_rate <= 1, "sampling_rate", self)
        _require(isinstance(self.steps, int) and self.steps >= 0, "steps", self)
        _require(math.isfinite(self.clip_norm) and self.clip_norm > 0, "clip_norm", self)
        _require(self.relation == "add/remove one", "relation", self)
        _require(self.sampler in {"poisson", "shuffle"}, "sampler", self)
        if self.sampler == "shuffle":
            _require(self.steps % steps_an_epoch(self.sampling_rate) == 0, "steps", self)
        _require(self.noise in {"seeded", "secure"}, "noise", self)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Event:
        """Return the event; an unknown or missing key is an error, because a guessed event is a wrong ε."""
        if set(values) != {field.name for field in fields(cls)}:
            raise PrivacyError("event", f"an accounting event has the keys {sorted(values)}, which are not an event's.")
        try:
            return cls(**values)
        except TypeError as error:
            raise PrivacyError("event", "an accounting event holds a value of the wrong type.") from error


def _require(holds: bool, name: str, event: Event) -> None:
    if not holds:
        raise PrivacyError("event", f"an accounting event has {name}={getattr(event, name)!r}, which cannot be.")


def steps_an_epoch(sampling_rate: float) -> int:
    """Return 1/q, the steps in which shuffling uses every unit once; an error where that is not a whole number."""
    steps = round(1 / sampling_rate)
    if not math.isclose(steps * sampling_rate, 1.0, rel_tol=1e-9):
        raise PrivacyError(
            "epoch",
            f"the sampling rate {sampling_rate:g} does not divide an epoch into whole steps.",
            hint="Set training.sampling_rate to a half, a third, … (0.5, 0.25, 0.1), or training.sampler=poisson.",
        )
    return steps


def merge(events: Iterable[Event]) -> tuple[Event, ...]:
    """Join events that differ only in their steps, sorted; composition does not depend on the order.

    Composing a merged history is faster by orders of magnitude than composing step by step, with the same ε.
    """
    steps: dict[Event, int] = {}
    for event in events:
        key = replace(event, steps=0)
        steps[key] = steps.get(key, 0) + event.steps
    merged = (replace(key, steps=count) for key, count in steps.items() if count)
    return tuple(sorted(merged, key=lambda event: tuple(asdict(event).values())))


def epsilon(events: Iterable[Event], delta: float, accountant: AccountantName = "pld") -> float:
    """Return ε such that all events together are (ε, δ)-differentially private for one unit.

    `pld` (default) is the tightest; `rdp` and `prv` are independent cross-checks. No steps spend 0; a step without
    noise spends ∞. Raises PrivacyError for a δ outside (0, 1), an unknown accountant, or events over different units.
    """
    if not 0 < delta < 1:
        raise PrivacyError(
            "delta",
            f"δ is {delta}; it is a probability strictly between 0 and 1.",
            hint="Set privacy.delta below 1 / (number of units), or leave it out for 1/N^1.1.",
        )
    if accountant not in get_args(AccountantName):
        raise PrivacyError("unknown-accountant", f"there is no accountant {accountant!r}; known: pld, rdp, prv.")
    history = merge(events)
    if len({(event.unit, event.relation) for event in history}) > 1:
        raise PrivacyError("mixed-units", "events over different privacy units cannot be composed into one ε.")
    return _epsilon(_mechanisms(history), delta, accountant)


def _mechanisms(history: tuple[Event, ...]) -> tuple[Mechanism, ...]:
    """(σ, q, steps) with equal (σ, q) joined: ε depends on nothing else, because noise is in units of the clip norm."""
    steps: dict[tuple[float, float], int] = {}
    for event in history:
        rate, count = as_poisson(event.sampler, event.sampling_rate, event.steps)
        key = (float(event.noise_multiplier), rate)
        steps[key] = steps.get(key, 0) + count
    return tuple((sigma, rate, count) for (sigma, rate), count in sorted(steps.items()))


def as_poisson(sampler: SamplerName, sampling_rate: float, steps: int) -> tuple[float, int]:
    """Return the rate and the number of Poisson-sampled steps that spend at least as much.

    An epoch of shuffling is one step of the plain Gaussian mechanism, rate 1: a unit is in exactly one of its disjoint
    batches, dealt without regard to other units, so the other steps do not depend on it (parallel composition).
    Amplification by not knowing which step it was is real (Chua et al. 2024, arXiv 2412.16802) and not claimed.
    """
    if sampler == "poisson":
        return float(sampling_rate), steps
    return 1.0, steps // steps_an_epoch(sampling_rate)


@lru_cache(maxsize=4096)
def _epsilon(history: tuple[Mechanism, ...], delta: float, accountant: AccountantName) -> float:
    if not history:
        return 0.0
    if history[0][0] <= 0:  # sorted: the smallest noise multiplier comes first
        return math.inf
    if accountant == "pld":
        return pld_epsilon(history, delta)
    return _opacus_epsilon(history, delta, accountant)


def pld_epsilon(history: tuple[Mechanism, ...], delta: float, pessimism: float = PESSIMISM) -> float:
    """Return ε by the privacy loss distribution (Koskela et al. 2020; connect-the-dots, Doroshenko et al. 2022).

    Steps at rate 1 are plain Gaussian mechanisms, and adaptively composed Gaussians of multipliers σ_i are *exactly*
    one Gaussian of multiplier (Σ σ_i⁻²)^(-1/2) (Dong, Roth, Su 2022, Corollary 3.3). A history of only those has the
    closed form of Balle and Wang 2018; mixed with others it enters the composition as a single event.
    """
    import dp_accounting
    from dp_accounting.pld import PLDAccountant

    precision = sum(steps / sigma**2 for sigma, rate, steps in history if rate == 1)
    if all(rate == 1 for _, rate, _ in history):
        return float(dp_accounting.get_epsilon_gaussian(precision**-0.5, delta))
    events = [
        dp_accounting.SelfComposedDpEvent(
            dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(sigma)), steps
        )
        for sigma, rate, steps in history
        if rate < 1
    ]
    if precision:
        events.append(dp_accounting.GaussianDpEvent(precision**-0.5))
    accountant = PLDAccountant(value_discretization_interval=_interval(events, history, delta, pessimism))
    with np.errstate(over="ignore"):  # masses of ε in the thousands; the comparison that overflows is still right
        return float(accountant.compose(dp_accounting.ComposedDpEvent(events)).get_epsilon(delta))


def _interval(events: list[Any], history: tuple[Mechanism, ...], delta: float, pessimism: float) -> float:
    """Choose the grid of privacy losses from an RDP bound on ε and the number n of steps.

    Rounding to a grid of width h costs about n·h²/2 in ε, always upwards, so h = √(pessimism·ε / n) keeps the loss near
    `pessimism`·ε (above it for q below 0.01, where the RDP bound is loose); h ≤ ε/1000 resolves the composed
    distribution itself. A fixed width would be wasteful for ten steps, wrong for a hundred thousand, and exhaust the
    memory for a large ε.
    """
    import dp_accounting
    from dp_accounting.rdp import RdpAccountant

    rdp = RdpAccountant(orders=(2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128, 256, 512))
    bound = float(rdp.compose(dp_accounting.ComposedDpEvent(events)).get_epsilon(delta))
    steps = sum(steps for _, _, steps in history)
    return max(LEAST_INTERVAL, min(math.sqrt(pessimism * bound / steps), 1e-3 * bound))


def _opacus_epsilon(history: tuple[Mechanism, ...], delta: float, accountant: AccountantName) -> float:
    """ε by Opacus' accountants; `prv` is the upper end of its interval, whose error parameter is 0.01."""
    from opacus.accountants import PRVAccountant, RDPAccountant

    judge = RDPAccountant() if accountant == "rdp" else PRVAccountant()
    judge.history = list(history)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the hint to try more orders, and log(0) at rate 1, change no bound
        return float(judge.get_epsilon(delta))
