"""A SuperLink as a child: it says why it cannot start, logs as all processes do, and ends with its supervisor."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fedtune.errors import ProcessError
from fedtune.flower.environment import flower_environment
from fedtune.processes import logs
from fedtune.processes.child import ChildSpec
from fedtune.processes.supervisor import Supervisor
from tests.support.children import lives
from tests.support.federation import ROOT, Federation, wait_for

_PROGRAM = """
import json, sys
from pathlib import Path
from fedtune.processes.child import ChildSpec
from fedtune.processes.supervisor import Supervisor
name, command, environment, ready = json.loads(sys.argv[1])
Supervisor([ChildSpec(name, tuple(command), environment, Path(ready))]).run()
"""


def link(federation: Federation, **changes: Any) -> ChildSpec:
    folder = federation.folder
    settings = {
        "state": folder / "link",
        "certificate": federation.server.certificate_file,
        "key": federation.server.key_file,
        "client_authority": federation.authority.file,
        "secret": folder / "coordinator.secret",
        "ready": folder / "link.ready",
        "public_host": "127.0.0.1",
        "public_port": 0,
        "private_port": 0,
    }
    (folder / "link.json").write_text(json.dumps(settings | changes, default=str))
    environment = flower_environment(folder / "flower", os.environ)
    environment |= {"PYTHONPATH": str(ROOT), "FEDTUNE_LOG_FOLDER": str(folder / "logs")}
    command = (sys.executable, "-m", "fedtune.flower.link", str(folder / "link.json"))
    return ChildSpec("link", command, environment, folder / "link.ready")


def test_a_port_in_use_ends_the_supervisor_with_the_links_own_words(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ProcessError) as caught:
            Supervisor([link(Federation.make(tmp_path), public_port=port)]).run()
    assert caught.value.code == "process.not-started"
    expected = rf"link ended with exit code 2: cannot listen on 127.0.0.1:{port}: .* \[transport.port-in-use\]"
    assert re.fullmatch(expected, caught.value.message)
    assert caught.value.hint == "stop what listens there, or choose another port"


def test_it_ends_with_a_killed_supervisor_and_its_lines_are_in_one_log_once(tmp_path: Path) -> None:
    spec = link(Federation.make(tmp_path))
    told = json.dumps([spec.name, spec.command, dict(spec.environment), str(spec.ready)])
    supervisor = subprocess.Popen(
        [sys.executable, "-c", _PROGRAM, told], env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE
    )
    try:
        ready = tmp_path / "link.ready"
        wait_for(ready.exists)
        pid = json.loads(ready.read_text())["pid"]
        assert lives(pid)
    finally:
        supervisor.kill()
        supervisor.communicate()
    wait_for(lambda: not lives(pid))
    lines = list(logs.read(tmp_path / "logs"))
    flower = [line["message"] for line in lines if line["logger"] == "flwr"]
    assert flower
    assert len(flower) == len(set(flower))
    assert "the supervisor is gone; this process ends" in [line["message"] for line in lines]
    assert not ready.exists()
