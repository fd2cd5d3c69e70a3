"""What a site is known by and knows the coordinator by: its two keys, the pinned key, the CA.

They are files that their owner may replace while the site runs. What is in use is in memory; the
two that the SuperNode reads are copied into the state folder first, so that a SuperNode that is
started again meets no file that somebody is just writing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from lepton_fed.config.schema import ClientConf
from lepton_fed.identity.certificates import parse_authorities
from lepton_fed.identity.keys import load_private_key, load_public_key, read_key_file
from lepton_fed.identity.node_key import load_node_key, node_public_line
from lepton_fed.identity.signature import PrivateKey, PublicKey
from lepton_fed.runs.files import write_atomic

__all__ = ["SiteKeys", "SuperNodeFiles", "key_files", "load_site_keys"]


@dataclass(frozen=True)
class SiteKeys:
    """The keys of a site.

    Args:
        identity: Seals what leaves.
        node_line: Public half of its node key, one OpenSSH line.
        coordinator: The pinned key.
        node_key: File of the node key.
        ca: File of the certificates of the authorities.
    """

    identity: PrivateKey
    node_line: str
    coordinator: PublicKey
    node_key: bytes = field(repr=False)
    ca: bytes = field(repr=False)

    def changed(self, old: SiteKeys) -> list[str]:
        """Return the conf's names of those that are others than before."""
        names = {
            "identity_key": _raw(self.identity.public_key()) != _raw(old.identity.public_key()),
            "node_key": self.node_line != old.node_line,
            "coordinator_key": _raw(self.coordinator) != _raw(old.coordinator),
            "ca": self.ca != old.ca,
        }
        return [name for name, differs in names.items() if differs]


def key_files(conf: ClientConf) -> tuple[Path, ...]:
    """Return the files that :func:`load_site_keys` reads, and the roster, which must fit them."""
    names = (conf.identity_key, conf.node_key, conf.coordinator_key, conf.ca, conf.roster)
    return tuple(map(Path, names))


def load_site_keys(conf: ClientConf) -> SiteKeys:
    """Read a site's keys.

    Args:
        conf: The site's conf.

    Raises:
        Refused: LF4151 to LF4157, LF4161 or LF4163: one of them is missing, open to others, or is
            not what it should be.
    """
    path = Path(conf.ca)
    identity = load_private_key(Path(conf.identity_key))
    coordinator = load_public_key(Path(conf.coordinator_key))
    line = node_public_line(load_node_key(Path(conf.node_key)))
    node_key = read_key_file(Path(conf.node_key), private=True)
    ca = read_key_file(path, private=False)
    parse_authorities(ca, path)
    return SiteKeys(identity, line, coordinator, node_key, ca)


class SuperNodeFiles:
    """The files that the SuperNode reads, in the site's state folder.

    Args:
        state: The folder.
    """

    def __init__(self, state: Path) -> None:
        self.node_key = state / "supernode.key"
        self.ca = state / "supernode.ca.crt"

    def write(self, keys: SiteKeys) -> None:
        """Write the keys that are in use.

        Raises:
            RunError: They cannot be written.
        """
        write_atomic(self.node_key, keys.node_key, 0o600)
        write_atomic(self.ca, keys.ca, 0o600)

    def remove(self) -> None:
        """Remove the node key's copy: nobody is connected any more."""
        self.node_key.unlink(missing_ok=True)


def _raw(key: PublicKey) -> bytes:
    return key.public_bytes_raw()
