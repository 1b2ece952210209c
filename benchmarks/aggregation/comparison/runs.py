"""Which studies are compared and in which order, as overrides of `experiment=aggregation`; imports nothing heavy.

All that an algorithm does not change is the same for all, the server optimiser (FedAvg) included. One learning rate
serves a family, because what is trained has another scale: both factors, B alone, one factor a round, the core between
two frozen ones, or both factors begun anew each round. The rates were found on `SEARCH_SEED`, which is not among the
seeds that are compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

SEARCH_SEED: Final = 99
SEEDS: Final = (0, 1, 2)
PARTITIONS: Final = {
    "dirichlet": ("data.partition.scheme=dirichlet", "data.partition.alpha=0.3"),
    "iid": ("data.partition.scheme=iid",),
}
PRIVACY: Final = {"off": ("privacy=off",), "dp": ("privacy=dp", "privacy.epsilon=8", "privacy.clip_norm=1")}
LEARNING_RATES: Final = {"both": 0.03, "B": 0.3, "alternating": 0.1, "core": 1.0, "restarted": 0.3}
FAMILIES: Final = {
    "fedit": "both",
    "ffa": "B",
    "rolora": "alternating",
    "fedsvd": "B",
    "fedsa": "both",
    "flora": "restarted",
    "fedex": "both",
    "flexlora": "both",
    "hetlora": "both",
    "fedsb": "core",
    "fedask": "B",
}


@dataclass(frozen=True, slots=True)
class Upload:
    """How a site writes its update: `form` of the numbers, the share that is sent, and whether the rest is kept."""

    form: str = "fp32"
    keep: float = 1.0
    feedback: bool = False

    @property
    def words(self) -> tuple[str, ...]:
        """The overrides; none for plain numbers."""
        if self == Upload():
            return ()
        share = (f"aggregation.upload_keep={self.keep:g}",) if self.keep < 1 else ()
        feedback = ("aggregation.error_feedback=true",) if self.feedback else ()
        return (f"aggregation.upload={self.form}", *share, *feedback)

    def __str__(self) -> str:
        share = f", largest {self.keep:.0%}" if self.keep < 1 else ""
        return self.form + share + (" + error feedback" if self.feedback else "")


BASELINE: Final = ("fedit", Upload())
UPLOADS: Final = (
    BASELINE,
    ("fedit", Upload("bf16")),
    ("fedit", Upload("int8")),
    ("fedit", Upload("int4")),
    ("fedit", Upload("int8", 0.1)),
    ("ffa", Upload()),
    ("ffa", Upload("int8")),
    ("ffa", Upload("int4")),
    ("ffa", Upload("int8", 0.1, feedback=True)),
    ("ffa", Upload("int4", 0.25, feedback=True)),
    ("fedsvd", Upload()),
    ("fedsvd", Upload("int4")),
    ("fedask", Upload()),
    ("fedask", Upload("int8")),
    ("fedask", Upload("int4")),
    ("fedsb", Upload()),
    ("fedsb", Upload("int4")),
    ("fedsb", Upload("int8", 0.1, feedback=True)),
    ("fedsb", Upload("int4", 0.25, feedback=True)),
)


@dataclass(frozen=True, slots=True)
class Run:
    """One study of the comparison."""

    algorithm: str
    partition: str
    privacy: str
    seed: int
    upload: Upload = Upload()

    @property
    def words(self) -> tuple[str, ...]:
        """Everything that tells it from the study file."""
        rate = LEARNING_RATES[FAMILIES[self.algorithm]]
        own = (f"aggregation.algorithm={self.algorithm}", f"training.learning_rate={rate:g}", f"seed={self.seed}")
        return (*PARTITIONS[self.partition], *PRIVACY[self.privacy], *own, *self.upload.words)


def algorithm_runs(seed: int) -> Iterator[Run]:
    """Yield one seed's runs of every algorithm, one complete condition after the other."""
    for partition in PARTITIONS:
        for privacy in PRIVACY:
            for algorithm in FAMILIES:
                yield Run(algorithm, partition, privacy, seed)


def byte_runs(seed: int) -> Iterator[Run]:
    """Yield one seed's runs of the bytes curve; those without compression are runs of the comparison as well."""
    for algorithm, upload in UPLOADS:
        yield Run(algorithm, "dirichlet", "off", seed, upload)


def runs(parts: Iterable[str], seeds: Iterable[int]) -> list[Run]:
    """Return the runs of the parts, seed by seed, each once."""
    makers = {"algorithms": algorithm_runs, "bytes": byte_runs}
    return list(dict.fromkeys(run for seed in seeds for part in parts for run in makers[part](seed)))
