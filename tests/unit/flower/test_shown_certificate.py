"""Another TLS certificate at a SuperLink that listens: new handshakes get it, lines go on."""

from __future__ import annotations

import gc
import socket
import ssl
from collections.abc import Iterator
from http.client import HTTPSConnection
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supernode.fleet_http_connection import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from lepton_fed.clients.first_contact import reach
from lepton_fed.errors import RunError
from lepton_fed.flower.superlink import SuperLink
from lepton_fed.identity.certificates import make_certificates, make_next_certificate
from lepton_fed.identity.server_certificate import load_server_certificate

# Flower's migrations and its way of handing httpx a file are Flower's to change.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

LOOPBACK = "127.0.0.1"
KEY = ec.generate_private_key(ec.SECP384R1())


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tls")
    for name in ("first", "other"):
        make_certificates(folder / name, [])
    make_next_certificate(folder / "first", folder / "next")
    both = [(folder / name / "ca.crt").read_bytes() for name in ("first", "other")]
    (folder / "both.crt").write_bytes(b"".join(both))
    return folder


@pytest.fixture(scope="module")
def listening(tls: Path) -> Iterator[tuple[SuperLink, int]]:
    with socket.socket() as taken:
        taken.bind((LOOPBACK, 0))
        port = int(taken.getsockname()[1])
    first = tls / "first"
    link = SuperLink(
        (LOOPBACK, port), first / "server.crt", first / "server.key", tls / "flower.sqlite"
    )
    link.start({"north": public_key_to_bytes(KEY.public_key())})
    yield link, port
    link.stop()
    del link
    gc.collect()  # what it left open shows here, not in another test


def show(link: SuperLink, folder: Path) -> int:
    """Show a certificate; return its serial number."""
    link.show(load_server_certificate(folder / "server.crt", folder / "server.key").context)
    return serial_of((folder / "server.crt").read_bytes())


def serial_of(content: bytes) -> int:
    return x509.load_pem_x509_certificate(content).serial_number


class Connection:
    """One TLS connection that stays."""

    def __init__(self, port: int, ca: Path, host: str = LOOPBACK) -> None:
        context = ssl.create_default_context(cafile=str(ca))
        self._line = HTTPSConnection(host, port, timeout=20, context=context)
        self._line.connect()
        self._socket = self._line.sock
        content = self._socket.getpeercert(binary_form=True)
        self.serial = x509.load_der_x509_certificate(content).serial_number

    def ask(self) -> int:
        """Ask something on this connection and return the status."""
        signed = SimpleNamespace(request=httpx.Request("GET", "https://x/"))
        NodeAuthHttpInterceptor(KEY, KEY.public_key()).intercept(signed, lambda context: None)
        named = {k: v for k, v in signed.request.headers.items() if k.startswith("flwr-")}
        self._line.request("GET", "/v1/fleet/nothing", headers=named)
        with self._line.getresponse() as answer:
            answer.read()
        assert self._line.sock is self._socket, "it is the same connection still"
        return answer.status

    def close(self) -> None:
        self._line.close()


@pytest.mark.parametrize("host", ["localhost", LOOPBACK])  # with and without a name in the hello
def test_a_new_handshake_gets_the_new_certificate_and_the_old_connection_goes_on(
    listening: tuple[SuperLink, int], tls: Path, host: str
) -> None:
    link, port = listening
    before = show(link, tls / "first")
    ca = tls / "first" / "ca.crt"
    old = Connection(port, ca, host)
    assert old.serial == before
    assert old.ask() == 404
    after = show(link, tls / "next")
    new = Connection(port, ca, host)
    assert new.serial == after != before
    for each in (old, new):
        assert each.ask() == 404
        each.close()
    assert reach(f"{host}:{port}", ca).skew_s < 5


def test_a_site_that_trusts_both_authorities_reaches_the_coordinator_before_and_after(
    listening: tuple[SuperLink, int], tls: Path
) -> None:
    link, port = listening
    for name, trusts, other in (("first", "first", "other"), ("other", "other", "first")):
        show(link, tls / name)
        for ca in (tls / "both.crt", tls / trusts / "ca.crt"):
            assert reach(f"{LOOPBACK}:{port}", ca).skew_s < 5
            flowers_own(port, ca)
        with pytest.raises(RunError) as caught:
            reach(f"{LOOPBACK}:{port}", tls / other / "ca.crt")
        assert caught.value.code == "LF5332"
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            flowers_own(port, tls / other / "ca.crt")


def flowers_own(port: int, ca: Path) -> None:
    """Connect with the client of Flower's SuperNode, as it is given the file."""
    with FleetHttpClient.from_server_address(
        f"{LOOPBACK}:{port}", insecure=False, root_certificates=str(ca), interceptors=[]
    ) as client:
        assert client._client.get(f"https://{LOOPBACK}:{port}/").status_code == 404
