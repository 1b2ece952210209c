"""Reading a journal: how long a whole check takes and how much memory, in a process that does nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.journal.records import write_journal


def measured(folder: Path, records: int) -> dict[str, Any]:
    """Write a journal of so many records and return seconds, memory and bytes of checking it."""
    path = folder / "long.journal"
    started = time.perf_counter()
    key = write_journal(path, records)
    written = time.perf_counter() - started
    sizes: Counter[str] = Counter()
    with path.open("rb") as file:
        for line in list(_first(file, 6)):
            sizes[json.loads(line)["body"]["kind"]] = len(line)
    found = subprocess.run(
        [sys.executable, "-m", "benchmarks.journal.reading", str(path), key],
        capture_output=True,
        text=True,
        check=True,
    )
    result: dict[str, Any] = json.loads(found.stdout.splitlines()[-1])
    return {**result, "records": records, "bytes": path.stat().st_size, "written_s": written, "sizes": dict(sizes)}


def _first(lines: Any, count: int) -> Any:
    for _, line in zip(range(count), lines, strict=False):
        yield line


def main(path: Path, key: str) -> None:
    """Check one journal and print what it took."""
    from fedtune.journal.verify import verify

    before = _peak()
    started, used = time.perf_counter(), time.process_time()
    verdict = verify(path, public_key=key)
    seconds, processor = time.perf_counter() - started, time.process_time() - used
    if verdict.outcome != "intact":
        raise SystemExit(f"the journal is {verdict.outcome}: {verdict.reason}")
    print(json.dumps({"seconds": seconds, "cpu_s": processor, "grown_kb": _peak() - before, "imports_kb": before}))


def _peak() -> int:
    """Return the most kB that were resident since this program began (`getrusage` also counts its parent's)."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
