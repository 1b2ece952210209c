"""Every bad input has one error with code, place and hint, and leaves nothing half-made behind."""

from __future__ import annotations

import gzip
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.support.runs import Done, Study, command, released, summary_of
from tests.support.tiny import tiny_base

HEADER = "text,category\n"
ROWS = "".join(f"my card {n},card\nmy cash {n},cash\n" for n in range(20))


def refuse(study: Study, runs: Path, code: str, *changes: str, named: str = "") -> Done:
    """Simulate, and see one error of this code that names what was found, and no run folder."""
    for name in ("plan", "simulate"):
        done = command(name, *study.words(f"run.root={runs}", *changes))
        assert (done.code, done.out) == (2, ""), done.err
        first, last = done.err.strip().splitlines()[-2:]
        assert first.startswith(f"error[{code}]: ")
        assert named in first
        assert last.startswith("hint: ")
        assert "Traceback" not in done.err
        assert not runs.exists()
    return done


@pytest.mark.parametrize(
    ("name", "content", "code", "named"),
    [
        ("empty.csv", b"", "data.empty-file", "empty.csv"),
        ("header.csv", HEADER.encode(), "data.empty-file", "header.csv"),
        ("column.csv", b"text,kind\na,b\nc,d\n", "data.missing-column", "'category'"),
        ("one.csv", f"{HEADER}a,card\nb,card\nc,card\nd,card\n".encode(), "data.one-class", "'card'"),
        ("latin.csv", f"{HEADER}{ROWS}".encode() + b"caf\xe9,card\n", "data.not-utf8", "line 42"),
        ("blank.csv", f"{HEADER}{ROWS},card\n".encode(), "data.blank-value", "line 42"),
        ("broken.csv", f'{HEADER}a,card\n"b,card\n'.encode(), "data.broken-row", "line 3"),
        ("noise.csv.gz", b"not gzip", "data.broken-gzip", "noise.csv.gz"),
        ("torn.csv.gz", gzip.compress(f"{HEADER}{ROWS}".encode())[:-9], "data.broken-gzip", "torn.csv.gz"),
        ("table.parquet", b"PAR0", "data.not-parquet", "table.parquet"),
        ("words.doc", b"text", "data.unknown-format", "words.doc"),
        (
            "line.jsonl",
            b'{"text": "a", "category": "x"}\n{"text": "b", "category"\n',
            "data.broken-json",
            "line.jsonl, line 2",
        ),
        (
            "mixed.jsonl",
            b"".join(json.dumps({"text": t, "category": "x"}).encode() + b"\n" for t in ("a", "b", 3)),
            "data.one-class",
            "mixed.jsonl",
        ),
        (
            "types.jsonl",
            b'{"text": "a", "category": "x"}\n{"text": "b", "category": "y"}\n{"text": 3, "category": "y"}\n' * 3,
            "data.mixed-types",
            "line 3",
        ),
        (
            "labels.jsonl",
            b'{"text": "a", "category": "x"}\n{"text": "b", "category": 1}\n' * 3,
            "data.mixed-types",
            "line 2",
        ),
    ],
)
def test_a_bad_file_is_refused(study: Study, tmp_path: Path, name: str, content: bytes, code: str, named: str) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    refuse(study, tmp_path / "runs", code, f"data.path={file}", "federation.sites=2", named=named)
    assert file.read_bytes() == content


def test_a_missing_file_is_refused(study: Study, tmp_path: Path) -> None:
    refuse(study, tmp_path / "runs", "data.missing-file", "data.path=nowhere.csv", named="nowhere.csv")


