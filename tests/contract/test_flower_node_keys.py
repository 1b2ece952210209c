"""Flower reads a node's keys as `fedtune.pki.keys` spells them: OpenSSH, not encrypted, on a NIST curve."""

from __future__ import annotations

import argparse
from pathlib import Path

from flwr.cli.supernode.register import try_load_public_key
from flwr.supercore.primitives.asymmetric import bytes_to_public_key, generate_key_pairs
from flwr.supernode.cli.flower_supernode import _try_setup_client_authentication

from fedtune.pki.keys import key_name, new_node_key, node_file, node_text


def test_a_supernode_reads_our_private_key(tmp_path: Path) -> None:
    key = new_node_key()
    (tmp_path / "node").write_bytes(node_file(key))
    arguments = argparse.Namespace(auth_supernode_private_key=str(tmp_path / "node"), auth_supernode_public_key=None)
    found = _try_setup_client_authentication(arguments)
    assert found is not None
    assert found[0].private_numbers() == key.private_numbers()


def test_a_coordinator_registers_our_public_key(tmp_path: Path) -> None:
    key = new_node_key().public_key()
    (tmp_path / "node.pub").write_text(node_text(key))
    assert key_name(bytes_to_public_key(try_load_public_key(tmp_path / "node.pub"))) == key_name(key)


def test_flowers_own_node_keys_are_on_our_curve() -> None:
    assert generate_key_pairs()[1].curve.name == new_node_key().curve.name
