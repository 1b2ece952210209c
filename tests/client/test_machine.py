"""A plan's base model is found by its content, whatever plan and site call it."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING

import pytest

from fedtune.errors import ConfigError, ModelError
from fedtune_client.machine import base_of, device_of, machine_of
from tests.support.opens import opened_files
from tests.support.sites import RealSite, make_site, make_study

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def site(tmp_path: Path) -> RealSite:
    return make_site(tmp_path / "site", make_study(tmp_path), granted=False)


def write(site: RealSite, models: dict[str, str], *lines: str) -> None:
    named = [f"  {name}: {folder}" for name, folder in models.items()]
    text = ["name: mercy", *(["models:"] if named else []), *named, *lines]
    (site.path / "site.yaml").write_text("\n".join(text) + "\n")


def other_content(base: str, to: Path) -> str:
    shutil.copytree(base, to)
    config = to / "config.json"
    config.write_text(config.read_text().replace('"hidden_size": 16', '"hidden_size": 16 '))
    (to / "vocab.txt").write_text("another\n")
    return str(to)


def test_a_model_is_found_by_its_content_under_any_name(site: RealSite, tmp_path: Path) -> None:
    base = site.study.bench.machine.model_folder
    write(site, {"first": other_content(base, tmp_path / "other"), "second": base}, "threads: 3", "device: cpu")
    found = machine_of(site.study.plan, site.folder)
    assert (found.model_folder, found.threads, found.device) == (base, 3, "cpu")
    assert found.data_path is None


def test_a_model_that_is_called_right_and_holds_something_else_is_not_taken(site: RealSite, tmp_path: Path) -> None:
    base, plan = site.study.bench.machine.model_folder, site.study.plan
    write(site, {plan.model.name: other_content(base, tmp_path / plan.model.name / "x")})
    with pytest.raises(ModelError) as refused:
        base_of(plan.model, site.folder.facts())
    assert refused.value.code == "model.not-here"
    assert plan.model.sha256 in refused.value.message
    assert plan.model.name in refused.value.message
    assert "site.yaml" in refused.value.hint


def test_a_folder_that_is_no_model_does_not_hide_the_others(site: RealSite, tmp_path: Path) -> None:
    base = site.study.bench.machine.model_folder
    write(site, {"a-missing": str(tmp_path / "nowhere"), "b-empty": str(site.path), "package": "package:no_such_one"})
    with pytest.raises(ModelError) as refused:
        base_of(site.study.plan.model, site.folder.facts())
    assert refused.value.message.count("cannot be used") == 3
    write(site, {"a-missing": str(tmp_path / "nowhere"), "encoder": base})
    assert str(base_of(site.study.plan.model, site.folder.facts()).folder) == base


def test_the_weights_are_read_once_a_process_until_they_change(site: RealSite, tmp_path: Path) -> None:
    own = shutil.copytree(site.study.bench.machine.model_folder, tmp_path / "own")
    write(site, {"own": str(own)})

    def weights_read() -> int:
        with opened_files() as opened:
            base_of(site.study.plan.model, site.folder.facts())
        return sum(path.endswith(".safetensors") for path in opened)

    assert (weights_read(), weights_read()) == (1, 0)
    (own / "vocab.txt").write_text("another\n")
    with pytest.raises(ModelError):
        base_of(site.study.plan.model, site.folder.facts())


def test_a_gpu_that_is_not_there_is_said(site: RealSite) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    write(site, {}, "device: cuda")
    with pytest.raises(ConfigError) as refused:
        device_of(site.folder.facts())
    assert refused.value.code == "config.no-cuda"
    write(site, {}, "device: auto")
    assert device_of(site.folder.facts()) == "cpu"


@pytest.mark.parametrize(
    ("said", "threads"), [("3", 3), ("0", os.cpu_count()), ("", os.cpu_count()), ("all", os.cpu_count())]
)
def test_a_site_computes_with_as_many_threads_as_its_machine_says(
    site: RealSite, monkeypatch: pytest.MonkeyPatch, said: str, threads: int
) -> None:
    write(site, {"first": site.study.bench.machine.model_folder}, "device: cpu")
    monkeypatch.setenv("OMP_NUM_THREADS", said)
    assert machine_of(site.study.plan, site.folder).threads == threads
