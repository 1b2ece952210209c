"""What a site keeps for itself lies in its vault, encrypted, and nowhere else; uncounted rounds leave nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fedtune_client.memory import KeptTensors
from fedtune_client.vault import Key, Vault
from tests.support.whole import Federation, Workshop, workshop

PLAN = "a" * 64
LONG_ENOUGH = 16  # bytes of a tensor that no other file holds by chance


@pytest.fixture
def kept(tmp_path: Path) -> KeptTensors:
    key = tmp_path / "key"
    key.write_bytes(b"ab" * 32)
    key.chmod(0o600)
    return KeptTensors(Vault.create(tmp_path / "vault", Key.from_file(key)), PLAN)


def factor(value: float) -> dict[str, np.ndarray]:
    return {"x.lora_B.weight": np.full((3, 2), value, np.float32)}


def found(kept: KeptTensors, counted: int) -> float | None:
    state = kept.after(counted)
    return float(state["x.lora_B.weight"][0, 0]) if state else None


def test_before_the_first_counted_round_there_is_nothing(kept: KeptTensors) -> None:
    assert found(kept, 0) is None
    kept.keep(1, 0, factor(1))
    assert found(kept, 0) is None
    assert kept.at(2) == {}


def test_a_round_starts_from_the_last_that_was_counted(kept: KeptTensors) -> None:
    kept.keep(1, 0, factor(1))
    kept.keep(2, 1, factor(2))  # never counted
    kept.keep(4, 1, factor(4))
    assert [found(kept, counted) for counted in (1, 4)] == [1, 4]


def test_a_round_that_is_trained_again_replaces_what_it_left(kept: KeptTensors) -> None:
    kept.keep(3, 2, factor(3))
    kept.keep(3, 2, factor(3.5))
    assert found(kept, 3) == 3.5


def test_a_coordinator_that_goes_back_two_rounds_finds_their_start(kept: KeptTensors) -> None:
    """It keeps two checkpoints, so the oldest round that it can ask for again is the one after the older of them."""
    for number in range(1, 8):
        kept.keep(number, number - 1, factor(number))
    assert [found(kept, number) for number in (5, 6, 7)] == [5, 6, 7]


def test_what_nobody_can_ask_for_again_is_removed_and_what_is_not_counted_yet_stays(kept: KeptTensors) -> None:
    for number in range(1, 20):
        kept.keep(number, number - 1, factor(number))
    assert len(kept.vault.names()) <= 4
    kept.keep(20, 10, factor(20))
    assert found(kept, 19) == 19


def test_a_site_whose_updates_never_count_does_not_fill_its_disk(kept: KeptTensors) -> None:
    kept.keep(1, 0, factor(1))
    for number in range(2, 30):
        kept.keep(number, 1, factor(number))
    assert len(kept.vault.names()) <= 5
    assert found(kept, 1) == 1


def test_a_coordinator_that_goes_back_before_uncounted_rounds_finds_what_it_asks_for_now(kept: KeptTensors) -> None:
    for number in (4, 5, 6, 7):
        kept.keep(number, 3, factor(number))
    kept.keep(4, 3, factor(4.5))
    assert found(kept, 4) == 4.5


def test_another_study_keeps_its_own(kept: KeptTensors) -> None:
    other = KeptTensors(kept.vault, "b" * 64)
    kept.keep(1, 0, factor(1))
    other.keep(1, 0, factor(2))
    assert (found(kept, 1), found(other, 1)) == (1, 2)


def test_tensors_come_back_bit_for_bit_whatever_their_order_in_memory(kept: KeptTensors) -> None:
    turned = np.arange(6, dtype=np.float32).reshape(2, 3).T
    kept.keep(1, 0, {"x": turned, "bytes": np.frombuffer(b"payload", np.uint8)})
    assert np.array_equal(kept.at(1)["x"], turned)
    assert kept.at(1)["bytes"].tobytes() == b"payload"


def test_nothing_to_keep_leaves_no_item(kept: KeptTensors) -> None:
    kept.keep(1, 0, {})
    assert not kept.vault.names()


# --- in a study -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kept")


@pytest.fixture
def shop(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workshop:
    return workshop(tmp_path, monkeypatch, shared=folder)


def in_clear(study: Federation, tensors: dict[str, np.ndarray]) -> list[str]:
    """Return the files of the study in which a part of one of these tensors stands as it is."""
    needles = [
        raw[start : start + LONG_ENOUGH]
        for array in tensors.values()
        if np.any(array)
        for raw in (np.ascontiguousarray(array).tobytes(),)
        for start in range(0, len(raw) - LONG_ENOUGH + 1, LONG_ENOUGH)
        if any(raw[start : start + LONG_ENOUGH])
    ]
    assert needles
    files = [path for path in study.machine.run.rglob("*") if path.is_file()]
    return [str(path.relative_to(study.machine.run)) for path in files if any(n in path.read_bytes() for n in needles)]


@pytest.mark.parametrize(
    ("words", "mine"),
    [
        (["aggregation.algorithm=fedsa"], "lora_B"),
        (["aggregation.local_head=true", "training.head_learning_rate=5"], "head.weight"),
        (["training.variates=scaffold"], "own-variate/"),
        (["aggregation.upload=int4", "aggregation.upload_keep=0.1", "aggregation.error_feedback=true"], "residual/"),
        (["aggregation.algorithm=fedask"], "part-payload"),
        (["aggregation.algorithm=fedask", "privacy.noise=secure"], "part-payload"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_no_file_of_the_study_holds_it_in_clear(shop: Workshop, words: list[str], mine: str) -> None:
    study = shop.make(*words, "federation.rounds=2")
    study.run()
    for number in (1, 2):
        own = {name: array for name, array in study.kept_at("site-001", number).items() if mine in name}
        if mine == "part-payload":  # what is in it that is not sent
            trained = study.trained_in(number)["site-001"].state
            own = {name: trained[name] for name in trained if "lora_B" in name}
        assert own
        assert in_clear(study, own) == []


def test_what_a_coordinator_has_sent_does_lie_there_so_the_test_above_can_fail(shop: Workshop) -> None:
    study = shop.make("aggregation.algorithm=rolora", "federation.rounds=2")
    study.run()
    sent = {name: array for name, array in study.trained_in(2)["site-001"].start.items() if "lora_B" in name}
    assert any("received-" in name for name in in_clear(study, sent))


def test_a_vault_that_was_changed_is_noticed_and_the_site_takes_no_part(shop: Workshop) -> None:
    study = shop.make("aggregation.algorithm=fedsa", "federation.rounds=2")

    def meddle(letter: object) -> None:
        if (letter.kind, letter.number, letter.site) == ("train", 2, "site-001"):  # type: ignore[attr-defined]
            (name,) = study.kept_names("site-001")
            (path,) = [one for one in (study.sites / "site-001" / "vault").rglob(f"*{name}*") if one.is_file()]
            data = bytearray(path.read_bytes())
            data[-1] ^= 1
            path.write_bytes(bytes(data))

    study.meddle = meddle
    study.run()
    assert study.lines()[1]["failed"].keys() == {"site-001"}
    assert study.lines()[1]["failed"]["site-001"].startswith("vault.")
