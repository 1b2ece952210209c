"""What all runs share: the fixed train and test parts of BANKING77, and a MiniLM of two layers."""

from __future__ import annotations

import csv
import json
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks.simulation.data import banking77

Record = dict[str, str]
TEST_RECORDS_A_CLASS: Final = 6
TRAIN_RECORDS: Final = 4000
KEPT_LAYERS: Final = (0, 5)
_SPLIT_SEED: Final = 0
_LAYER: Final = "encoder.layer."


@dataclass(frozen=True, slots=True)
class Material:
    """Where the parts and the base model are."""

    train: Path
    test: Path
    base: Path

    @property
    def words(self) -> tuple[str, ...]:
        """The overrides that name them; the last layer alone is adapted."""
        return (
            f"data.path={self.train}",
            f"data.test={self.test}",
            f"model.base={self.base}",
            f"lora.layers=[{len(KEPT_LAYERS) - 1}]",
        )


def prepared(folder: Path) -> Material:
    """Write what is missing in a folder."""
    made = Material(folder / "train.csv", folder / "test.csv", folder / f"minilm-{len(KEPT_LAYERS)}-layers")
    if not made.test.exists():
        train, test = split(_read(banking77()))
        _write(made.train, train)
        _write(made.test, test)
    if not (made.base / "config.json").exists():
        _cut(_minilm(), made.base)
    return made


def split(records: list[Record]) -> tuple[list[Record], list[Record]]:
    """Return shuffled records to train on, and a test part with the same number of each class."""
    drawn = random.Random(_SPLIT_SEED)
    shuffled = drawn.sample(records, len(records))
    seen: dict[str, int] = {}
    train: list[Record] = []
    test: list[Record] = []
    for record in shuffled:
        seen[record["category"]] = seen.get(record["category"], 0) + 1
        (test if seen[record["category"]] <= TEST_RECORDS_A_CLASS else train).append(record)
    return train[:TRAIN_RECORDS], test


def _read(path: Path) -> list[Record]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _write(path: Path, records: list[Record]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["text", "category"])
        writer.writeheader()
        writer.writerows(records)


def _minilm() -> Path:
    from fedtune.config.schema import ModelSettings
    from fedtune.model.base import find_base

    return find_base(ModelSettings()).folder


def _cut(source: Path, folder: Path) -> None:
    """Copy a BERT without the layers that are not kept; its configuration is written last."""
    from safetensors.numpy import load_file, save_file

    folder.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if path.suffix in {".json", ".txt"} and path.name != "config.json":
            shutil.copy(path, folder)
    tensors = {new: tensor for name, tensor in load_file(_weights(source)).items() if (new := _renamed(name))}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config["num_hidden_layers"] = len(KEPT_LAYERS)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def _weights(source: Path) -> Path:
    return next(source.glob("*.safetensors"))


def _renamed(name: str) -> str | None:
    """Return a tensor's name in the shorter model, None for one of a layer that is left out."""
    if _LAYER not in name:
        return name
    before, _, after = name.partition(_LAYER)
    number, _, rest = after.partition(".")
    return f"{before}{_LAYER}{KEPT_LAYERS.index(int(number))}.{rest}" if int(number) in KEPT_LAYERS else None
