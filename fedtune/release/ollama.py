"""A folder that `ollama create NAME -f Modelfile` takes: weights in GGUF, and a Modelfile that prompts as training did.

Knows Ollama's file format and what its converter does with an adapter in safetensors; never runs Ollama.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from fedtune.errors import ReleaseError
from fedtune.release.files import CONFIG_FILE, WEIGHTS_FILE
from fedtune.release.gguf.adapter import CheckedAdapter, check_adapter, write_adapter_gguf
from fedtune.release.gguf.model import check_model, write_model_gguf
from fedtune.release.gguf.numbers import check_dtype
from fedtune.release.ollama_template import Prompting, find_prompting
from fedtune.run.files import write_whole

AdapterFormat = Literal["gguf", "safetensors"]
Parameter = int | float | str
MODELFILE = "Modelfile"
_MODEL_FILE, _ADAPTER_FILE, _ADAPTER_FOLDER = "model.gguf", "adapter.gguf", "adapter"
_CONVERTED = ("llama", "gemma2")  # GGUF architectures for which Ollama converts an adapter in safetensors
_PERMUTED = (".q_proj.", ".k_proj.")
_PARAMETERS: dict[str, tuple[type, ...]] = {
    "num_ctx": (int,),
    "num_predict": (int,),
    "repeat_last_n": (int,),
    "repeat_penalty": (int, float),
    "seed": (int,),
    "temperature": (int, float),
    "top_k": (int,),
    "top_p": (int, float),
    "min_p": (int, float),
}


@dataclass(frozen=True, slots=True)
class OllamaFolder:
    """What was written: file names with their bytes, the Modelfile's TEMPLATE and stop texts, and limits to be told."""

    folder: Path
    sizes: dict[str, int]
    template: str
    stops: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Modelfile:
    model: str
    adapter: str | None
    prompting: Prompting
    parameters: Mapping[str, Parameter] = field(default_factory=dict)

    def text(self) -> str:
        """Return the Modelfile."""
        lines = [f"FROM ./{self.model}"]
        if self.adapter is not None:
            lines.append(f"ADAPTER ./{self.adapter}")
        lines.append(f'TEMPLATE """{self.prompting.template}"""')
        lines += [f"PARAMETER stop {_quoted(stop)}" for stop in self.prompting.stops]
        lines += [f"PARAMETER {name} {value}" for name, value in sorted(self.parameters.items())]
        return "\n".join(lines) + "\n"


def check_ollama(
    base_folder: Path,
    adapter_folder: Path | None = None,
    *,
    style: str,
    adapter_format: str = "gguf",
    parameters: Mapping[str, Parameter] | None = None,
) -> Prompting:
    """Look at everything that could be refused, without writing; see `write_ollama` for the errors."""
    check_model(Path(base_folder))
    if adapter_folder is not None:
        checked = check_adapter(Path(adapter_folder), Path(base_folder))
        if adapter_format == "safetensors":
            _check_convertible(checked)
        elif adapter_format != "gguf":
            raise ReleaseError("unknown-format", f"an adapter is not written as {adapter_format}", hint="choose gguf")
    _check_parameters(parameters or {})
    return find_prompting(Path(base_folder), style)


def write_ollama(  # noqa: PLR0913 - what to write, and how
    folder: Path,
    base_folder: Path,
    adapter_folder: Path | None = None,
    *,
    style: str,
    dtype: str = "f16",
    adapter_format: str = "gguf",
    parameters: Mapping[str, Parameter] | None = None,
    name: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> OllamaFolder:
    """Write weights and Modelfile into an empty folder.

    Without `adapter_folder` the base (into which an adapter was merged) is all; with one the base is `FROM` and the
    adapter `ADAPTER`. `style` is the task's, and decides TEMPLATE. The Modelfile is written last.
    Errors: those of `check_model`, `check_adapter` and `find_prompting`; `release.not-convertible` when Ollama's
    converter would not take the adapter in safetensors, or would change it; `release.bad-parameter`.
    """
    base_folder, folder = Path(base_folder), Path(folder)
    check_dtype(dtype)
    prompting = check_ollama(
        base_folder, adapter_folder, style=style, adapter_format=adapter_format, parameters=parameters
    )
    model = write_model_gguf(base_folder, folder / _MODEL_FILE, dtype, name=name, progress=progress)
    placed = None
    if adapter_folder is not None:
        placed = _place_adapter(Path(adapter_folder), base_folder, folder, dtype, adapter_format)
    modelfile = _Modelfile(_MODEL_FILE, placed, prompting, parameters or {})
    write_whole(folder / MODELFILE, modelfile.text().encode())
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}
    notes = (*model.notes, *prompting.notes, *_adapter_notes(placed))
    return OllamaFolder(folder, sizes, prompting.template, prompting.stops, notes)


def _place_adapter(adapter: Path, base: Path, folder: Path, dtype: str, adapter_format: str) -> str:
    if adapter_format == "gguf":
        write_adapter_gguf(adapter, base, folder / _ADAPTER_FILE, "f16" if dtype == "q8_0" else dtype)
        return _ADAPTER_FILE
    target = folder / _ADAPTER_FOLDER
    target.mkdir()
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        shutil.copyfile(adapter / file, target / file)
    return _ADAPTER_FOLDER


def _adapter_notes(placed: str | None) -> tuple[str, ...]:
    if placed is None:
        return ()
    return ("Ollama's own engine loads no adapter for some models; where it says so, use --merged instead",)


def _check_convertible(checked: CheckedAdapter) -> None:
    """Refuse what Ollama's converter refuses, and what it would silently change.

    It tells A from B by their shapes, and for Llama reorders the rows of A of q and k, where the rotary order is one
    of B's rows: such an adapter would load and be another.
    """
    architecture = checked.family.architecture
    if architecture not in _CONVERTED:
        raise _not_convertible(f"takes {' and '.join(_CONVERTED)} only, and this is {architecture}")
    for target, pair in checked.factors.items():
        rank, inputs = checked.weights.shape(pair["A"])
        outputs, _ = checked.weights.shape(pair["B"])
        if architecture == "llama" and any(part in pair["A"] for part in _PERMUTED):
            raise _not_convertible(f"reorders {target}'s A, where the rotary order is one of B's rows")
        if rank > min(inputs, outputs):
            raise _not_convertible(f"would transpose {target}, whose rank {rank} is above its width")


def _not_convertible(finding: str) -> ReleaseError:
    return ReleaseError(
        "not-convertible", f"Ollama's converter of safetensors {finding}", hint="write the adapter as GGUF, the default"
    )


def _check_parameters(parameters: Mapping[str, Parameter]) -> None:
    for name, value in parameters.items():
        kinds = _PARAMETERS.get(name)
        if kinds is None or isinstance(value, bool) or not isinstance(value, kinds):
            known = ", ".join(sorted(_PARAMETERS))
            raise ReleaseError("bad-parameter", f"{name}={value!r} is no parameter of Ollama", hint=f"known: {known}")


def _quoted(text: str) -> str:
    """Quote a stop text; a Modelfile has no escapes, but three quotes hold one."""
    if '"""' in text or text.endswith('"') or not all(part.isprintable() for part in text.split("\n")):
        raise ReleaseError("bad-parameter", f"the stop text {text!r} cannot be written", hint="use --to gguf")
    return f'"""{text}"""' if '"' in text else f'"{text}"'
