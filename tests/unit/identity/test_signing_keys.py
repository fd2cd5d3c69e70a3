from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, x25519

from lepton_fed.errors import Refused
from lepton_fed.identity import keys
from lepton_fed.identity.keys import generate_key, load_private_key, load_public_key
from lepton_fed.identity.signature import fingerprint, sign, verify


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    path = tmp_path / "keys" / "coordinator.pem"
    generate_key(path)
    return path


def refused(load: object, path: Path) -> str:
    with pytest.raises(Refused) as caught:
        load(path)  # type: ignore[operator]
    problem = caught.value.problems[0]
    assert problem.where.startswith(str(path.parent))
    assert problem.remedy
    return problem.code


def write_private(path: Path, pem: bytes) -> Path:
    path.write_bytes(pem)
    path.chmod(0o600)
    return path


def test_a_new_pair_is_private_belongs_together_and_signs(tmp_path: Path) -> None:
    previous = os.umask(0)
    try:
        made = generate_key(tmp_path / "new" / "keys" / "coordinator.pem")
    finally:
        os.umask(previous)
    folder = tmp_path / "new" / "keys"
    assert sorted(path.name for path in folder.iterdir()) == ["coordinator.pem", "coordinator.pub"]
    assert stat.S_IMODE((folder / "coordinator.pem").stat().st_mode) == 0o600
    assert stat.S_IMODE((folder / "coordinator.pub").stat().st_mode) == 0o644
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    private = load_private_key(folder / "coordinator.pem")
    public = load_public_key(folder / "coordinator.pub")
    assert fingerprint(public) == fingerprint(made) == fingerprint(private.public_key())
    assert verify(public, b"{}", sign(private, b"{}")) == b"{}"


def test_the_files_are_the_standard_ones(pair: Path) -> None:
    assert pair.read_bytes().startswith(b"-----BEGIN PRIVATE KEY-----\n")
    assert pair.with_suffix(".pub").read_bytes().startswith(b"-----BEGIN PUBLIC KEY-----\n")
    assert b"PRIVATE" not in pair.with_suffix(".pub").read_bytes()


def test_two_keys_differ(tmp_path: Path) -> None:
    first = generate_key(tmp_path / "a.pem")
    assert fingerprint(first) != fingerprint(generate_key(tmp_path / "b.pem"))


@pytest.mark.parametrize("kept", ["coordinator.pem", "coordinator.pub"])
def test_neither_half_is_ever_overwritten(pair: Path, kept: str) -> None:
    for path in (pair, pair.with_suffix(".pub")):
        if path.name != kept:
            path.unlink()
    before = (pair.parent / kept).read_bytes()
    assert refused(generate_key, pair) == "LF4156"
    assert [path.name for path in pair.parent.iterdir()] == [kept]
    assert (pair.parent / kept).read_bytes() == before


def test_a_key_is_not_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "k.pem").symlink_to(tmp_path / "elsewhere")
    assert refused(generate_key, tmp_path / "k.pem") == "LF4156"
    assert not (tmp_path / "elsewhere").exists()


def test_a_private_key_may_not_be_named_like_a_public_one(tmp_path: Path) -> None:
    assert refused(generate_key, tmp_path / "coordinator.pub") == "LF4157"
    assert list(tmp_path.iterdir()) == []


def test_a_key_that_cannot_be_written_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = keys._write_new

    def full_disk(path: Path, content: bytes, mode: int, written: list[Path]) -> None:
        real(path, content, mode, written)
        if path.suffix == ".pem":
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(keys, "_write_new", full_disk)
    assert refused(generate_key, tmp_path / "k.pem") == "LF4157"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o620, 0o601, 0o777])
def test_a_private_key_that_others_may_use_is_refused(pair: Path, mode: int) -> None:
    pair.chmod(mode)
    assert refused(load_private_key, pair) == "LF4152"
    with pytest.raises(Refused, match="chmod 600"):
        load_private_key(pair)


@pytest.mark.parametrize("mode", [0o600, 0o400])
def test_a_private_key_of_its_owner_only_is_read(pair: Path, mode: int) -> None:
    pair.chmod(mode)
    load_private_key(pair)


def test_the_mode_of_the_file_behind_a_link_counts(pair: Path, tmp_path: Path) -> None:
    (tmp_path / "link.pem").symlink_to(pair)
    load_private_key(tmp_path / "link.pem")
    pair.chmod(0o644)
    assert refused(load_private_key, tmp_path / "link.pem") == "LF4152"


def test_a_missing_key_says_how_to_get_one(tmp_path: Path) -> None:
    assert refused(load_private_key, tmp_path / "none.pem") == "LF4151"
    assert refused(load_public_key, tmp_path / "none.pub") == "LF4151"
    with pytest.raises(Refused, match="lepton-fed init"):
        load_private_key(tmp_path / "none.pem")


def test_the_wrong_half_is_named(pair: Path, tmp_path: Path) -> None:
    assert refused(load_public_key, pair) == "LF4154"
    copy = write_private(tmp_path / "k.pem", pair.with_suffix(".pub").read_bytes())
    assert refused(load_private_key, copy) == "LF4154"


def test_keys_of_other_kinds_are_refused(tmp_path: Path) -> None:
    for key in (ec.generate_private_key(ec.SECP256R1()), x25519.X25519PrivateKey.generate()):
        private = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        public = key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        assert refused(load_private_key, write_private(tmp_path / "k.pem", private)) == "LF4154"
        assert refused(load_public_key, write_private(tmp_path / "k.pub", public)) == "LF4154"


def test_an_encrypted_key_is_refused_with_the_way_to_decrypt_it(pair: Path) -> None:
    encrypted = load_private_key(pair).private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"secret"),
    )
    write_private(pair, encrypted)
    assert refused(load_private_key, pair) == "LF4155"


@pytest.mark.parametrize(
    "content",
    [b"", b"not a key", b"\xff" * 100, b"-----BEGIN PRIVATE KEY-----\nAAAA\n", b"A" * 2**20],
)
def test_what_is_not_a_key_is_refused(tmp_path: Path, content: bytes) -> None:
    assert refused(load_private_key, write_private(tmp_path / "k.pem", content)) == "LF4153"
    public = content.replace(b"PRIVATE", b"PUBLIC")
    assert refused(load_public_key, write_private(tmp_path / "k.pub", public)) == "LF4153"


def test_a_folder_is_not_a_key(tmp_path: Path) -> None:
    assert refused(load_private_key, tmp_path) == "LF4157"
    assert refused(load_public_key, tmp_path) == "LF4157"


def test_no_message_repeats_key_material(pair: Path) -> None:
    secret = pair.read_text().splitlines()[1]
    pair.write_text(pair.read_text().replace("-----END", "-----ENDE"))
    with pytest.raises(Refused) as caught:
        load_private_key(pair)
    assert secret not in str(caught.value)
