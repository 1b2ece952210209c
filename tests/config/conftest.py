from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from fedtune.config.compose import compose
from fedtune.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

Write = Callable[[str], "Path"]
Fails = Callable[..., ConfigError]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a configuration file."""

    def write_file(text: str) -> Path:
        file = tmp_path / "study.yaml"
        file.write_text(text, "utf-8")
        return file

    return write_file


@pytest.fixture
def fails() -> Fails:
    """Compose, and return the error of this code."""

    def compose_and_fail(code: str, *overrides: str, file: Path | None = None) -> ConfigError:
        with pytest.raises(ConfigError) as caught:
            compose(overrides, file)
        assert caught.value.code == f"config.{code}"
        assert caught.value.hint
        return caught.value

    return compose_and_fail