@pytest.mark.parametrize(
    ("changes", "code", "named"),
    [
        (["data.text=words"], "data.missing-column", "'words'"),
        (["privacy.epsilon=0"], "privacy.epsilon", "privacy.epsilon=0"),
        (["privacy.epsilon=-3"], "privacy.epsilon", "privacy.epsilon=-3"),
        (["privacy.delta=1.5"], "privacy.delta", "1.5"),
        (["federation.sites=61"], "data.more-sites-than-records", "60 records"),
        (["federation.sites_per_round=4"], "config.sites-per-round", "federation.sites_per_round=4"),
        (
            ["data.partition.scheme=column", "data.partition.column=category"],
            "data.sites-mismatch",
            "2 values, and 3 sites",
        ),
        (["data.partition.scheme=column"], "data.no-partition-column", "column"),
        (
            ["data.partition.scheme=column", "data.partition.column=branch"],
            "data.missing-column",
            "'branch'",
        ),
        (
            ["data.partition.scheme=dirichlet", "data.partition.alpha=0.0001", "federation.sites=20"],
            "data.empty-site",
            "20 sites",
        ),
        (["data.max_tokens=129"], "model.sequence-limit", "128 positions"),
        (["lora.targets=[nothing]"], "model.no-target", "nothing"),
        (["lora.targets=[query,nothing]"], "model.no-target", "query, nothing"),
        (["run.backend=slurm"], "config.unknown-backend", "'slurm'"),
        (["aggregation.weights=[0.5,0.5]"], "aggregation.", "3"),
        (["data.labels=[card,cheque]"], "data.unknown-label", "'cash'"),
        (["model.base=./nowhere"], "model.missing-base", "nowhere"),
        (["model.base=nobody/nothing"], "model.missing-base", "nobody/nothing"),
        (["data.test=nowhere.csv"], "data.missing-file", "nowhere.csv"),
        (["data.task=causal-lm"], "data.", ""),
    ],
)
def test_a_setting_that_cannot_work_is_refused(
    study: Study, tmp_path: Path, changes: list[str], code: str, named: str
) -> None:
    if code.endswith("."):
        done = command("simulate", *study.words(f"run.root={tmp_path / 'runs'}", *changes))
        assert done.code == 2
        assert f"error[{code}" in done.err
        assert "hint: " in done.err
        assert not (tmp_path / "runs").exists()
    else:
        refuse(study, tmp_path / "runs", code, *changes, named=named)


def test_a_label_that_training_never_saw_is_refused_before_anything_is_trained(study: Study, tmp_path: Path) -> None:
    test = tmp_path / "test.csv"
    test.write_text(f"{HEADER}my card,card\nmy elephant,elephant\n")
    refuse(study, tmp_path / "runs", "data.unknown-label", f"data.test={test}", named="'elephant'")


def test_a_base_of_pickles_is_refused(study: Study, tmp_path: Path) -> None:
    base = tiny_base(tmp_path / "base")
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    refuse(study, tmp_path / "runs", "model.not-safetensors", f"model.base={base}", named="pytorch_model.bin")


@pytest.mark.parametrize("how", ["auto_map", "file"])
def test_a_base_with_its_own_code_is_refused_and_the_code_does_not_run(study: Study, tmp_path: Path, how: str) -> None:
    base, trace = tiny_base(tmp_path / "base"), tmp_path / "ran"
    (base / "modeling.py").write_text(f"open({str(trace)!r}, 'w')\n")
    if how == "auto_map":
        config = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "modeling.Model"}}))
    refuse(study, tmp_path / "runs", "model.remote-code", f"model.base={base}", named=str(base))
    assert not trace.exists()


@pytest.mark.parametrize(
    ("name", "code"), [("config.json", "model.bad-config"), ("model.safetensors", "model.bad-base")]
)
def test_a_damaged_base_is_refused(study: Study, tmp_path: Path, name: str, code: str) -> None:
    base = tiny_base(tmp_path / "base")
    (base / name).write_bytes((base / name).read_bytes()[:100])
    refuse(study, tmp_path / "runs", code, f"model.base={base}", named=str(base))


def test_a_delta_that_promises_nothing_is_a_warning_with_its_reason(study: Study, tmp_path: Path) -> None:
    done = command("simulate", *study.words("privacy.delta=0.1", f"run.dir={tmp_path / 'run'}"))
    assert done.code == 0, done.err
    assert "warning: δ = 0.1 is at least 1/N for N = 16" in done.err
    plan = command("plan", *study.words("privacy.delta=0.1"), "--format", "json").json
    assert "at least 1/N" in plan["warnings"][0]


