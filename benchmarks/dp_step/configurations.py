"""The shapes that are measured, as plain data; imports nothing heavy."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

Family = Literal["bert", "gpt2", "llama"]
Targets = Literal["qv", "all-linear"]


@dataclass(frozen=True, slots=True)
class Configuration:
    """One adapted model and one batch: B records of T tokens, all of one length.

    `width` is the hidden size, `inner` that of the feed-forward layers, `kv_heads` those of keys and values (Llama).
    `vocabulary` is small, so that the output layer of a language model does not hide what is measured.
    """

    name: str
    model: str
    family: Family
    layers: int
    width: int
    heads: int
    inner: int
    batch: int
    tokens: int = 128
    rank: int = 8
    targets: Targets = "all-linear"
    dtype: Literal["float32", "bfloat16"] = "float32"
    vocabulary: int = 1000
    classes: int = 16
    kv_heads: int | None = None

    @property
    def words(self) -> str:
        """One line for tables."""
        base = ", bf16 base" if self.dtype == "bfloat16" else ""
        shape = f"{self.model} {self.layers}×{self.width} B{self.batch} T{self.tokens}"
        return f"{shape} r{self.rank} {self.targets.replace('qv', 'q,v')}{base}"

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


_MINILM = Configuration("minilm-all-linear", "minilm", "bert", 6, 384, 12, 1536, batch=16)
_GPT2 = Configuration("gpt2-all-linear", "gpt2", "gpt2", 12, 768, 12, 3072, batch=8)
_TINY = Configuration("tiny-all-linear", "tiny", "gpt2", 4, 256, 4, 1024, batch=4, tokens=32)
_LLAMA = Configuration("llama-all-linear", "llama", "llama", 8, 512, 8, 1376, batch=8, rank=64, kv_heads=8)

TABLE = (
    replace(_MINILM, name="minilm-qv", targets="qv"),
    _MINILM,
    replace(_MINILM, name="minilm-bf16", dtype="bfloat16"),
    replace(_MINILM, name="minilm-b32", batch=32),
    _GPT2,
    _TINY,
    _LLAMA,
)
MODELS = ("minilm", "gpt2", "tiny", "llama")

# A Llama-architecture shape of the 1B class (that of Llama 3.2), with a vocabulary of the size of Llama 2's.
LARGE = Configuration(
    "llama-1b",
    "llama-1b",
    "llama",
    16,
    2048,
    32,
    8192,
    batch=8,
    tokens=512,
    rank=16,
    dtype="bfloat16",
    vocabulary=32000,
    kv_heads=8,
)

# Which configuration's figures stand at the top of the JSON, when several were measured: the first of these.
TIME_HEADLINE = ("minilm-all-linear", "minilm-qv")
MEMORY_HEADLINE = ("minilm-b32", "minilm-all-linear", "minilm-qv")


def selected(model: str | None, targets: Targets | None) -> list[Configuration]:
    """Return the table's rows of a model and of targets; a model with targets that are in no row gets one."""
    rows = [row for row in TABLE if model in {None, row.model}]
    fitting = [row for row in rows if targets in {None, row.targets}]
    if fitting or targets is None:
        return fitting
    return [replace(rows[0], name=f"{rows[0].model}-{targets}", targets=targets)]


def quick(configuration: Configuration) -> Configuration:
    """Return the same model in a size that takes milliseconds."""
    kv_heads = None if configuration.kv_heads is None else 2
    small = replace(configuration, layers=2, width=32, heads=2, inner=64, batch=4, tokens=16, vocabulary=64)
    return replace(small, rank=min(configuration.rank, 4), classes=4, kv_heads=kv_heads)


def reshaped(configuration: Configuration, changes: dict[str, int | None]) -> Configuration:
    """Return the configuration with other sizes (`batch`, `tokens`, `rank`); None leaves a size as it is."""
    wanted: dict[str, Any] = {key: value for key, value in changes.items() if value is not None}
    return replace(configuration, **wanted)


def headline(names: list[str], order: tuple[str, ...]) -> str:
    """Return the name whose figures stand for the run: the first of `order` that was measured, or the first."""
    return next((name for name in order if name in names), names[0])
