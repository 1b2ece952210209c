"""A GGUF file that is whole or absent, written one tensor at a time so that memory holds one tensor only."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fedtune.errors import ReleaseError
from fedtune.release.gguf.numbers import Dtype, byte_count, encode, quantization
from fedtune.run.files import sync_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    from gguf import GGUFWriter
    from numpy.typing import NDArray

_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """A tensor to be written: its GGUF name, NumPy shape and format, and how to get its float32 values."""

    name: str
    shape: tuple[int, ...]
    kind: Dtype
    load: Callable[[], NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class GgufFile:
    """A GGUF file that was written, its size in bytes and SHA-256; `notes` are its limits, for people to read."""

    path: Path
    size: int
    sha256: str
    tensors: int
    notes: tuple[str, ...] = ()


def write_gguf(
    path: Path,
    writer: GGUFWriter,
    tensors: Sequence[PlannedTensor],
    notes: Sequence[str] = (),
    progress: Callable[[int, int], None] | None = None,
) -> GgufFile:
    """Write metadata and tensors beside `path`, flush them to disk, then rename; a failure leaves nothing.

    Errors: `release.unwritable` names the path.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(partial, writer, tensors, progress)
        digest = _flush_and_hash(partial)
        partial.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        hint = "free some space or name another folder with --out DIR"
        raise ReleaseError("unwritable", f"{path} cannot be written ({error.strerror or error})", hint=hint) from error
    finally:
        writer.close()
        partial.unlink(missing_ok=True)
    return GgufFile(path, path.stat().st_size, digest, len(tensors), tuple(notes))


def _write(
    path: Path, writer: GGUFWriter, tensors: Sequence[PlannedTensor], progress: Callable[[int, int], None] | None
) -> None:
    import numpy as np

    for tensor in tensors:
        size = byte_count(tensor.shape, tensor.kind)
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), size, quantization(tensor.kind))
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    total, done = sum(byte_count(tensor.shape, tensor.kind) for tensor in tensors), 0
    for tensor in tensors:
        writer.write_tensor_data(encode(tensor.load(), tensor.kind, tensor.name))
        done += byte_count(tensor.shape, tensor.kind)
        if progress is not None:
            progress(done, total)
    writer.close()


def _flush_and_hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        os.fsync(file.fileno())
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
