"""Attacks on a round: pure functions from what honest sites would send to what arrives.

`states` are the adapters that all sites would send, `centre` is the global adapter they started from, `attackers` says
which of them attack. Honest states are passed on as the same objects. An update is `state − centre`; where both factors
are sent, that is not a direction of ΔW, so attack one factor and leave the other as it is.
"""

from collections.abc import Callable, Mapping, Sequence
from statistics import NormalDist

import numpy as np

State = Mapping[str, np.ndarray]
Attack = Callable[[Sequence[State], State, Sequence[int]], list[State]]


def scaled(states: Sequence[State], centre: State, attackers: Sequence[int], factor: float = 100.0) -> list[State]:
    """Send the own update `factor` times as long."""
    return _replaced(states, {i: _moved(centre, states[i], factor) for i in attackers})


def sign_flip(states: Sequence[State], centre: State, attackers: Sequence[int]) -> list[State]:
    """Send the own update backwards, at its own length, so that no norm gives it away."""
    return scaled(states, centre, attackers, factor=-1.0)


def gaussian(
    states: Sequence[State], centre: State, attackers: Sequence[int], std: float = 1.0, seed: int = 0
) -> list[State]:
    """Send noise of standard deviation `std` around the global adapter."""
    generator = np.random.default_rng(seed)
    noise = {
        i: {name: _narrow(array + std * generator.standard_normal(array.shape)) for name, array in centre.items()}
        for i in attackers
    }
    return _replaced(states, noise)


def little_is_enough(
    states: Sequence[State], centre: State, attackers: Sequence[int], z: float | None = None
) -> list[State]:
    """Collude: all send the honest mean − z·honest standard deviation, entry by entry, inside the honest cloud.

    z is the paper's when None: so large that with ⌊n/2 + 1⌋ − f honest supporters the attackers hold the median.
    Here they know the honest updates, which the paper lets them estimate. Source: Baruch et al. (arXiv 1902.06156).
    """
    honest = [state for i, state in enumerate(states) if i not in set(attackers)]
    reach = little_z(len(states), len(attackers)) if z is None else z
    sent = {}
    for name in centre:
        stacked = np.stack([state[name] for state in honest]).astype(float)
        sent[name] = _narrow(stacked.mean(0) - reach * stacked.std(0))
    return _replaced(states, dict.fromkeys(attackers, sent))


def little_z(sites: int, attackers: int) -> float:
    """Return z with Φ(z) = (n − f − s) / (n − f), s = ⌊n/2 + 1⌋ − f, at least 0."""
    supporters = sites // 2 + 1 - attackers
    share = (sites - attackers - supporters) / (sites - attackers)
    return max(0.0, NormalDist().inv_cdf(share)) if 0 < share < 1 else 0.0


ATTACKS: dict[str, Attack] = {
    "sign_flip": sign_flip,
    "scaled": scaled,
    "gaussian": gaussian,
    "little_is_enough": little_is_enough,
}


def _moved(centre: State, state: State, factor: float) -> State:
    return {name: _narrow(centre[name] + factor * (state[name].astype(float) - centre[name])) for name in state}


def _replaced(states: Sequence[State], sent: Mapping[int, State]) -> list[State]:
    return [sent.get(i, state) for i, state in enumerate(states)]


def _narrow(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32)
