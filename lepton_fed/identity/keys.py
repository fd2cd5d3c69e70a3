"""The coordinator's signing key as files: a private half that only its owner reads, a public half.

Both are PEM: the private half as unencrypted PKCS #8 with mode 0600, the public half as
SubjectPublicKeyInfo beside it, with the ending ``.pub``. A key file is never overwritten.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization

from lepton_fed.errors import Problem, Refused
from lepton_fed.identity.signature import PrivateKey, PublicKey

__all__ = [
    "generate_key",
    "load_private_key",
    "load_public_key",
    "read_key_file",
    "write_key_files",
]

_MAX_KEY_BYTES = 16 * 1024
_OTHERS = stat.S_IRWXG | stat.S_IRWXO


def generate_key(path: Path) -> PublicKey:
    """Make a new key pair and write both halves.

    Args:
        path: File of the private half, for example ``keys/coordinator.pem``; the public half
            becomes ``keys/coordinator.pub``. A missing folder is made, for its owner only.

    Returns:
        The public half.

    Raises:
        Refused: LF4156, one of the two files exists; LF4157, a file cannot be written.
    """
    public_path = path.with_suffix(".pub")
    if path == public_path:
        raise _refused("LF4157", path, "a private key may not end in .pub", "name it .pem")
    private = PrivateKey.generate()
    public = private.public_key()
    private_pem = private.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    public_pem = public.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    write_key_files({public_path: (public_pem, 0o644), path: (private_pem, 0o600)})
    return public


def write_key_files(files: Mapping[Path, tuple[bytes, int]]) -> None:
    """Write files that must not exist yet: all of them, or none.

    Args:
        files: Content and mode of each, by path. A missing folder is made, for its owner only.

    Raises:
        Refused: LF4156, one of the files exists; LF4157, a file cannot be written.
    """
    written: list[Path] = []
    path = next(iter(files))
    try:
        for path, (content, mode) in files.items():
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            _write_new(path, content, mode, written)
    except OSError as error:
        for file in written:
            file.unlink(missing_ok=True)
        if isinstance(error, FileExistsError):
            raise _refused(
                "LF4156",
                Path(error.filename),
                "the file exists, and a key is never overwritten",
                "use it, or give another name; a site that pinned the old key refuses the new one",
            ) from None
        raise _refused(
            "LF4157", path, f"cannot write the key: {error.strerror}", "choose a writable folder"
        ) from error


def load_private_key(path: Path) -> PrivateKey:
    """Read the private half of a key.

    Args:
        path: PEM file, PKCS #8, not encrypted, readable by its owner only.

    Raises:
        Refused: LF4151, no such file; LF4152, others may read it; LF4153, not a key;
            LF4154, a key of another kind; LF4155, encrypted; LF4157, cannot be read.
    """
    pem = read_key_file(path, private=True)
    if b"PUBLIC KEY-----" in pem:
        raise _refused(
            "LF4154", path, "this is the public half of a key", "give the .pem file beside it"
        )
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except TypeError:
        raise _refused(
            "LF4155",
            path,
            "the key is encrypted, and nothing here can ask for its password",
            "decrypt it (openssl pkey -in OLD -out NEW) and keep it mode 600",
        ) from None
    except (ValueError, UnsupportedAlgorithm):
        raise _not_a_key(path, "private") from None
    if not isinstance(key, PrivateKey):
        raise _other_kind(path, type(key).__name__)
    return key


def load_public_key(path: Path) -> PublicKey:
    """Read the public half of a key.

    Args:
        path: PEM file, SubjectPublicKeyInfo.

    Raises:
        Refused: LF4151, no such file; LF4153, not a key; LF4154, a key of another kind;
            LF4157, cannot be read.
    """
    pem = read_key_file(path, private=False)
    if b"PRIVATE KEY-----" in pem:
        raise _refused(
            "LF4154", path, "this is the private half of a key", "give the .pub file beside it"
        )
    try:
        key = serialization.load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm):
        raise _not_a_key(path, "public") from None
    if not isinstance(key, PublicKey):
        raise _other_kind(path, type(key).__name__)
    return key


def _write_new(path: Path, content: bytes, mode: int, written: list[Path]) -> None:
    """Write a file that must not exist yet; note it in ``written`` as soon as it does."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    written.append(path)
    with open(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def read_key_file(path: Path, *, private: bool, limit: int = _MAX_KEY_BYTES) -> bytes:
    """Return the content of a key file.

    Args:
        path: The file.
        private: Nobody but its owner may read it.
        limit: Most bytes that it may have.

    Raises:
        Refused: LF4151, no such file; LF4152, others may read it; LF4153, it is too large for a
            key; LF4157, it cannot be read.
    """
    try:
        with path.open("rb") as file:
            # Asked of the open file: a name could point elsewhere by the time it is read.
            found = os.fstat(file.fileno())
            if private and os.name == "posix" and found.st_mode & _OTHERS:
                raise _refused(
                    "LF4152",
                    path,
                    f"others may use this private key (mode {stat.S_IMODE(found.st_mode):03o})",
                    f"chmod 600 {path}; if others had access, make a new key",
                )
            content = file.read(limit + 1)
    except FileNotFoundError:
        raise _refused(
            "LF4151", path, "there is no such file", _remedy_for(path, private)
        ) from None
    except OSError as error:
        raise _refused(
            "LF4157", path, f"cannot read the key: {error.strerror}", "check the path"
        ) from error
    if len(content) > limit:
        raise _not_a_key(path, "private" if private else "public")
    return content


def _remedy_for(path: Path, private: bool) -> str:
    if path.suffix == ".json":
        return "`lepton-fed keys coordinator` makes the roster; a site is handed it"
    if private:
        return "lepton-fed init makes the coordinator's, `lepton-fed keys site NAME` a site's"
    return "ask the coordinator for the file"


def _not_a_key(path: Path, half: str) -> Refused:
    return _refused(
        "LF4153",
        path,
        f"this is not a {half} key in PEM form",
        "lepton-fed init makes a pair" if half == "private" else "ask for the file again",
    )


def _other_kind(path: Path, found: str) -> Refused:
    return _refused(
        "LF4154",
        path,
        f"the key must be Ed25519, this is {found}",
        "use a key that lepton-fed init made",
    )


def _refused(code: str, path: Path, what: str, remedy: str) -> Refused:
    return Refused(Problem(code=code, what=what, where=str(path), remedy=remedy))
