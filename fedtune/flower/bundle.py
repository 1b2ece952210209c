r"""A study's bundle: the one file in which Flower carries a plan to every site. It is read, and never unpacked.

Flower takes a zip archive of an app (a FAB). Ours holds one `pyproject.toml` with the plan as one text, stored without
compression under a fixed date, so that a plan has exactly one bundle and the bundle's SHA-256 stands for the plan. What
a site accepts is that one: a bundle is read by finding the plan and building its bundle again, which must give the same
bytes. Files beside it, code, paths, links, compression, a second directory and everything else that two readers of zip
archives could understand differently are refused with that. Knows no plan's content.

TOML's basic strings take every character but control characters, `"` and `\`; Flower reads it with tomli.
"""

from __future__ import annotations

import hashlib
import io
import json
import tomllib
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass

from fedtune.config.plan import PLAN_KEY
from fedtune.errors import BundleError

MAX_BYTES = 2_000_000
_FILE = "pyproject.toml"
_DATE = (1980, 1, 1, 0, 0, 0)
_TEMPLATE = """\
[project]
name = "fedtune-study"
version = "1.0.0"
description = "a study plan"
license = "Apache-2.0"

[tool.flwr.app]
publisher = "fedtune"

[tool.flwr.app.components]
serverapp = "fedtune_server.app:app"
clientapp = "fedtune_client.app:app"

[tool.flwr.app.config]
{entries}
"""
_HINT = "a bundle is made by fedtune server submit and holds nothing but the plan"


@dataclass(frozen=True, slots=True)
class Bundle:
    """A plan's text with its bundle's bytes; `sha256` is what Flower calls the FAB's hash."""

    plan: str
    content: bytes

    @property
    def sha256(self) -> str:
        """The SHA-256 of the bytes, in hexadecimal digits."""
        return hashlib.sha256(self.content).hexdigest()


def build(plan: str) -> Bundle:
    """Return the one bundle of a plan's text. Errors: `bundle.not-text`, `bundle.too-large`."""
    try:
        text = project_text({PLAN_KEY: plan}).encode()
    except UnicodeEncodeError as error:
        raise BundleError("not-text", "the plan holds half of a surrogate pair", hint="write the plan anew") from error
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        entry = zipfile.ZipInfo(_FILE, _DATE)
        entry.create_system = 3  # as on every platform's Python but Windows'
        entry.external_attr = 0o100644 << 16
        archive.writestr(entry, text)
    content = buffer.getvalue()
    if len(content) > MAX_BYTES:
        raise BundleError("too-large", f"the plan's bundle has {len(content)} bytes, more than {MAX_BYTES}")
    return Bundle(plan, content)


def read(content: bytes) -> Bundle:
    """Return the bundle if its bytes are exactly those of a plan's.

    Errors: `bundle.too-large`, `bundle.not-an-archive`, `bundle.other-files`, `bundle.no-plan`, `bundle.altered`.
    """
    if len(content) > MAX_BYTES:
        raise BundleError("too-large", f"the bundle has {len(content)} bytes, more than {MAX_BYTES}", hint=_HINT)
    bundle = build(_plan(_project(content)))
    if bundle.content != content:
        raise BundleError("altered", "the bundle is not the one that its plan has", hint=_HINT)
    return bundle


def _project(content: bytes) -> bytes:
    """Return the bytes of the archive's only file; no more are read than the archive itself has."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            entries = archive.infolist()
            if [entry.filename for entry in entries] != [_FILE]:
                named = f"the bundle holds {len(entries)} files, not one {_FILE}"
                raise BundleError("other-files", named, hint=_HINT)
            entry = entries[0]
            if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 or entry.file_size > len(content):
                raise BundleError("altered", f"the bundle's {_FILE} is compressed or encrypted", hint=_HINT)
            return archive.read(entry)
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, NotImplementedError, RuntimeError) as error:
        raise BundleError("not-an-archive", "the bundle is not a zip archive", hint=_HINT) from error


def _plan(project: bytes) -> str:
    try:
        plan = tomllib.loads(project.decode())["tool"]["flwr"]["app"]["config"][PLAN_KEY]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BundleError("no-plan", f"the bundle's {_FILE} holds no plan", hint=_HINT) from error
    if not isinstance(plan, str):
        raise BundleError("no-plan", f"the plan in the bundle's {_FILE} is not a text", hint=_HINT)
    return plan


def project_text(config: Mapping[str, str]) -> str:
    """Return the one file from which Flower takes a run's configuration: data, no code."""
    return _TEMPLATE.format(entries="\n".join(f"{key} = {_toml_string(value)}" for key, value in config.items()))


def _toml_string(text: str) -> str:
    """Return a basic string (TOML 1.0): JSON's, but for DEL, with every other character as it is."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
