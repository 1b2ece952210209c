from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.aggregation.__main__ import main
from benchmarks.aggregation.kernels import report
from benchmarks.aggregation.kernels.command import LINEAR, STACKED
from fedtune.aggregation.lora.registry import ALGORITHMS, get_algorithm

ROOT = Path(__file__).parents[2]


def test_the_quick_benchmark_measures_the_mean_every_rule_and_memory() -> None:
    command = [sys.executable, "-m", "benchmarks.aggregation", "kernels", "--quick", "--format", "json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    result = json.loads(done.stdout)
    (mean,) = result["mean"]
    assert min(mean["copy_gb_s"], mean["plain_gb_s"], mean["mean_gb_s"]) > 0
    assert set(result["layer"]["seconds"]) == set(ALGORITHMS)
    assert result["layer"]["largest_difference"] < 1e-5  # the dense SVD and flexlora find the same matrix
    bounded = result["memory"]["rows"][-1]
    assert (bounded["algorithm"], bounded["most_mebibytes"]) == ("flexlora", 0)
    assert [found["spilled_mib"] for found in bounded["by_sites"].values()] == [0.75]
    text = report.render(result)
    assert "| `flexlora`, at most 0 MiB in memory | 0.125 |" in text
    assert "| SVD of the dense mean product |" in text


def test_memory_is_measured_for_every_rule_under_its_kind() -> None:
    assert {name: name in LINEAR for name in [*LINEAR, *STACKED]} == {
        name: get_algorithm(name).traits.linear for name in ALGORITHMS
    }


@pytest.mark.parametrize(("words", "status"), [([], 2), (["kernel"], 2), (["--help"], 0)])
def test_an_unknown_subcommand_names_those_there_are(
    words: list[str], status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == status
    assert "kernels" in capsys.readouterr().out
