from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from benchmarks.simulation import report

ROOT = Path(__file__).parents[2]


def test_the_quick_benchmark_measures_every_site_of_every_round() -> None:
    command = [sys.executable, "-m", "benchmarks.simulation", "--quick", "--format", "json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    result = json.loads(done.stdout)
    (row,) = result["trivial"]["rows"]
    assert row["sites"] == 20
    assert row["inprocess"]["ms_a_site"] > 0
    assert result["trivial"]["ray_skipped"] == "--no-ray"
    assert "real" not in result
    table = report.render(result, "markdown")
    assert "| 20 |" in table
    assert "Ray left out: --no-ray" in table
