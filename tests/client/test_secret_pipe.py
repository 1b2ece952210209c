"""What unlocks the vault reaches a child as often as it starts, and is neither in its environment nor in a file."""

from __future__ import annotations

import stat
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from fedtune.errors import VaultError
from fedtune_client.secret_pipe import offered, receive
from fedtune_client.vault import Key, Passphrase, unlock_from

if TYPE_CHECKING:
    from pathlib import Path

    from fedtune_client.vault import Unlock

CHILD = """
import sys
from pathlib import Path
from fedtune_client.secret_pipe import receive
print(next(iter(receive(Path(sys.argv[1])).values())), Path('/proc/self/environ').read_bytes().count(b'horse'))
"""


@pytest.mark.parametrize("unlock", [Passphrase("correct horse, bättery"), Key(bytes(range(32)))])
def test_every_reader_gets_what_the_vault_opens_with(tmp_path: Path, unlock: Unlock) -> None:
    with offered(tmp_path / "unlock", unlock) as pipe:
        assert stat.S_ISFIFO(pipe.stat().st_mode)
        assert stat.S_IMODE(pipe.stat().st_mode) == 0o600
        for _ in range(50):
            assert unlock_from(receive(pipe)) == unlock
    assert not (tmp_path / "unlock").exists()


def test_a_process_that_is_started_again_gets_it_again_and_never_by_its_environment(tmp_path: Path) -> None:
    with offered(tmp_path / "unlock", Passphrase("correct horse")) as pipe:
        for _ in range(2):
            words = [sys.executable, "-c", CHILD, str(pipe)]
            found = subprocess.run(words, check=True, capture_output=True, text=True)
            assert found.stdout == "correct horse 0\n"


def test_a_reader_that_goes_away_without_reading_disturbs_nobody(tmp_path: Path) -> None:
    with offered(tmp_path / "unlock", Passphrase("correct horse")) as pipe:
        for _ in range(20):
            pipe.open("rb").close()
        assert unlock_from(receive(pipe)) == Passphrase("correct horse")


def test_a_secret_that_nobody_fetched_does_not_hold_up_the_end(tmp_path: Path) -> None:
    with offered(tmp_path / "unlock", Passphrase("correct horse")):
        pass


@pytest.mark.parametrize("content", [b"", b"[]", b"no json\n"])
def test_a_pipe_without_a_secret_is_said(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "unlock").write_bytes(content)
    with pytest.raises(VaultError) as refused:
        receive(tmp_path / "unlock")
    assert refused.value.code == "vault.locked"
