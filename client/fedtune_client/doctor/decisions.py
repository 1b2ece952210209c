"""What the site has decided: a policy in force, budgets that are not used up, plans that wait."""

from __future__ import annotations

from collections.abc import Iterator

from fedtune_client.asked import all_asked
from fedtune_client.budget import budget as summed
from fedtune_client.doctor.finding import Level, Subject, checked
from fedtune_client.policy.reading import read_policy

Said = Iterator[tuple[Level, str, str]]
_SHOWN = 12


@checked("policy")
def policy(subject: Subject) -> Said:
    """Whether a policy is in force, and is what the operator edits."""
    if subject.seen is None:
        return
    adopted = subject.seen.state.policy
    if adopted is None:
        yield "fail", "no policy is in force, so that every plan is refused", "fedtune client policy adopt"
        return
    in_file = read_policy(subject.folder.policy_file)
    if in_file.sha256 == adopted.sha256:
        yield "ok", f"{in_file.name} ({in_file.sha256[:_SHOWN]}…) is in force, as policy.yaml has it", ""
    else:
        yield "warn", "policy.yaml is not what is in force", "fedtune client policy show; fedtune client policy adopt"


@checked("budget")
def budget(subject: Subject) -> Said:
    """Tell what is left of each data set's lifetime ε, and charges that were never finished."""
    if subject.seen is None:
        return
    for account in summed(subject.seen.state, subject.seen.policy).accounts:
        names = ", ".join(data.name for data in account.data)
        if account.problem:
            yield "fail", f"{names}: {account.problem}; nothing more is charged to it", "fedtune client budget"
            continue
        left = min((data.left for data in account.data), default=0.0)
        level: Level = "ok" if left > 0 else "warn"
        open_charges = f"; {account.open} charges were never committed" if account.open else ""
        hint = "" if left > 0 else "nothing is left to spend: see fedtune client budget"
        yield level, f"{names}: ε of at most {left:.3f} is left{open_charges}", hint


@checked("plans")
def plans(subject: Subject) -> Said:
    """Tell how many plans wait for a person."""
    if count := sum(1 for _ in all_asked(subject.folder)):
        yield "ok", f"{count} were asked for that the site took no part in", "fedtune client asked"
