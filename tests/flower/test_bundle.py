from __future__ import annotations

import io
import json
import stat
import zipfile
from collections.abc import Callable

import pytest
from flwr.common.config import get_fab_config
from hypothesis import given
from hypothesis import strategies as st

from fedtune.errors import BundleError
from fedtune.flower.bundle import MAX_BYTES, build, read

PLAN = '{"name":"münchen","prompt":"say \\"hi\\"\\n🏥"}'


def repacked(change: Callable[[zipfile.ZipFile, bytes], object], plan: str = PLAN) -> bytes:
    """Write an archive of one's own from what a bundle holds."""
    with zipfile.ZipFile(io.BytesIO(build(plan).content)) as archive:
        text = archive.read("pyproject.toml")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        change(archive, text)
    return buffer.getvalue()


def refused(content: bytes) -> str:
    with pytest.raises(BundleError) as error:
        read(content)
    return error.value.code


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_every_text_comes_back_as_it_was(plan: str) -> None:
    bundle = build(plan)
    assert read(bundle.content) == bundle
    assert get_fab_config(bundle.content)["tool"]["flwr"]["app"]["config"] == {"plan": plan}


def test_a_plan_has_one_bundle_on_every_machine() -> None:
    assert build(PLAN).content == build(PLAN).content
    assert build("{}").sha256 == "66f8af693c9d2a379132c9d01c473a25f8857436d623f4d79ee34cab86f2d790"
    assert build("{}").sha256 != build("{} ").sha256


def test_half_a_surrogate_pair_has_no_bundle() -> None:
    with pytest.raises(BundleError, match="surrogate"):
        build("\ud83c")


def test_a_bundle_that_carries_its_own_package_is_refused() -> None:
    def with_code(archive: zipfile.ZipFile, text: bytes) -> None:
        archive.writestr("pyproject.toml", text)
        archive.writestr("fedtune/__init__.py", "import os; os.system('true')")

    content = repacked(with_code)
    assert get_fab_config(content)  # Flower itself would take it
    assert refused(content) == "bundle.other-files"


@pytest.mark.parametrize("name", ["../pyproject.toml", "/pyproject.toml", "a/pyproject.toml", "pyproject.toml/", "x"])
def test_no_other_path_is_a_bundle(name: str) -> None:
    assert refused(repacked(lambda archive, text: archive.writestr(name, text))) == "bundle.other-files"


def test_a_symbolic_link_is_refused() -> None:
    def linked(archive: zipfile.ZipFile, text: bytes) -> None:
        entry = zipfile.ZipInfo("pyproject.toml")
        entry.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(entry, "/etc/passwd")

    assert refused(repacked(linked)) == "bundle.no-plan"


def test_two_files_of_one_name_are_refused() -> None:
    def doubled(archive: zipfile.ZipFile, text: bytes) -> None:
        archive.writestr("pyproject.toml", text)
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("pyproject.toml", text)

    assert refused(repacked(doubled)) == "bundle.other-files"


def test_a_bomb_is_refused_before_it_is_unpacked() -> None:
    def bomb(archive: zipfile.ZipFile, text: bytes) -> None:
        archive.writestr("pyproject.toml", b" " * 50_000_000, zipfile.ZIP_DEFLATED)

    content = repacked(bomb)
    assert len(content) < 100_000
    assert refused(content) == "bundle.altered"


def test_a_size_that_is_a_lie_is_refused() -> None:
    content = bytearray(build(PLAN).content)
    directory = content.index(b"PK\x01\x02")
    content[directory + 24 : directory + 28] = (2**31).to_bytes(4, "little")  # the size after unpacking
    assert refused(bytes(content)).startswith("bundle.")


def test_a_large_bundle_is_neither_made_nor_read() -> None:
    assert refused(bytes(MAX_BYTES + 1)) == "bundle.too-large"
    with pytest.raises(BundleError, match="more than"):
        build("x" * MAX_BYTES)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("fedtune_client.app:app", "evil.app:app"),
        ('version = "1.0.0"', 'version = "1.0.1"'),
        ("[tool.flwr.app.config]", "[tool.flwr.app.config]\nmore = 1"),
        ('license = "Apache-2.0"', 'license = "Apache-2.0"\ndependencies = ["evil"]'),
        ("plan = ", "# \nplan = "),
    ],
)
def test_anything_but_the_plan_in_the_project_is_refused(old: str, new: str) -> None:
    def altered(archive: zipfile.ZipFile, text: bytes) -> None:
        assert old.encode() in text
        archive.writestr("pyproject.toml", text.replace(old.encode(), new.encode()))

    assert refused(repacked(altered)) == "bundle.altered"


def test_the_same_plan_in_another_archive_is_refused_for_the_hash_stands_for_the_plan() -> None:
    assert refused(repacked(lambda archive, text: archive.writestr("pyproject.toml", text))) == "bundle.altered"


@given(st.binary(max_size=300))
def test_no_bytes_but_a_bundles_are_one(content: bytes) -> None:
    assert refused(content) == "bundle.not-an-archive"


def test_no_change_of_a_single_byte_goes_through() -> None:
    content = build(json.dumps({"a": 1})).content
    codes = {
        refused(content[:index] + bytes([content[index] ^ 1 << bit]) + content[index + 1 :])
        for index in range(len(content))
        for bit in (0, 5)
    }
    assert codes <= {"bundle.altered", "bundle.not-an-archive", "bundle.other-files", "bundle.no-plan"}


@given(st.binary(min_size=1, max_size=40), st.booleans())
def test_nothing_stands_before_or_after_a_bundle(more: bytes, before: bool) -> None:
    content = build(PLAN).content
    assert refused(more + content if before else content + more).startswith("bundle.")
