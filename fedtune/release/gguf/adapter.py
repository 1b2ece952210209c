"""A plain PEFT LoRA folder as a GGUF adapter, which llama.cpp adds to a base in GGUF.

llama.cpp computes y = Wx + (α / r)·B(Ax) with `NAME.lora_a` (r, in) and `NAME.lora_b` (out, r), where NAME is the
base's GGUF tensor. The rows of B are laid out as those of W are; A stays as it is.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedtune.errors import ReleaseError
from fedtune.release.canonical import require_canonical
from fedtune.release.gguf.families import OUTPUT_MODULE, Family, Names, check_family, names_of
from fedtune.release.gguf.files import GgufFile, PlannedTensor, write_gguf
from fedtune.release.gguf.hyperparameters import Hyperparameters, read_hyperparameters
from fedtune.release.gguf.layout import pair_rotary, rotary_heads, stored_transposed
from fedtune.release.gguf.numbers import Dtype, check_dtype, format_of
from fedtune.release.gguf.weights import WeightFolder, open_weights, read_config

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from numpy.typing import NDArray

_NAME = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
_HEAD_FILE = "head.safetensors"  # what fedtune trained whole, beside LoRA


@dataclass(frozen=True, slots=True)
class CheckedAdapter:
    """A PEFT folder that can be written: α, and the two factors' names by GGUF name."""

    config: dict[str, Any]
    family: Family
    sizes: Hyperparameters
    weights: WeightFolder
    factors: dict[str, dict[str, str]]  # GGUF tensor to {"A": name, "B": name}

    @property
    def alpha(self) -> int:
        """LoRA's α."""
        return int(self.config["lora_alpha"])


def check_adapter(adapter_folder: Path, base_folder: Path) -> CheckedAdapter:
    """Look at an adapter and its base without writing.

    Errors: `release.not-canonical` for anything beyond plain LoRA (DoRA, `modules_to_save`, a fractional alpha, …),
    `release.not-plain-lora` for other tensors or a head, `release.embedding-adapter`, `release.wrong-base`, and those
    of `check_family` and `read_hyperparameters`.
    """
    config = read_config(adapter_folder, "adapter_config.json")
    _check_plain(adapter_folder, config)
    base_config = read_config(base_folder)
    family = check_family(base_config)
    sizes = read_hyperparameters(base_config, family)
    weights = open_weights(adapter_folder, "adapter_model.safetensors")
    base = open_weights(base_folder)
    return CheckedAdapter(config, family, sizes, weights, _factors(weights, base, family, sizes))


def write_adapter_gguf(
    adapter_folder: Path,
    base_folder: Path,
    out_file: Path,
    dtype: str = "f16",
    *,
    name: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> GgufFile:
    """Write a plain PEFT folder as a GGUF adapter for the base in `base_folder`.

    Checks everything first; the file is whole or absent. With q8_0, a factor whose rows 32 does not divide (B of a
    rank below 32) is f16. Errors: see `check_adapter`; `release.unknown-dtype`, `release.unwritable`.
    """
    import gguf

    kind = check_dtype(dtype)
    checked = check_adapter(Path(adapter_folder), Path(base_folder))
    writer = gguf.GGUFWriter(None, checked.family.architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(checked.alpha))
    writer.add_name(name or Path(adapter_folder).name)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    tensors = [part for target, pair in checked.factors.items() for part in _pair(checked, target, pair, kind)]
    return write_gguf(Path(out_file), writer, tensors, progress=progress)


def _pair(checked: CheckedAdapter, target: str, pair: dict[str, str], kind: Dtype) -> list[PlannedTensor]:
    heads = rotary_heads(target, checked.family, checked.sizes)

    def load_b() -> NDArray[np.float32]:
        values = checked.weights.load(pair["B"])
        return values if heads is None else pair_rotary(values, heads)

    shape_a, shape_b = (checked.weights.shape(pair[side]) for side in "AB")
    return [
        PlannedTensor(
            f"{target}.lora_a", shape_a, format_of(target, shape_a, kind), lambda: checked.weights.load(pair["A"])
        ),
        PlannedTensor(f"{target}.lora_b", shape_b, format_of(target, shape_b, kind), load_b),
    ]


def _check_plain(folder: Path, config: dict[str, Any]) -> None:
    require_canonical(config)
    if config.get("task_type") not in {None, "CAUSAL_LM"} or (folder / _HEAD_FILE).exists():
        raise _not_plain("classifies with a head of its own, and llama.cpp only generates text")


def _factors(
    weights: WeightFolder, base: WeightFolder, family: Family, sizes: Hyperparameters
) -> dict[str, dict[str, str]]:
    names = names_of(family, sizes.layers)
    shapes = {place.removeprefix(family.prefix): shape for place, (_, shape) in base.tensors.items()}
    factors: dict[str, dict[str, str]] = {}
    for name in weights.tensors:
        match = _NAME.fullmatch(name)
        if match is None:
            raise _not_plain(f"holds {name}, which is no factor of LoRA")
        target = _target(match["module"], names, family, sizes)
        factors.setdefault(target, {})[match["side"]] = name
        pair = factors[target]
        if len(pair) == len("AB"):
            shape = shapes.get(f"{match['module'].removeprefix(family.prefix)}.weight")
            _check_shapes(weights, pair, target, shape, transposed=stored_transposed(target, family))
    if lonely := [pair for pair in factors.values() if len(pair) != len("AB")]:
        raise _not_plain(f"holds {next(iter(lonely[0].values()))} without its other factor")
    return factors


def _target(module: str, names: Names, family: Family, sizes: Hyperparameters) -> str:
    """Return the GGUF tensor that a module's LoRA is added to; refuses embeddings and a head that is one."""
    found = names.of(module)
    if found is None:
        raise _wrong_base(f"the adapter is for {module}, which {family.class_name} does not have")
    shared = module == OUTPUT_MODULE and (sizes.tied or family.drops_output)
    if found in {"token_embd", "position_embd"} or shared:
        raise ReleaseError(
            "embedding-adapter",
            f"the adapter changes {module}, which is an embedding; llama.cpp would leave that out",
            hint="merge it: fedtune release RUN --to merged, or train with other lora.targets",
        )
    return f"{found}.weight"


def _check_shapes(
    weights: WeightFolder, pair: dict[str, str], target: str, base: tuple[int, ...] | None, *, transposed: bool
) -> None:
    if base is None:
        raise _wrong_base(f"the base has no weight for {target}")
    out_features, in_features = base[::-1] if transposed else base
    shape_a, shape_b = weights.shape(pair["A"]), weights.shape(pair["B"])
    if shape_a[1] != in_features or shape_b[0] != out_features or shape_a[0] != shape_b[1]:
        raise _wrong_base(
            f"{pair['A']} {shape_a} and B {shape_b} do not fit a layer of {out_features} by {in_features}"
        )


def _not_plain(finding: str) -> ReleaseError:
    return ReleaseError(
        "not-plain-lora",
        f"the adapter {finding}",
        hint="fedtune release RUN --to peft",
    )


def _wrong_base(finding: str) -> ReleaseError:
    return ReleaseError("wrong-base", finding, hint="name the base that the adapter was trained on")
