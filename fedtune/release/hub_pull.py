"""Fetches a release from the Hub: one pinned commit, verified before the folder takes its place."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from fedtune.errors import HubError, ReleaseError
from fedtune.release.files import require_free, whole_folder
from fedtune.release.hub import Hub, open_hub
from fedtune.release.hub_push import KEPT, MAIN, files_at, require_verified
from fedtune.release.verify import Verdict, verify_release

_COMMIT = re.compile(r"[0-9a-f]{40}")
_MOST_FILES = 10_000
_BOOKS = ".cache"  # where the client keeps notes beside what it fetches

Tell = Callable[[str, int], None]  # a file's name and its size in bytes, before it is fetched


@dataclass(frozen=True, slots=True)
class Pulled:
    """A verified release that is now here; `size` is in bytes."""

    folder: Path
    commit: str
    files: int
    size: int
    verdict: Verdict


def pull(
    repo: str, out: Path, revision: str | None, *, coordinator_key: str | None = None, tell: Tell = lambda *_: None
) -> Pulled:
    """Fetch a commit into a folder that is not there yet; it is there only once it verifies.

    `coordinator_key` is the key that must have signed; without it, the key in the release is believed. Nothing comes
    from or goes into the Hub's cache. Errors: `release.exists`, `hub.moving-revision`, `hub.other-commit`,
    `hub.bad-name`, `hub.no-release`, `hub.not-verified`, and those of the Hub.
    """
    require_free(out)
    hub = open_hub(to_write=False)
    with hub.talking(repo):
        commit = _pinned(hub, repo, out, revision)
        sizes = {name: file.size for name, file in files_at(hub, repo, commit).items() if name not in KEPT}
    _refuse_names(repo, sizes)
    with whole_folder(out) as partial:
        with hub.talking(repo):
            for name in sorted(sizes):
                tell(name, sizes[name])
                _fetch(hub, repo, commit, name, partial)
        shutil.rmtree(partial / _BOOKS, ignore_errors=True)
        verdict = _verified(partial, repo, commit, coordinator_key)
    return Pulled(out, commit, len(sizes), sum(sizes.values()), verdict)


def _pinned(hub: Hub, repo: str, out: Path, revision: str | None) -> str:
    """Return the commit, which a name that can move is not."""
    named = revision or MAIN
    commit = str(hub.api.model_info(repo, revision=named).sha)
    if not _COMMIT.fullmatch(named):
        message = f"{named} of {repo} is {commit} now and may be another commit tomorrow"
        hint = f"pin it: fedtune pull {repo} --out {out} --revision {commit}"
        raise HubError("moving-revision", message, hint=hint)
    if commit != named:
        raise HubError("other-commit", f"{repo} answers {named} with the commit {commit}", hint="do not use it")
    return commit


def _refuse_names(repo: str, names: dict[str, int]) -> None:
    """Refuse a repository whose files could stand outside the folder, or hide in it."""
    for name in names:
        parts = PurePosixPath(name).parts
        plain = parts and "/".join(parts) == name and "\\" not in name and ":" not in name and name.isprintable()
        if not plain or any(part.startswith(".") for part in parts):
            message = f"{repo} holds a file whose name no release has: {name!r:.80}"
            raise HubError("bad-name", message, hint="use a repository that fedtune push has filled")
    if len(names) > _MOST_FILES:
        raise HubError("bad-name", f"{repo} holds {len(names)} files, more than any release", hint="check the name")


def _fetch(hub: Hub, repo: str, commit: str, name: str, folder: Path) -> None:
    notes = str(folder / _BOOKS / "hub")
    hub.api.hf_hub_download(repo, name, revision=commit, local_dir=str(folder), cache_dir=notes)


def _verified(folder: Path, repo: str, commit: str, coordinator_key: str | None) -> Verdict:
    """Verify what was fetched; its folder is not named, because it is gone when the error is read."""
    hint = "nothing was kept; ask the coordinator for the commit and the key that signed it"
    try:
        verdict = verify_release(folder, coordinator_key=coordinator_key)
        require_verified(Path(repo), verdict)
    except ReleaseError as error:
        message = f"the commit {commit} of {repo} is no release that can be read ({error.code})"
        raise HubError("no-release", message, hint=hint) from error
    except HubError as error:
        raise HubError("not-verified", f"the commit {commit} of {error.message}", hint=hint) from None
    return verdict
