"""A site's vault: a folder of sealed items, its keys and the updates it may have to send again.

Format, enough to recover a vault without this code. JSON is canonical (RFC 8785), `‖` joins bytes, `LABEL/a/b` is the
UTF-8 text of the parts joined by newlines, hexadecimal digits are lower-case.

    vault.json            {"checksum", "generation", "id", "kdf", "version": 1, "wrapped"} and a newline
    items-GENERATION/     the generation in six digits or more; any other such folder is left over and never read
        NAME.sealed       one item
    lock                  empty; flock(2) on it orders writers and readers

- `seal(key, data, context)` = nonce (12 random bytes) ‖ AES-256-GCM(key, nonce, data, associated data = context), the
  tag (16 bytes) last, as NIST SP 800-38D has it.
- Wrapping key, 32 bytes, `kdf.salt` in hexadecimal digits: for `kdf.name` = `scrypt` (RFC 7914) of the passphrase
  (Unicode NFC, UTF-8) with `n`, `r`, `p`; for `hkdf-sha256` (RFC 5869) of the 32-byte key, info = `fedtune vault v1`.
- Data key = unseal(wrapping key, `wrapped`, `fedtune vault v1`/H), H the JSON of the header without `checksum` and
  `wrapped`. `checksum` is the SHA-256 of the JSON without `checksum`: it tells damage from a wrong key, nothing else.
- An item = seal(data key, data, `fedtune vault item v1`/`id`/NAME). A signing key is `signing-NUMBER`: the 32 bytes of
  an Ed25519 private key (RFC 8032); the highest number is in force.

An export is one file: a header line as above, its own key and salt, with `fedtune vault export v1` as label; then
records of 8 bytes of length (big-endian) ‖ seal(data key, TEXT, `fedtune vault export item v1`/`id`/INDEX), INDEX in
decimal from 0. TEXT is `item`, newline, NAME, newline, data; the last record's is `end` and a newline.

What it keeps: who has the disk learns the names, sizes and times of items, not a byte of them, and whoever changes,
renames or moves one to another vault makes it unreadable. What it does not: an item removed, or put back as it was
before (under the same data key), is not noticed here; the journal and its witnessed heads show that. Whoever is root
or this user reads the keys of a running site. Keys are in memory while a vault is open, and Python cannot wipe them:
copies stay until the process ends, so swap belongs encrypted and core dumps off.
"""

from fedtune_client.vault.signing import add_signing_key, create_signing_key, signing_key
from fedtune_client.vault.store import Vault
from fedtune_client.vault.unlock import Key, Passphrase, Unlock, unlock_from

__all__ = [
    "Key",
    "Passphrase",
    "Unlock",
    "Vault",
    "add_signing_key",
    "create_signing_key",
    "signing_key",
    "unlock_from",
]
