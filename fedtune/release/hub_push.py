"""Puts a release on the Hub: verified, private unless said otherwise, in one commit that holds it and nothing else."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedtune.config.plan import StudyPlan
from fedtune.errors import HubError
from fedtune.release.files import file_sha256, walk
from fedtune.release.hub import Hub, open_hub
from fedtune.release.verify import Verdict, verify_release

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoFile

    from fedtune.release.manifest import Manifest

MAIN = "main"
_REPOSITORY = re.compile(r"[\w][\w.-]{0,95}/[\w][\w.-]{0,95}", re.ASCII)
KEPT = frozenset({".gitattributes"})  # the Hub's own file: which files it stores apart


@dataclass(frozen=True, slots=True)
class Pushed:
    """Where a release is now: `commit` is what to pin, `size` is in bytes."""

    repo: str
    commit: str
    branch: str
    private: bool
    files: int
    size: int


@dataclass(frozen=True, slots=True)
class Upload:
    """What is to be published: a verified release and what the repository is to be."""

    folder: Path
    manifest: Manifest
    files: Mapping[str, Path]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(path.stat().st_size for path in self.files.values())


def prepare(folder: Path, *, not_private: bool) -> Upload:
    """Check a folder before anything leaves this machine.

    Errors: those of `verify_release`, `hub.not-verified`, and `hub.not-private` for a study without privacy or with
    seeded noise, unless `not_private` says that this is known.
    """
    verdict = verify_release(folder)
    manifest = require_verified(folder, verdict)
    promise = StudyPlan.from_json(manifest.plan).promise
    why = {"off": "was trained without privacy"}.get(promise.mode) or {
        "seeded": "has noise from a seeded generator, which anybody can draw again"
    }.get(promise.noise)
    if why and not not_private:
        hint = "train with privacy.noise=secure; or publish it as what it is with --not-private"
        raise HubError("not-private", f"{folder} {why}: what it learnt from records is not protected", hint=hint)
    return Upload(folder, manifest, walk(folder))


def push(upload: Upload, repo: str, *, branch: str = MAIN, public: bool = False, message: str | None = None) -> Pushed:
    """Make the repository if it is not there, and commit the release; other files of the branch are removed.

    The commit is compared with the folder afterwards. Nothing is uploaded to a public repository unless `public`.
    Errors: `hub.public-repository`, `hub.not-stored`, and those of the Hub.
    """
    hub = open_hub(to_write=True)
    with hub.talking(repo):
        hub.api.create_repo(repo, private=not public, exist_ok=True)
        private = bool(hub.api.model_info(repo).private)
        if not (private or public):
            hint = "say --public if everybody may read it, or name another repository"
            raise HubError("public-repository", f"{repo} is public; nothing was uploaded", hint=hint)
        if branch != MAIN:
            hub.api.create_branch(repo, branch=branch, exist_ok=True)
        commit = _commit(hub, upload, repo, branch, message or f"Release {upload.manifest.study}")
        _require_stored(hub, upload, repo, commit)
    return Pushed(repo, commit, branch, private, len(upload.files), upload.size)


def require_verified(folder: Path, verdict: Verdict) -> Manifest:
    """Return the manifest of a release that holds. Error: `hub.not-verified`, naming the first findings."""
    if verdict.holds and verdict.manifest is not None:
        return verdict.manifest
    told = "; ".join(f"{found.code} {found.subject}: {found.text}" for found in verdict.findings[:3])
    more = f"; and {len(verdict.findings) - 3} more" if len(verdict.findings) > 3 else ""  # noqa: PLR2004 - as above
    raise HubError("not-verified", f"{folder} does not verify: {told}{more}", hint=f"fedtune release verify {folder}")


def require_repository(repo: str) -> None:
    """Refuse what cannot be a repository: `hub.bad-repository`."""
    if not _REPOSITORY.fullmatch(repo) or ".." in repo or "--" in repo or repo.endswith(".git"):
        message = f"{repo!r:.120} names no repository"
        raise HubError("bad-repository", message, hint="write OWNER/NAME, in letters, digits, '-', '_' and '.'")


def files_at(hub: Hub, repo: str, revision: str) -> dict[str, RepoFile]:
    """Return the files of a revision by their names."""
    from huggingface_hub.hf_api import RepoFile

    tree = hub.api.list_repo_tree(repo, revision=revision, recursive=True)
    return {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}


def _commit(hub: Hub, upload: Upload, repo: str, branch: str, message: str) -> str:
    """Commit on top of what was seen, so that somebody else's commit in between is not undone unseen."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    head = hub.api.model_info(repo, revision=branch).sha
    stale = files_at(hub, repo, branch).keys() - upload.files.keys() - KEPT
    operations: list[Any] = [CommitOperationDelete(path_in_repo=name) for name in sorted(stale)]
    operations += [CommitOperationAdd(name, str(path)) for name, path in upload.files.items()]
    made = hub.api.create_commit(
        repo, operations, commit_message=message, revision=branch, parent_commit=head, num_threads=2
    )
    return str(made.oid)


def _require_stored(hub: Hub, upload: Upload, repo: str, commit: str) -> None:
    """Compare a commit with what was verified: a `.gitignore` or a change meanwhile would make it something else."""
    stored = {name: file for name, file in files_at(hub, repo, commit).items() if name not in KEPT}
    signed = {name: facts.sha256 for name, facts in upload.manifest.files.items()}
    for name, path in upload.files.items():
        wanted = signed.get(name) or file_sha256(path)
        if name not in stored or not _is_content(stored[name], path, wanted):
            raise _not_stored(repo, commit, name)
    if other := sorted(stored.keys() - upload.files.keys()):
        raise _not_stored(repo, commit, other[0])


def _is_content(stored: RepoFile, path: Path, sha256: str) -> bool:
    """Whether a stored file is this one: large files have their SHA-256, small ones that of a git blob (SHA-1)."""
    if stored.lfs is not None:
        return stored.lfs.sha256 == sha256
    content = path.read_bytes()
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
    return stored.blob_id == blob and hashlib.sha256(content).hexdigest() == sha256


def _not_stored(repo: str, commit: str, name: str) -> HubError:
    message = f"the commit {commit} of {repo} does not hold {name} as it was verified"
    return HubError("not-stored", message, hint="do not use this commit; push again, to an empty repository")
