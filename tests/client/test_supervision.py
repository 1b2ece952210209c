"""What a site's processes are given: files in memory, an environment without secrets, a certificate that is renewed."""

from __future__ import annotations

import json
import os
import socket
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest

from fedtune.errors import EnrolmentError, ProcessError
from fedtune.flower.node import read_node_key
from fedtune.pki.keys import node_text
from fedtune_client import supervision
from fedtune_client.folder import SiteFolder, open_site_folder
from tests.support.enrolments import FEDERATION, KEY, Coordinator, Now, Site, enrol
from tests.support.runs import command

SECRETS = {
    "FEDTUNE_VAULT_PASSPHRASE": "correct horse",
    "FEDTUNE_VAULT_KEY": "00" * 32,
    "FEDTUNE_VAULT_KEY_FILE": "vault.key",
    "FEDTUNE_EXPORT_PASSPHRASE": "another",
    "FEDTUNE_AUTHORITY_PASSPHRASE": "a coordinator's on the same machine",
    "FEDTUNE_MACHINE": "a/simulation.json",
    "FLWR_TELEMETRY_ENABLED": "1",
}


@pytest.fixture
def coordinator(tmp_path: Path) -> Coordinator:
    return Coordinator(tmp_path / "coordinator", Now(datetime.now(UTC)))


@pytest.fixture
def site(tmp_path: Path, coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch) -> Site:
    memory = tmp_path / "memory"
    memory.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(memory))
    made = Site.make(tmp_path / "site", "mercy", coordinator.now)
    enrol(coordinator, made)
    return made


def settings(ours: supervision.Running, number: int) -> dict[str, object]:
    spec = ours.supervisor._children[number].spec
    return dict(json.loads(Path(spec.command[-1]).read_bytes()))


def test_the_node_gets_the_sites_credentials_as_files_that_end_with_the_block(
    site: Site, coordinator: Coordinator
) -> None:
    with supervision.running(site.open, FEDERATION, KEY) as ours:
        node = settings(ours, 0)
        assert node["coordinator"] == site.credentials.address
        assert Path(str(node["key"])).read_bytes() == site.credentials.tls_key
        node_key = read_node_key(Path(str(node["node_key"]))).public_key()
        assert node_text(node_key) == coordinator.enrolment.members[0].grant.node_key
        folder = Path(str(node["key"])).parent
        assert stat.S_IMODE(Path(str(node["key"])).stat().st_mode) == 0o600
        assert settings(ours, 1)["port"] == node["runtime_port"] != 0
        assert stat.S_ISFIFO(Path(str(settings(ours, 1)["unlock"])).stat().st_mode)
    assert not folder.exists()
    assert not (site.open.folder.run / "up.json").exists()


def test_no_child_has_a_secret_or_a_simulation_in_its_environment(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    with supervision.running(site.open, FEDERATION, KEY) as ours:
        for child in ours.supervisor._children:
            found = child.spec.environment
            assert not set(SECRETS) - {"FLWR_TELEMETRY_ENABLED"} & set(found)
            assert found["FLWR_TELEMETRY_ENABLED"] == "0"
            assert found["HF_HUB_OFFLINE"] == "1"
            assert not [word for word in child.spec.command if KEY.data.hex() in word]


def test_it_is_not_ready_before_its_processes_are_and_says_where_its_health_is(site: Site) -> None:
    with supervision.running(site.open, FEDERATION, KEY) as ours:
        answer = httpx.get(ours.health, trust_env=False)
        assert answer.status_code == 503
        assert answer.json()["parts"] == {"node": "waiting", "executor": "waiting"}
        told = supervision.told(site.open.folder)
        assert told is not None
        assert (told["pid"], f":{told['health']}/" in ours.health) == (os.getpid(), True)
    assert supervision.told(site.open.folder) is None
    assert supervision.told(SiteFolder(Path("nowhere"))) is None


def test_one_process_runs_a_folder_at_a_time(site: Site) -> None:
    with supervision.running(site.open, FEDERATION, KEY):
        with pytest.raises(ProcessError) as refused, supervision.running(site.open, FEDERATION, KEY):
            pass
        assert refused.value.code == "process.running"
    with supervision.running(site.open, FEDERATION, KEY):
        pass


def test_a_certificate_that_has_expired_starts_nothing(tmp_path: Path, site: Site) -> None:
    early = Coordinator(tmp_path / "early", Now(datetime.now(UTC) - timedelta(days=400)), "banks-0011223344556677")
    old = Site.make(tmp_path / "old", "mercy", early.now)
    old.accept(early.approve(old.answer(early.invite("mercy"))), early.federation)
    with pytest.raises(EnrolmentError) as refused, supervision.running(old.open, early.federation, KEY):
        pass
    assert refused.value.code == "enrolment.certificate-expired"


def test_a_renewed_certificate_is_put_where_the_node_finds_it(site: Site, coordinator: Coordinator) -> None:
    with supervision.running(site.open, FEDERATION, KEY) as ours:
        place = Path(str(settings(ours, 0)["certificate"]))
        before = place.read_text()
        coordinator.now.later(minutes=1)
        site.accept(coordinator.approve(site.renew()))
        ours.keep_up()
        assert place.read_text() == site.credentials.certificate != before


def test_a_certificate_that_is_due_is_said_once_a_day(
    tmp_path: Path, site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    early = Coordinator(tmp_path / "early", Now(datetime.now(UTC) - timedelta(days=300)), "banks-0011223344556677")
    old = Site.make(tmp_path / "old", "mercy", early.now)
    old.accept(early.approve(old.answer(early.invite("mercy"))), early.federation)
    with supervision.running(old.open, early.federation, KEY) as ours:
        ours.keep_up()
        ours.keep_up()
    assert len([record for record in caplog.records if "the certificate ends on" in record.message]) == 1


def test_a_port_that_is_taken_is_said(site: Site) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        (site.open.folder.path / "site.yaml").write_text(f"name: mercy\nhealth_port: {taken.getsockname()[1]}\n")
        again = open_site_folder(site.open.folder, KEY)
        with pytest.raises(ProcessError) as refused, supervision.running(again, FEDERATION, KEY):
            pass
    assert refused.value.code == "process.port-in-use"


def test_a_site_that_has_joined_nothing_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDTUNE_VAULT_KEY", KEY.data.hex())
    Site.make(tmp_path / "site", "mercy", Now(datetime.now(UTC)))
    done = command("client", "up", "--site", str(tmp_path / "site"))
    assert (done.code, done.out) == (2, "")
    assert "error[enrolment.not-enrolled]" in done.err
    assert "fedtune client init --invitation FILE" in done.err
