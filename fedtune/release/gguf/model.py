"""A whole model as one GGUF file: weights, sizes, tokenizer and chat template of a `transformers` folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedtune.errors import ReleaseError
from fedtune.release.gguf.families import OUTPUT_MODULE, Family, check_family, names_of
from fedtune.release.gguf.files import GgufFile, PlannedTensor, write_gguf
from fedtune.release.gguf.hyperparameters import Hyperparameters, add_hyperparameters, read_hyperparameters
from fedtune.release.gguf.layout import lay_out, stored_transposed
from fedtune.release.gguf.numbers import Dtype, check_dtype, format_of
from fedtune.release.gguf.tokenizer import TokenizerTable, add_tokenizer, read_tokenizer
from fedtune.release.gguf.weights import WeightFolder, open_weights, read_config

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

_FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0"}
_BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")  # constants that old checkpoints hold


@dataclass(frozen=True, slots=True)
class CheckedModel:
    """A model folder that can be written: all that can be refused without reading whole weights was looked at."""

    folder: Path
    config: dict[str, Any]
    family: Family
    sizes: Hyperparameters
    weights: WeightFolder
    places: dict[str, str]  # GGUF name to the name in the folder
    tokenizer: TokenizerTable


def check_model(folder: Path) -> CheckedModel:
    """Look at a model folder without writing; errors: `release.…` of the family, configuration, tokenizer, weights."""
    config = read_config(folder)
    family = check_family(config)
    sizes = read_hyperparameters(config, family)
    weights = open_weights(folder)
    places = _places(weights, family, sizes)
    return CheckedModel(folder, config, family, sizes, weights, places, read_tokenizer(folder, sizes.vocabulary))


def write_model_gguf(
    model_folder: Path,
    out_file: Path,
    dtype: str = "f16",
    *,
    name: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> GgufFile:
    """Write a `transformers` folder (a base, or one that an adapter was merged into) as one GGUF file.

    Matrices are in `dtype` (f32, f16, q8_0; a row that 32 does not divide is f16 instead of q8_0), vectors in f32.
    Checks everything first; the file is whole or absent. Errors: see `check_model`; `release.unknown-dtype`,
    `release.not-finite`, `release.out-of-range`, `release.unwritable`.
    """
    import gguf

    kind = check_dtype(dtype)
    checked = check_model(Path(model_folder))
    writer = gguf.GGUFWriter(None, checked.family.architecture)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name or Path(model_folder).name)
    writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[kind]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_hyperparameters(writer, checked.family, checked.sizes)
    add_tokenizer(writer, checked.tokenizer)
    return write_gguf(Path(out_file), writer, _tensors(checked, kind), checked.tokenizer.notes, progress)


def _tensors(checked: CheckedModel, kind: Dtype) -> list[PlannedTensor]:
    planned = []
    for name, place in checked.places.items():
        shape = checked.weights.shape(place)
        shape = shape[::-1] if stored_transposed(name, checked.family) else shape
        planned.append(PlannedTensor(name, shape, format_of(name, shape, kind), _loader(checked, name, place)))
    if (factors := checked.sizes.rotary_factors) is not None:
        planned.append(PlannedTensor("rope_freqs.weight", factors.shape, "f32", lambda: factors))
    return planned


def _loader(checked: CheckedModel, name: str, place: str) -> Callable[[], NDArray[np.float32]]:
    return lambda: lay_out(name, checked.weights.load(place), checked.family, checked.sizes)


def _places(weights: WeightFolder, family: Family, sizes: Hyperparameters) -> dict[str, str]:
    """Map GGUF names to the folder's; refuses tensors without a place, missing layers and wrong embeddings."""
    names = names_of(family, sizes.layers)
    places: dict[str, str] = {}
    for place in weights.tensors:
        if place.endswith(_BUFFERS):
            continue
        module, _, kind = place.rpartition(".")
        if module == OUTPUT_MODULE and (sizes.tied or family.drops_output):
            _check_tied(weights, place, family, sizes)
            continue
        if (found := names.of(module)) is None or kind not in {"weight", "bias"}:
            raise _no_place(weights.folder, place, family)
        places[f"{found}.{kind}"] = place
    _check_complete(weights, places, sizes, owns_output=not (sizes.tied or family.drops_output))
    return places


def _check_tied(weights: WeightFolder, place: str, family: Family, sizes: Hyperparameters) -> None:
    """Refuse an output head of its own that llama.cpp would not read; a copy of the embedding is left out."""
    if sizes.tied:
        return
    embedding = next(name for name in weights.tensors if name.endswith("embed_tokens.weight"))
    if not np.array_equal(weights.load(place), weights.load(embedding)):
        raise _no_place(weights.folder, place, family)


def _check_complete(
    weights: WeightFolder, places: dict[str, str], sizes: Hyperparameters, *, owns_output: bool
) -> None:
    """Refuse a folder with a part missing: llama.cpp fills some gaps in silence."""
    block = {name.removeprefix("blk.0.") for name in places if name.startswith("blk.0.")}
    wanted = {f"blk.{layer}.{part}" for layer in range(sizes.layers) for part in block or {"attn_norm.weight"}}
    wanted |= {"token_embd.weight", "output_norm.weight"} | ({"output.weight"} if owns_output else set())
    if missing := sorted(wanted - places.keys()):
        hint = "fetch or merge the model again"
        raise ReleaseError("incomplete-model", f"{weights.folder} lacks what GGUF calls {missing[0]}", hint=hint)
    rows = weights.shape(places["token_embd.weight"])[0]
    if rows != sizes.vocabulary:
        raise ReleaseError(
            "incomplete-model",
            f"{weights.folder} has {rows} embeddings, its config.json says {sizes.vocabulary}",
            hint="save model and config together with save_pretrained",
        )


def _no_place(folder: Path, place: str, family: Family) -> ReleaseError:
    return ReleaseError(
        "no-gguf-place",
        f"{folder} holds {place}, which llama.cpp's {family.architecture} does not have",
        hint="use transformers: fedtune release RUN --to merged",
    )
