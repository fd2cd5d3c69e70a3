from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from lepton_fed.errors import BundleRefused
from lepton_fed.identity.signature import (
    MANIFEST_TYPE,
    SIGNATURE_BYTES,
    PrivateKey,
    PublicKey,
    fingerprint,
    pre_authentication_encoding,
    sign,
    verify,
)

VECTORS: dict[str, Any] = json.loads(
    (Path(__file__).parents[2] / "vectors" / "dsse.json").read_text(encoding="utf-8")
)
RFC = VECTORS["rfc8032_test_1"]
KEY = PrivateKey.from_private_bytes(bytes.fromhex(RFC["secret_hex"]))

# Ed25519 as RFC 8032 section 5.1 defines it, on affine points: slow, obvious, ours only to compare.
P = 2**255 - 19
ORDER = 2**252 + 27742317777372353535851937790883648493
D = -121665 * pow(121666, -1, P) % P
Point = tuple[int, int]


def add(a: Point, b: Point) -> Point:
    product = D * a[0] * b[0] * a[1] * b[1] % P
    x = (a[0] * b[1] + b[0] * a[1]) * pow(1 + product, -1, P) % P
    y = (a[1] * b[1] + a[0] * b[0]) * pow(1 - product, -1, P) % P
    return x, y


def times(scalar: int, point: Point) -> Point:
    found = (0, 1)
    while scalar:
        if scalar & 1:
            found = add(found, point)
        point, scalar = add(point, point), scalar >> 1
    return found


def base_point() -> Point:
    y = 4 * pow(5, -1, P) % P
    square = (y * y - 1) * pow(D * y * y + 1, -1, P) % P
    x = pow(square, (P + 3) // 8, P)
    if x * x % P != square:
        x = x * pow(2, (P - 1) // 4, P) % P
    return (x if x % 2 == 0 else P - x), y


def encoded(point: Point) -> bytes:
    return (point[1] | (point[0] & 1) << 255).to_bytes(32, "little")


def number(data: bytes) -> int:
    return int.from_bytes(data, "little")


def naive_sign(secret: bytes, message: bytes) -> bytes:
    expanded = hashlib.sha512(secret).digest()
    scalar = number(expanded[:32]) & ~7 & (2**254 - 1) | 2**254
    public = encoded(times(scalar, base_point()))
    nonce = number(hashlib.sha512(expanded[32:] + message).digest()) % ORDER
    commitment = encoded(times(nonce, base_point()))
    challenge = number(hashlib.sha512(commitment + public + message).digest())
    return commitment + ((nonce + challenge * scalar) % ORDER).to_bytes(32, "little")


def naive_encoding(payload_type: str, body: bytes) -> bytes:
    kind = payload_type.encode()
    return b" ".join([b"DSSEv1", str(len(kind)).encode(), kind, str(len(body)).encode(), body])


def test_the_library_is_ed25519_as_rfc_8032_prints_it() -> None:
    message = bytes.fromhex(RFC["message_hex"])
    assert KEY.public_key().public_bytes_raw().hex() == RFC["public_hex"]
    assert KEY.sign(message).hex() == RFC["signature_hex"]
    assert naive_sign(bytes.fromhex(RFC["secret_hex"]), message).hex() == RFC["signature_hex"]


@pytest.mark.parametrize("vector", VECTORS["encodings"], ids=lambda v: v["description"])
def test_committed_vectors_hold_for_us_and_for_a_naive_implementation(
    vector: dict[str, str],
) -> None:
    body = bytes.fromhex(vector["body_hex"])
    encoding = bytes.fromhex(vector["pae_hex"])
    assert pre_authentication_encoding(vector["payload_type"], body) == encoding
    assert naive_encoding(vector["payload_type"], body) == encoding
    assert naive_sign(bytes.fromhex(RFC["secret_hex"]), encoding).hex() == vector["signature_hex"]
    if vector["payload_type"] == MANIFEST_TYPE:
        assert sign(KEY, body).hex() == vector["signature_hex"]
        verified = verify(KEY.public_key(), body, bytes.fromhex(vector["signature_hex"]))
        assert verified == body


def test_type_and_body_cannot_be_shifted_against_each_other() -> None:
    pairs = [("a", b"b c"), ("a b", b"c"), ("a 1", b"b c"), ("", b"a b c"), ("a", b""), ("", b"a")]
    assert len({pre_authentication_encoding(kind, body) for kind, body in pairs}) == len(pairs)


def test_a_signature_over_another_type_is_refused() -> None:
    body = b"{}"
    other = KEY.sign(pre_authentication_encoding("application/json", body))
    with pytest.raises(BundleRefused) as caught:
        verify(KEY.public_key(), body, other, where="somewhere/manifest.json")
    assert caught.value.code == "LF4104"
    assert caught.value.problems[0].where == "somewhere/manifest.json"


@pytest.mark.parametrize("signature", [b"", bytes(SIGNATURE_BYTES - 1), bytes(SIGNATURE_BYTES + 1)])
def test_a_signature_of_another_length_is_refused(signature: bytes) -> None:
    with pytest.raises(BundleRefused, match="LF4104"):
        verify(KEY.public_key(), b"{}", signature)


def test_a_signature_has_no_second_form() -> None:
    body = b"{}"
    signature = sign(KEY, body)
    larger = number(signature[32:]) + ORDER  # the same number modulo the order of the group
    with pytest.raises(BundleRefused, match="LF4104"):
        verify(KEY.public_key(), body, signature[:32] + larger.to_bytes(32, "little"))


def test_a_fingerprint_is_the_hash_of_the_raw_key_in_short_groups() -> None:
    public = KEY.public_key()
    assert fingerprint(public) == VECTORS["fingerprint"]
    plain = fingerprint(public).replace(" ", "")
    assert plain == hashlib.sha256(public.public_bytes_raw()).hexdigest()
    assert {len(group) for group in fingerprint(public).split(" ")} == {4}
    other = PublicKey.from_public_bytes(bytes.fromhex(RFC["public_hex"]))
    assert fingerprint(other) == fingerprint(public)
