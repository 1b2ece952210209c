from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedtune.flower.environment import SWITCHES, flower_environment
from tests.support.federation import HOOK, ROOT

# What Flower's commands do first, and how long Flower waits for an answer.
_BEGIN = """
import os, sys
if sys.argv[1] == "ours":
    from pathlib import Path
    from fedtune.flower.environment import enter
    enter(Path(sys.argv[2]))
from flwr.supercore.telemetry import EventType, event
from flwr.supercore.update_check import warn_if_flwr_update_available
warn_if_flwr_update_available(process_name="flower-superlink")
future = event(EventType.RUN_SUPERLINK_ENTER)
if future is not None:
    try:
        future.result(10)
    except Exception:
        pass
"""


def looked_up(tmp_path: Path, who: str) -> str:
    file = tmp_path / "lookups"
    environment = {name: value for name, value in os.environ.items() if name not in SWITCHES} | {
        "PYTHONPATH": os.pathsep.join([str(HOOK), str(ROOT)]),
        "FEDTUNE_LOOKUPS": str(file),
        "FLWR_HOME": str(tmp_path),
    }
    words = [sys.executable, "-c", _BEGIN, who, str(tmp_path / "home")]
    subprocess.run(words, env=environment, check=True, capture_output=True, timeout=60)
    return file.read_text() if file.exists() else ""


@pytest.mark.parametrize(("who", "quiet"), [("ours", True), ("theirs", False)])
def test_a_flower_process_of_ours_looks_nothing_up_where_a_stock_one_does(
    tmp_path: Path, who: str, quiet: bool
) -> None:
    assert (looked_up(tmp_path, who) == "") is quiet


def test_other_variables_of_flowers_do_not_reach_its_processes() -> None:
    base = {"FLWR_INTERNAL_GRPC_FLEET_API": "1", "FLWR_HOME": "/other", "FLWR_TELEMETRY_ENABLED": "1", "PATH": "/bin"}
    made = flower_environment(Path("/state"), base)
    assert {name for name in made if name.startswith("FLWR_")} == {"FLWR_HOME", *SWITCHES} - {"HF_HUB_OFFLINE"}
    assert (made["FLWR_HOME"], made["FLWR_TELEMETRY_ENABLED"], made["PATH"]) == ("/state", "0", "/bin")


def test_a_proxy_stands_on_the_way_out_and_never_on_loopback() -> None:
    made = flower_environment(Path("/state"), {"HTTPS_PROXY": "http://proxy:3128", "NO_PROXY": "intranet"})
    assert made["HTTPS_PROXY"] == "http://proxy:3128"
    assert made["NO_PROXY"].split(",") == ["intranet", "127.0.0.1", "localhost", "::1"]
