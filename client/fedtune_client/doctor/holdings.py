"""Base models and data sets: are they there, and are they what was allowed and granted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from fedtune.data.fingerprint import fingerprint
from fedtune.errors import DataError, ModelError
from fedtune_client.doctor.finding import Finding, Level, Subject, failure
from fedtune_client.facts import FILE_NAME, open_table
from fedtune_client.machine import open_model
from fedtune_client.policy.schema import Policy

_SHOWN = 12
_PLAIN = ("data.missing-file", "data.not-a-file", "data.changed")  # what they say holds no record


def models(subject: Subject) -> Iterator[Finding]:
    """Whether each base model can be opened, with a content that the policy allows."""
    policy = None if subject.seen is None else subject.seen.policy
    allowed = _allowed(policy)
    found = set()
    if not subject.facts.models:
        yield Finding("base models", "warn", "site.yaml names none", f"name their folders under models: in {FILE_NAME}")
    for name in subject.facts.models:
        check = f"base model {name}"
        try:
            base = open_model(subject.facts, name)
        except ModelError as error:
            yield failure(check, error)
            continue
        found.add(base.sha256)
        if allowed is None or base.sha256 in allowed:
            yield Finding(check, "ok", f"{base.architecture}, content {base.sha256[:_SHOWN]}…, as the policy allows")
        else:
            hint = f"if it is the right one, add sha256: {base.sha256} to models: in policy.yaml and adopt it"
            yield Finding(check, "warn", f"no policy in force allows its content {base.sha256[:_SHOWN]}…", hint)
    for sha256 in sorted(set(allowed or ()) - found):
        title = (allowed or {})[sha256] or "a model"
        hint = f"fetch it and name its folder under models: in {FILE_NAME}"
        yield Finding("base models", "warn", f"the policy allows {title} ({sha256[:_SHOWN]}…), which is not here", hint)


def data_sets(subject: Subject) -> Iterator[Finding]:
    """Whether each data set can be read and is what was granted; all that is told of it is its number of records."""
    if not subject.facts.data:
        yield Finding("data sets", "warn", "site.yaml names none", f"name their files under data: in {FILE_NAME}")
    for name in subject.facts.data:
        check = f"data set {name}"
        try:
            table = open_table(subject.facts, name).table
        except DataError as error:
            yield _unread(check, error)
            continue
        level, text, hint = _standing(subject, name, fingerprint(table, table.names))
        yield Finding(check, level, f"{table.rows:,} records; {text}", hint)


def _allowed(policy: Policy | None) -> Mapping[str, str] | None:
    """Return what the policy calls each content that it allows; None where it allows any."""
    if policy is None:
        return {}
    return None if policy.models == "any" else {model.sha256: model.name for model in policy.models}


def _unread(check: str, error: DataError) -> Finding:
    """Say that a file cannot be read, without quoting what is in it."""
    if error.code in _PLAIN:
        return failure(check, error)
    return Finding(check, "fail", "its file cannot be read as records", "see why: fedtune data check FILE", error.code)


def _standing(subject: Subject, name: str, found: str) -> tuple[Level, str, str]:
    if subject.seen is None:
        return "ok", "readable", ""
    state = subject.seen.state
    number = state.spending.latest(name)
    grant = f"fedtune client consent grant {name} --purpose PURPOSE"
    if number is None:
        return "warn", "never granted, so that no study uses it", grant
    if state.spending.data[number].fingerprint != found:
        return "warn", "not those that were granted, so that no study uses them", grant
    purposes = sorted({given.purpose for given in state.grants.values() if given.data == number})
    good = [purpose for purpose in purposes if state.grant_in_force(number, purpose, subject.now) is not None]
    if not good:
        return "warn", "every grant was revoked or has expired", grant
    return "ok", f"as they were granted for {', '.join(good)}", ""
