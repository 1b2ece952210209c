"""The kinds of release: what each writes into an empty folder, and how it is used.

A kind refuses a study that it cannot carry before it writes anything.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fedtune.errors import ReleaseError
from fedtune.release.files import CARD_FILE, walk
from fedtune.release.manifest import Kind
from fedtune.release.study import EndedStudy
from fedtune.release.usage import gguf_use, ollama_use

Tell = Callable[[str], None]
Progress = Callable[[int, int], None]  # bytes written, of how many


@dataclass(frozen=True, slots=True)
class Request:
    """What to write, and where.

    `dtype` and `merged` are of GGUF files, `adapter_format` and `parameters` of Ollama; `prompts` is a file for the
    comparison of a merge.
    """

    kind: Kind
    out: Path
    dtype: str = "f16"
    merged: bool = False
    adapter_format: str = "gguf"
    parameters: Mapping[str, int | float | str] = field(default_factory=dict)
    prompts: Path | None = None
    progress: Progress | None = None


@dataclass(frozen=True, slots=True)
class Written:
    """What a writer has found out, and how what it wrote is used (empty: as the card knows)."""

    details: dict[str, Any] = field(default_factory=dict)
    use: str = ""


def _peft(study: EndedStudy, _request: Request, folder: Path, tell: Tell) -> Written:
    tell("copying the adapter")
    for name, path in walk(study.adapter).items():
        if name != CARD_FILE:
            shutil.copyfile(path, folder / name)
    return Written()


def _merged(study: EndedStudy, request: Request, folder: Path, tell: Tell) -> Written:
    return Written(_merge(study, request, folder, tell))


def _gguf(study: EndedStudy, request: Request, folder: Path, tell: Tell) -> Written:
    from fedtune.release.gguf import check_adapter, check_model, write_adapter_gguf, write_model_gguf
    from fedtune.release.gguf.numbers import check_dtype

    _refuse_classifier(study)
    check_dtype(request.dtype)
    check_adapter(study.adapter, study.base.folder)
    name = f"{study.plan.name}-{'merged' if request.merged else 'adapter'}-{request.dtype}.gguf"
    use = gguf_use(study.plan, name, merged=request.merged)
    words: dict[str, Any] = {"dtype": request.dtype, "name": study.plan.name, "progress": request.progress}
    if not request.merged:
        tell(f"writing {name}")
        file = write_adapter_gguf(study.adapter, study.base.folder, folder / name, **words)
        return Written({"notes": list(file.notes)}, use)
    check_model(study.base.folder)
    with _merged_model(study, request, tell) as (model, details):
        tell(f"writing {name}")
        file = write_model_gguf(model, folder / name, **words)
    return Written({**details, "notes": list(file.notes)}, use)


def _ollama(study: EndedStudy, request: Request, folder: Path, tell: Tell) -> Written:
    from fedtune.release.ollama import check_ollama, write_ollama

    _refuse_classifier(study)
    own: dict[str, Any] = {"style": study.plan.task.style, "parameters": request.parameters}
    own["adapter_format"] = request.adapter_format
    check_ollama(study.base.folder, study.adapter, **own)
    own |= {"dtype": request.dtype, "name": study.plan.name, "progress": request.progress}
    use = ollama_use(study.plan)
    if not request.merged:
        tell("writing the base model and the adapter")
        made = write_ollama(folder, study.base.folder, study.adapter, **own)
        return Written({"notes": list(made.notes)}, use)
    with _merged_model(study, request, tell) as (model, details):
        tell("writing the merged model")
        made = write_ollama(folder, model, None, **own)
    return Written({**details, "notes": list(made.notes)}, use)


def _merge(study: EndedStudy, request: Request, folder: Path, tell: Tell) -> dict[str, Any]:
    from fedtune.release.merge import write_merged
    from fedtune.release.parity import read_prompts

    prompts = read_prompts(request.prompts)
    parity = write_merged(study.plan, study.base, study.adapter, folder, prompts, tell)
    return {"parity": asdict(parity)}


@contextmanager
def _merged_model(study: EndedStudy, request: Request, tell: Tell) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Merge into a folder beside the release that is gone afterwards, and so is one that a killed process has left."""
    folder = request.out.with_name(f".{request.out.name}.merged")
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        yield folder, _merge(study, request, folder, tell)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _refuse_classifier(study: EndedStudy) -> None:
    if study.plan.model.head != "none":
        message = f"the study {study.plan.name} trained a classifier, whose head no GGUF file can hold"
        raise ReleaseError("classifier", message, hint="release it by --to peft, or --to merged for transformers")


WRITERS: dict[Kind, Callable[[EndedStudy, Request, Path, Tell], Written]] = {
    "peft": _peft,
    "merged": _merged,
    "gguf": _gguf,
    "ollama": _ollama,
}
