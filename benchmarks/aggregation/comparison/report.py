"""The figures as Markdown: one table for each condition, and the bytes curve; imports nothing heavy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from statistics import mean, median, stdev
from typing import Any, Final

from benchmarks.aggregation.comparison.runs import BASELINE, FAMILIES, PARTITIONS, PRIVACY, UPLOADS, Run, Upload

Line = dict[str, Any]
Lines = Mapping[Run, Line]
_NAMES: Final = {"dirichlet": "Dirichlet 0.3", "iid": "IID", "off": "no privacy", "dp": "ε = 8"}
_GOAL: Final = 1 / 8
_HEAD: Final = ["", "test part", "held out at the sites", "up, kB", "down, kB", "coordinator, ms", "seeds"]
_CURVE: Final = ["", "up", "down", "test part", "held out at the sites", "kB up", "seeds"]


def render(lines: Lines, asked: int) -> str:
    """Return the tables of the runs that have ended."""
    tables = [_condition(lines, partition, privacy) for partition in PARTITIONS for privacy in PRIVACY]
    curve = _curve(lines)
    return "\n\n".join([_done(lines, asked), *(table for table in tables if table), *([curve] if curve else [])])


def _done(lines: Lines, asked: int) -> str:
    if not lines:
        return f"None of {asked} runs has ended."
    seconds = [line["cpu_seconds"] for line in lines.values()]
    failed = sum(line["failed"] for line in lines.values())
    before = mean(line["test_accuracy_before"] for line in lines.values() if line["test_accuracy_before"] is not None)
    spent = max((line["epsilon"] or 0 for line in lines.values()), default=0)
    return (
        f"{len(lines)} of {asked} runs, {median(seconds):.1f} CPU seconds each in the median; replies that failed: "
        f"{failed}. Accuracy before training {before:.3f}; the most that was spent is ε = {spent:.3f}."
    )


def _condition(lines: Lines, partition: str, privacy: str) -> str:
    rows = []
    for algorithm in FAMILIES:
        found = _of(lines, lambda run, name=algorithm: run == Run(name, partition, privacy, run.seed))  # type: ignore[misc]
        if found:
            milliseconds = 1000 * min(line["merging_seconds"] for line in found)
            costs = [_kilobytes(found, "bytes_up"), _kilobytes(found, "bytes_down"), f"{milliseconds:.1f}"]
            rows.append([f"`{algorithm}`", *_accuracies(found), *costs, str(len(found))])
    return f"{_NAMES[partition]}, {_NAMES[privacy]}:\n\n{_table(_HEAD, rows)}" if rows else ""


def _curve(lines: Lines) -> str:
    """Return accuracy by bytes, as shares of the baseline's, fewest first."""
    settings = {setting: _setting(lines, *setting) for setting in UPLOADS}
    ended = {setting: found for setting, found in settings.items() if found}
    if BASELINE not in ended or len({upload for _, upload in ended}) == 1:
        return ""
    base = ended[BASELINE]
    ordered = sorted(ended.items(), key=lambda item: mean(line["bytes_up"] for line in item[1]))
    rows = [
        [
            f"`{algorithm}` {upload}",
            *(f"{_mean(found, way) / _mean(base, way):.3f}" for way in ("bytes_up", "bytes_down")),
            *_accuracies(found),
            _kilobytes(found, "bytes_up"),
            str(len(found)),
        ]
        for (algorithm, upload), found in ordered
    ]
    about = f"Bytes as shares of `fedit` fp32, {_NAMES['dirichlet']}, {_NAMES['off']}:"
    return "\n\n".join([about, _table(_CURVE, rows), best(ended)])


def best(ended: Mapping[tuple[str, Upload], list[Line]]) -> str:
    """Return the best setting that uploads at most an eighth of the baseline, and whether it holds its accuracy.

    Both accuracies have to be within one standard deviation of the seeds below the baseline's, or above.
    """
    base = ended[BASELINE]
    small = {key: found for key, found in ended.items() if _mean(found, "bytes_up") <= _GOAL * _mean(base, "bytes_up")}
    if not small:
        return "No setting uploads at most 1/8."
    (algorithm, upload), found = max(small.items(), key=lambda item: _mean(item[1], "site_accuracy"))
    holds = all(
        _mean(found, metric) >= _mean(base, metric) - _spread(base, metric)
        for metric in ("test_accuracy", "site_accuracy")
    )
    share = _mean(found, "bytes_up") / _mean(base, "bytes_up")
    verdict = "within the seeds' spread of `fedit` fp32, or above it" if holds else "below `fedit` fp32's spread"
    return f"Best of at most 1/8 of the upload: `{algorithm}` {upload}, at {share:.3f} of it, {verdict}."


def _setting(lines: Lines, algorithm: str, upload: Upload) -> list[Line]:
    return _of(lines, lambda run: run == Run(algorithm, "dirichlet", "off", run.seed, upload))


def _of(lines: Lines, wanted: Callable[[Run], bool]) -> list[Line]:
    return [line for run, line in lines.items() if wanted(run)]


def _accuracies(found: list[Line]) -> list[str]:
    return [_plus_minus([line[metric] for line in found]) for metric in ("test_accuracy", "site_accuracy")]


def _plus_minus(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    return f"{mean(known):.3f} ± {stdev(known):.3f}" if len(known) > 1 else f"{mean(known):.3f}"


def _mean(found: Iterable[Line], metric: str) -> float:
    return mean(float(line[metric]) for line in found)


def _spread(found: list[Line], metric: str) -> float:
    return stdev(line[metric] for line in found) if len(found) > 1 else 0.0


def _kilobytes(found: list[Line], way: str) -> str:
    return f"{_mean(found, way) / 1000:,.0f}"


def _table(head: list[str], rows: list[list[str]]) -> str:
    marks = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, marks, *rows))