@pytest.mark.parametrize("place", ["file", "beneath-a-file", "proc", "long"])
def test_a_run_folder_that_cannot_be_made_is_refused(study: Study, tmp_path: Path, place: str) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    run = {
        "file": file,
        "beneath-a-file": file / "run",
        "proc": Path("/proc/nothing/run"),
        "long": tmp_path / ("x" * 300),
    }[place]
    done = command("simulate", *study.words(f"run.dir={run}"))
    assert (done.code, done.out) == (2, "")
    assert f"error[run.unwritable]: {run}" in done.err
    assert "hint: " in done.err
    assert file.read_text() == "mine"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of its own, where the test may do that."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=48k", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)


def remount(disk: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", disk], check=True)


def test_a_read_only_place_is_refused(study: Study, disk: Path) -> None:
    remount(disk, "ro")
    done = command("simulate", *study.words(f"run.dir={disk / 'run'}"))
    assert done.code == 2
    assert f"error[run.unwritable]: {disk / 'run'} cannot be written (Read-only file system)" in done.err


@pytest.fixture(scope="module")
def whole(study: Study) -> Path:
    folder = study.runs / "whole"
    summary_of(*study.words("federation.rounds=3", "lora.rank=8", f"run.dir={folder}"))
    return folder


@pytest.mark.parametrize(
    "kilobytes", [4, 12, 20, 32, 48, 60, 68]
)  # full at the plan, a site, a checkpoint, the release
def test_a_full_disk_is_an_error_and_the_run_continues_once_there_is_space(
    study: Study, disk: Path, kilobytes: int, whole: Path
) -> None:
    words, run = study.words("federation.rounds=3", "lora.rank=8"), disk / "run"
    remount(disk, f"size={kilobytes}k")
    done = command("simulate", *words, f"run.dir={run}")
    assert done.code in {2, 3}
    assert ".disk-full" in done.err
    assert "hint: " in done.err
    remount(disk, "size=4m")
    if (run / "plan.json").exists():
        assert command("simulate", "--resume", str(run)).code == 0
    else:
        assert command("simulate", *words, f"run.dir={run}").code == 0
    assert released(run) == released(whole)


def test_records_that_changed_since_the_run_began_stop_a_resume(study: Study, tmp_path: Path) -> None:
    from fedtune.simulation.sites import dealt

    file, run = tmp_path / "own.csv", tmp_path / "run"
    file.write_bytes(study.data.read_bytes())
    words = study.words(f"data.path={file}", f"run.dir={run}")
    summary_of(*words)
    (run / "summary.json").unlink()
    (run / "checkpoints" / "round-000002.safetensors").unlink()
    file.write_text(file.read_text().replace("my card", "my old card", 1))
    dealt.cache_clear()  # a later command is a process of its own
    done = command("simulate", "--resume", str(run))
    assert done.code == 3
    assert "consent.other-data" in done.err


@pytest.mark.parametrize("damage", ["cut", "empty", "noise"])
def test_a_damaged_checkpoint_is_an_error_that_says_how_to_go_on(study: Study, tmp_path: Path, damage: str) -> None:
    run = tmp_path / "run"
    summary_of(*study.words(f"run.dir={run}"))
    before = released(run)
    (run / "summary.json").unlink()
    newest = run / "checkpoints" / "round-000002.safetensors"
    content = newest.read_bytes()
    noise = np.random.default_rng(0).bytes(len(content))
    newest.write_bytes({"cut": content[:-10], "empty": b"", "noise": noise}[damage])
    done = command("simulate", "--resume", str(run))
    assert done.code == 2
    assert "error[run.damaged]" in done.err
    assert "remove round-000002.safetensors" in done.err
    newest.unlink()
    assert command("simulate", "--resume", str(run)).code == 0
    assert released(run) == before
