"""A site's own adapter: what it trained and kept, beside what the coordinator has sent, in a folder that PEFT loads."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from fedtune.errors import ReleaseError
from fedtune.flower.messages import Standing
from fedtune.release.adapter import load_adapter
from fedtune_client.personal import export_personal
from tests.support.sites import KEY, RealSite, make_site, make_study

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> RealSite:
    """A site that has trained and measured one round of a study with `fedsa`."""
    folder = tmp_path_factory.mktemp("personal")
    keys = {"aggregation__algorithm": "fedsa", "evaluation__site_metrics": "clear", "lora__rank": 2}
    made = make_site(folder / "site", make_study(folder, **keys))
    with (made.path / "site.yaml").open("a") as file:
        file.write(f"models:\n  tiny: {made.study.bench.machine.model_folder}\n")
    made.restart().update(1)
    made.ask("evaluate", 1, standing=Standing(counted=1))
    return made


def test_the_folder_holds_the_sites_own_factor_beside_the_common_one(site: RealSite, tmp_path: Path) -> None:
    found = export_personal(site.open(), site.study.plan.name, tmp_path / "own")
    saved, sent, initial = load_adapter(tmp_path / "own"), site.study.download, site.study.bench.workspace.initial
    assert found.plan == site.study.plan
    for spec_a, spec_b in site.study.bench.workspace.layout.pairs:
        np.testing.assert_allclose(saved[spec_a.name], sent[spec_a.name], rtol=1e-6)
        assert spec_b.name not in sent
        assert not np.array_equal(saved[spec_b.name], initial[spec_b.name])


def test_the_card_states_the_epsilon_of_this_site(site: RealSite, tmp_path: Path) -> None:
    export_personal(site.open(), site.study.plan.sha256[:10], tmp_path / "own")
    card = (tmp_path / "own" / "README.md").read_text(encoding="utf-8")
    assert "The adapter of mercy alone" in card
    assert "largest ε spent by a site" in card
    assert "EXCEEDED" not in card


def test_until_it_is_exported_the_adapter_lies_sealed(site: RealSite, tmp_path: Path) -> None:
    export_personal(site.open(), site.study.plan.name, tmp_path / "own")
    own = load_adapter(tmp_path / "own")
    factor = next(array for name, array in own.items() if name.endswith("lora_B.weight"))
    everything = b"".join(path.read_bytes() for path in site.path.rglob("*") if path.is_file())
    assert factor.tobytes() not in everything


def test_a_study_that_leaves_the_site_nothing_is_named_with_those_that_do(site: RealSite, tmp_path: Path) -> None:
    with pytest.raises(ReleaseError) as caught:
        export_personal(site.open(), "another", tmp_path / "own")
    assert caught.value.code == "release.no-personal-adapter"
    assert site.study.plan.name in caught.value.message
    assert not (tmp_path / "own").exists()


def test_the_command_writes_it(site: RealSite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedtune.cli import main

    monkeypatch.setenv("FEDTUNE_VAULT_KEY", KEY.data.hex())
    words = ["client", "adapter", site.study.plan.name, "--out", str(tmp_path / "own"), "--site", str(site.path)]
    assert main(words) == 0
    assert (tmp_path / "own" / "adapter_config.json").exists()
    assert main([*words[:2], "another", *words[3:]]) == 2
