"""Lines of a text file, plain or gzip, each with its number. Knows no format beyond UTF-8."""

from __future__ import annotations

import contextlib
import gzip
import zlib
from typing import IO, TYPE_CHECKING, cast

from fedtune.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_BOM = b"\xef\xbb\xbf"


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    r"""Yield (line number from 1, line with its end) of a UTF-8 file; a byte order mark at its start is dropped.

    Only `\n` ends a line, so that the numbers are those an editor shows. Raises `data.not-utf8` with line and byte,
    `data.broken-gzip`, `data.unreadable`.
    """
    offset = 0
    with _readable(path) as stream:
        for number, raw in enumerate(stream, start=1):
            content = raw.removeprefix(_BOM) if number == 1 else raw
            try:
                yield number, content.decode("utf-8")
            except UnicodeDecodeError as error:
                at = offset + len(raw) - len(content) + error.start
                raise _not_utf8(path, number, at, content[error.start]) from error
            offset += len(raw)


def whole_text(path: Path) -> str:
    """Return the whole file as text; raises as `numbered_lines` does."""
    return "".join(line for _, line in numbered_lines(path))


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[IO[bytes]]:
    """Open a file, through gzip when its name ends so, and turn what can go wrong while reading into a DataError."""
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as stream:
            yield cast(IO[bytes], stream)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(
            "broken-gzip",
            f"{path} is not a complete gzip file: {error}",
            hint="copy or compress it again; a file that is not compressed must not be named .gz",
        ) from error
    except OSError as error:
        raise DataError(
            "unreadable", f"{path} cannot be read: {error.strerror or error}", hint="check the file's permissions"
        ) from error


def _not_utf8(path: Path, line: int, offset: int, byte: int) -> DataError:
    return DataError(
        "not-utf8",
        f"{path}, line {line}: byte 0x{byte:02x} at offset {offset} is not UTF-8 text",
        hint="convert the file, for example: iconv -f WINDOWS-1252 -t UTF-8 OLD > NEW",
    )
