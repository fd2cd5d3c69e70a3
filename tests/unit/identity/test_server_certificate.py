"""The coordinator's TLS certificate: what is good enough to be shown, and its successor."""

from __future__ import annotations

import shutil
import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from lepton_fed.errors import Refused
from lepton_fed.identity.certificates import (
    check_authorities,
    hosts_of,
    make_certificates,
    make_next_certificate,
)
from lepton_fed.identity.server_certificate import ServerCertificate, load_server_certificate

HOST = "fed.example.org"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tls")
    make_certificates(folder / "first", [HOST])
    make_certificates(folder / "other", [])
    make_next_certificate(folder / "first", folder / "next")
    return folder


@pytest.fixture
def pair(made: Path, tmp_path: Path) -> tuple[Path, Path]:
    for name in ("server.crt", "server.key"):
        shutil.copy2(made / "first" / name, tmp_path)
    return tmp_path / "server.crt", tmp_path / "server.key"


def code_of(pair: tuple[Path, Path], now: datetime | None = None) -> str:
    with pytest.raises(Refused) as caught:
        load_server_certificate(*pair, now)
    return caught.value.code


def test_a_good_pair_says_for_whom_it_is_and_until_when(pair: tuple[Path, Path]) -> None:
    found = load_server_certificate(*pair)
    assert found.hosts == [HOST, "localhost", "127.0.0.1"]
    assert found.ends == x509.load_pem_x509_certificate(pair[0].read_bytes()).not_valid_after_utc
    assert "PRIVATE" not in repr(found)


def test_what_is_no_pair_is_refused(made: Path, pair: tuple[Path, Path]) -> None:
    shutil.copy2(made / "other" / "server.key", pair[1])
    assert code_of(pair) == "LF4178"


@pytest.mark.parametrize("half", [0, 1])
def test_what_is_half_written_is_refused(pair: tuple[Path, Path], half: int) -> None:
    content = pair[half].read_bytes()
    pair[half].write_bytes(content[: len(content) // 2])
    assert code_of(pair) == ["LF4163", "LF4178"][half]


def test_a_missing_key_and_one_that_others_may_read_are_refused(pair: tuple[Path, Path]) -> None:
    pair[1].chmod(0o640)
    assert code_of(pair) == "LF4152"
    pair[1].unlink()
    assert code_of(pair) == "LF4151"


def test_an_encrypted_key_is_refused_and_nobody_is_asked(pair: tuple[Path, Path]) -> None:
    key = serialization.load_pem_private_key(pair[1].read_bytes(), None)
    kind = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8)
    pair[1].write_bytes(key.private_bytes(*kind, serialization.BestAvailableEncryption(b"secret")))
    assert code_of(pair) == "LF4155"


@pytest.mark.parametrize("days", [-1, 900])
def test_a_certificate_that_is_not_valid_now_is_refused(pair: tuple[Path, Path], days: int) -> None:
    assert code_of(pair, datetime.now(UTC) + timedelta(days=days)) == "LF4164"


def test_the_next_certificate_is_for_the_same_hosts_under_the_same_authority(made: Path) -> None:
    old, new = (
        x509.load_pem_x509_certificate((made / name / "server.crt").read_bytes())
        for name in ("first", "next")
    )
    authority = x509.load_pem_x509_certificate((made / "first" / "ca.crt").read_bytes())
    new.verify_directly_issued_by(authority)
    assert hosts_of(new) == hosts_of(old)
    assert new.serial_number != old.serial_number
    assert new.public_key() != old.public_key()
    assert (made / "next" / "server.key").stat().st_mode & 0o777 == 0o600


def test_the_next_certificate_may_be_for_others_and_overwrites_nothing(
    made: Path, tmp_path: Path
) -> None:
    hosts = make_next_certificate(made / "first", tmp_path, ["10.0.0.5"])
    assert hosts == ["localhost", "10.0.0.5", "127.0.0.1"]
    before = (tmp_path / "server.crt").read_bytes()
    with pytest.raises(Refused) as caught:
        make_next_certificate(made / "first", tmp_path)
    assert caught.value.code == "LF4156"
    assert (tmp_path / "server.crt").read_bytes() == before


@pytest.mark.parametrize(
    ("name", "content", "code"),
    [("ca.key", b"no key", "LF4153"), ("ca.crt", b"none", "LF4163"), ("ca.key", None, "LF4178")],
)
def test_another_authority_cannot_sign(
    made: Path, tmp_path: Path, name: str, content: bytes | None, code: str
) -> None:
    folder = tmp_path / "authority"
    shutil.copytree(made / "first", folder)
    (folder / name).write_bytes(content or (made / "other" / name).read_bytes())
    with pytest.raises(Refused) as caught:
        make_next_certificate(folder, tmp_path / "out")
    assert caught.value.code == code
    assert not (tmp_path / "out").exists()


def test_a_file_of_authorities_may_hold_two_of_which_one_has_ended(
    made: Path, tmp_path: Path
) -> None:
    both = tmp_path / "ca.crt"
    both.write_bytes(
        (made / "first" / "ca.crt").read_bytes() + (made / "other" / "ca.crt").read_bytes()
    )
    assert check_authorities(both).count(" and ") == 1
    assert ssl.create_default_context(cafile=str(both)).cert_store_stats()["x509_ca"] == 2
    with pytest.raises(Refused) as caught:
        check_authorities(both, datetime.now(UTC) + timedelta(days=3700))
    assert caught.value.code == "LF4164"
    both.write_bytes(both.read_bytes()[:-40])  # as it is while somebody writes it
    with pytest.raises(Refused) as caught:
        check_authorities(both)
    assert caught.value.code == "LF4163"


def test_a_certificate_is_under_an_authority_directly_or_by_way_of_those_between(
    tmp_path: Path,
) -> None:
    now = datetime.now(UTC)
    keys = [ec.generate_private_key(ec.SECP256R1()) for _ in range(3)]
    names = [x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, each)]) for each in "rml"]

    def issued(subject: int, issuer: int) -> x509.Certificate:
        made = x509.CertificateBuilder(names[issuer], names[subject], keys[subject].public_key())
        made = made.serial_number(x509.random_serial_number())
        made = made.not_valid_before(now - timedelta(days=1))
        made = made.not_valid_after(now + timedelta(days=1))
        return made.sign(keys[issuer], hashes.SHA256())

    root, between, leaf = issued(0, 0), issued(1, 0), issued(2, 1)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    whole = ServerCertificate(context, "", (leaf, between))
    assert whole.is_under([root])
    assert whole.is_under([between])
    assert not whole.is_under([leaf])
    assert not whole.is_under([])
    assert not ServerCertificate(context, "", (leaf,)).is_under([root])
    assert not ServerCertificate(context, "", (leaf, leaf)).is_under([root])
