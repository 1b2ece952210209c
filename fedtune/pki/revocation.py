"""What is no longer welcome: site names, certificates' serial numbers and public keys. Pure.

A name comes back with a new enrolment; a serial number and a key never do. A key that its site has replaced is not
revoked: what it signed before stays good (`fedtune.envelopes.peers` knows until when).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace


@dataclass(frozen=True, slots=True)
class Revocations:
    """All that was revoked, and of which site each is.

    Keys are in hexadecimal digits: an Ed25519 key as it is, any other by the SHA-256 of its SubjectPublicKeyInfo.
    """

    names: frozenset[str] = frozenset()
    serials: dict[str, str] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)

    def is_revoked(self, *, name: str = "", serial: str = "", key: str = "") -> bool:
        """Whether any of these was revoked; a serial number with or without its leading zeros."""
        return name in self.names or serial.lower().rjust(40, "0") in self.serials or key.lower() in self.keys

    def with_certificate(self, serial: str, site: str, key: str) -> Revocations:
        """Return them with one certificate more, and its key."""
        return replace(self, serials={**self.serials, serial: site}, keys={**self.keys, key: site})

    def with_site(self, site: str, serials: frozenset[str], keys: frozenset[str]) -> Revocations:
        """Return them with a site, and with everything it ever had."""
        return Revocations(
            self.names | {site},
            {**self.serials, **dict.fromkeys(serials, site)},
            {**self.keys, **dict.fromkeys(keys, site)},
        )

    def without_name(self, site: str) -> Revocations:
        """Return them after a site was enrolled anew, with other keys."""
        return replace(self, names=self.names - {site})

    def to_text(self) -> str:
        """Return the file that the gate in front of Flower reads: one serial number or key a line, and whose it was."""
        lines = sorted(f"{value}  # {site}\n" for value, site in [*self.serials.items(), *self.keys.items()])
        return "# revoked certificates (serial numbers) and keys; written by fedtune, do not edit\n" + "".join(lines)
