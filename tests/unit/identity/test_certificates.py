"""Certificates for a trial, keys for Flower's node authentication, and words for a phone."""

from __future__ import annotations

import os
import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_ssh_private_key

from lepton_fed.errors import Refused
from lepton_fed.identity.certificates import check_certificate, make_certificates
from lepton_fed.identity.keys import generate_key
from lepton_fed.identity.node_key import generate_node_key, load_node_key, node_public_pem
from lepton_fed.identity.words import words


def test_words_are_those_of_the_proposal() -> None:
    assert words(bytes([127, 0, 0, 1])) == "lusab babad"  # arXiv:0901.4016, section 1
    assert words(bytes([63, 84, 220, 193])) == "gutih tugad"
    with pytest.raises(ValueError):
        words(b"odd")


def test_every_pair_of_bytes_has_a_word_of_its_own() -> None:
    assert len({words(number.to_bytes(2, "big")) for number in range(2**16)}) == 2**16


def test_a_certificate_holds_for_its_hosts_and_the_strictest_reader(tmp_path: Path) -> None:
    make_certificates(tmp_path, ["fed.example.org", "10.0.0.5"])
    for host in ("fed.example.org", "10.0.0.5", "localhost", "127.0.0.1"):
        assert check_certificate(tmp_path / "server.crt", host).startswith("valid until")
    with pytest.raises(Refused) as refused:
        check_certificate(tmp_path / "server.crt", "evil.example.org")
    assert refused.value.code == "LF4165"
    context = ssl.create_default_context(cafile=str(tmp_path / "ca.crt"))
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(tmp_path / "server.crt", tmp_path / "server.key")
    assert shaken_hands(context, server, "localhost")


def shaken_hands(client: ssl.SSLContext, server: ssl.SSLContext, host: str) -> bool:
    """Do a TLS handshake in memory."""
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    ours = client.wrap_bio(to_client, to_server, server_hostname=host)
    theirs = server.wrap_bio(to_server, to_client, server_side=True)
    for _ in range(10):
        done = 0
        for side in (ours, theirs):
            try:
                side.do_handshake()
                done += 1
            except ssl.SSLWantReadError:
                pass
        if done == 2:
            return True
    return False


def test_private_keys_are_their_owner_s_and_never_overwritten(tmp_path: Path) -> None:
    os.umask(0o022)
    make_certificates(tmp_path / "tls", [])
    generate_node_key(tmp_path / "north.node")
    private = [
        tmp_path / "tls" / "ca.key",
        tmp_path / "tls" / "server.key",
        tmp_path / "north.node",
    ]
    assert [path.stat().st_mode & 0o777 for path in private] == [0o600] * 3
    before = [path.read_bytes() for path in private]
    for again in (
        lambda: make_certificates(tmp_path / "tls", []),
        lambda: generate_node_key(tmp_path / "north.node"),
    ):
        with pytest.raises(Refused) as refused:
            again()
        assert refused.value.code == "LF4156"
    assert [path.read_bytes() for path in private] == before


def test_a_certificate_that_is_not_valid_now_is_said(tmp_path: Path) -> None:
    make_certificates(tmp_path, [])
    for days in (-2, 4000):
        with pytest.raises(Refused) as refused:
            check_certificate(tmp_path / "server.crt", now=datetime.now(UTC) + timedelta(days=days))
        assert refused.value.code == "LF4164"
    with pytest.raises(Refused) as refused:
        check_certificate(tmp_path / "server.key")
    assert refused.value.code == "LF4163"


def test_the_certificate_cannot_sign_others(tmp_path: Path) -> None:
    make_certificates(tmp_path, [])
    for name, authority in (("ca.crt", True), ("server.crt", False)):
        found = x509.load_pem_x509_certificate((tmp_path / name).read_bytes())
        limits = found.extensions.get_extension_for_class(x509.BasicConstraints)
        assert (limits.value.ca, limits.critical) == (authority, True)


@pytest.mark.parametrize("host", ["", "two words", "https://x", "host:9092", "me@host"])
def test_a_host_that_is_none_is_refused(tmp_path: Path, host: str) -> None:
    with pytest.raises(Refused) as refused:
        make_certificates(tmp_path, [host])
    assert refused.value.code == "LF4162"
    assert list(tmp_path.iterdir()) == []


def test_a_node_key_is_what_flower_reads(tmp_path: Path) -> None:
    line = generate_node_key(tmp_path / "north.node")
    key = load_node_key(tmp_path / "north.node")
    assert load_ssh_private_key((tmp_path / "north.node").read_bytes(), None) is not None
    assert key.curve.name == "secp384r1"
    assert node_public_pem(line).startswith(b"-----BEGIN PUBLIC KEY")
    assert (tmp_path / "north.node.pub").read_text().strip() == line


def test_another_key_is_no_node_key(tmp_path: Path) -> None:
    generate_key(tmp_path / "north.pem")
    for wrong in (
        lambda: load_node_key(tmp_path / "north.pem"),
        lambda: node_public_pem("x" * 9999),
        lambda: node_public_pem("ssh-ed25519 AAAA"),
    ):
        with pytest.raises(Refused) as refused:
            wrong()
        assert refused.value.code == "LF4161"
