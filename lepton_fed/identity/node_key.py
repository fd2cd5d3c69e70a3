"""The key by which Flower's SuperNode shows that it is enrolled: EC P-384, in OpenSSH format.

It opens the connection and nothing else: what a site says is signed with its Ed25519 identity.
"""

from __future__ import annotations

from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ec import (
    SECP384R1,
    EllipticCurvePrivateKey,
    EllipticCurvePublicKey,
    generate_private_key,
)

from lepton_fed.errors import Problem, Refused
from lepton_fed.identity.keys import read_key_file, write_key_files

__all__ = ["generate_node_key", "load_node_key", "node_public_line", "node_public_pem"]

_MOST_CHARACTERS = 1000


def generate_node_key(path: Path) -> str:
    """Make a node key and write both halves.

    Args:
        path: File of the private half, for example ``keys/north.node``; the public half becomes
            ``keys/north.node.pub``.

    Returns:
        The public half, one OpenSSH line.

    Raises:
        Refused: LF4156, one of the two files exists; LF4157, a file cannot be written.
    """
    private = generate_private_key(SECP384R1())
    pem = private.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.OpenSSH,
        serialization.NoEncryption(),
    )
    line = node_public_line(private)
    write_key_files({path: (pem, 0o600), Path(f"{path}.pub"): (line.encode() + b"\n", 0o644)})
    return line


def load_node_key(path: Path) -> EllipticCurvePrivateKey:
    """Read the private half of a node key.

    Args:
        path: OpenSSH PEM file, not encrypted, readable by its owner only.

    Raises:
        Refused: LF4151, no such file; LF4152, others may read it; LF4157, it cannot be read;
            LF4161, it is no node key.
    """
    content = read_key_file(path, private=True)
    try:
        key = serialization.load_ssh_private_key(content, None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, EllipticCurvePrivateKey) or not isinstance(key.curve, SECP384R1):
        raise _no_node_key(str(path))
    return key


def node_public_line(private: EllipticCurvePrivateKey) -> str:
    """Return the public half of a node key as one OpenSSH line, without a comment."""
    public = private.public_key()
    return public.public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    ).decode()


def node_public_pem(line: str) -> bytes:
    """Return the public half of a node key in PEM, as Flower enrols it.

    Args:
        line: One OpenSSH line.

    Raises:
        Refused: LF4161, it is no node key.
    """
    key = None
    if len(line) <= _MOST_CHARACTERS:
        try:
            key = serialization.load_ssh_public_key(line.encode())
        except (ValueError, UnsupportedAlgorithm):
            key = None
    if not isinstance(key, EllipticCurvePublicKey) or not isinstance(key.curve, SECP384R1):
        raise _no_node_key("")
    return key.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def _no_node_key(where: str) -> Refused:
    return Refused(
        Problem("LF4161", "this is no node key: EC P-384 in OpenSSH format", where=where,
                remedy="make one: lepton-fed keys site NAME")
    )  # fmt: skip
