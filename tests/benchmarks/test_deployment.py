from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from benchmarks.deployment import measure, report
from benchmarks.deployment.__main__ import main
from benchmarks.deployment.payload import adapter, moved
from benchmarks.deployment.peaks import Peaks


def test_a_tiny_run_gives_every_figure(capsys: pytest.CaptureFixture[str]) -> None:
    main(["transfer", "--quick", "--format", "json"])
    result = json.loads(capsys.readouterr().out)
    (row,) = result["transfer"]
    assert (row["mebibytes"], row["peer"]) == (1, "fedtune")
    assert row["down"] + row["up"] == pytest.approx(row["seconds"])
    assert all(size > 0 for size in row["peaks"].values())
    assert row["cpu"] > 0
    assert "| 1 | fedtune |" in report.render(result)


@pytest.mark.slow
def test_a_tiny_round_gives_its_overhead(capsys: pytest.CaptureFixture[str]) -> None:
    main(["rounds", "--quick"])
    assert "| 1 | fedtune |" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("peer", ["flower", "flower --database"])
def test_stock_flower_runs_the_same_rounds(peer: str) -> None:
    found = measure.once(peer, 1, [{"mebibytes": 1, "sleep": 0.1}] * 2, 120)
    assert len(found["rounds"]) == 2
    assert all(found["peaks"][part] > 0 for part in ("link", "node", "site executor", "coordinator executor"))
    assert (found["peaks"]["disk"] > 0) == (peer == "flower --database")


def test_an_adapter_has_its_size_and_nothing_twice() -> None:
    arrays = adapter(3, seed=1)
    assert sum(array.nbytes for array in arrays.values()) == 3 * 2**20
    assert len({array.tobytes() for array in arrays.values()}) == 3
    first = arrays["layer.0000.lora_A"].copy()
    assert np.array_equal(moved(arrays, 2.0)["layer.0000.lora_A"], first + np.float32(2))
    assert arrays == {}


def test_a_peer_that_fails_is_shown_with_its_reason() -> None:
    good = {
        "rounds": [{"down": 1.0, "up": 2.0, "seconds": 3.0}],
        "cpu": 1.0,
        "peaks": dict.fromkeys(measure.SHOWN, 5.0),
    }
    mixed = measure._medians([good, "it broke"], measure._last)
    assert (mixed["seconds"], mixed["failed"]) == (3.0, ["it broke"])
    rows = [{"mebibytes": 1, "peer": "a", **mixed}, {"mebibytes": 1, "peer": "b", "failed": ["it broke"]}]
    text = report.render({"machine": {}, "transfer": rows})
    assert "| 1.0 (1 failed) |" in text
    assert "| failed: it broke |" in text


def test_peaks_are_those_of_processes_and_their_children(tmp_path: Path) -> None:
    script = tmp_path / "grower"
    script.write_text("body = b'x' * 50_000_000\nimport time\ntime.sleep(30)\n")
    words = [sys.executable, "-c", f"import subprocess, sys; subprocess.run([sys.executable, {str(script)!r}])"]
    parent = subprocess.Popen(words, start_new_session=True)
    try:
        with Peaks({parent.pid: "parent"}, lambda: 2**20) as peaks:
            until = time.monotonic() + 20
            while peaks.mebibytes().get("grower", 0) < 48 and time.monotonic() < until:
                time.sleep(0.05)
        found = peaks.mebibytes()
    finally:
        os.killpg(parent.pid, 9)
        parent.wait()
    assert found["grower"] > 48 > found["parent"] > 1
    assert found["disk"] == 1
    assert 0 < peaks.cpu_seconds() < 20
