"""The primitives of secure aggregation again: from the papers, on Python integers, slow and plain.

Nothing here imports lepton_fed, numpy or a cryptographic library but hashlib's hashes, so that it
agrees with the fast modules only if both are right.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Callable
from fractions import Fraction

PRIME = 2**256 + 297

# AES, FIPS 197.


def times_x(a: int) -> int:
    return (a << 1) ^ (0x11B if a & 0x80 else 0)


def field_product(a: int, b: int) -> int:
    product = 0
    while b:
        if b & 1:
            product ^= a
        a, b = times_x(a), b >> 1
    return product


def rotated(byte: int, by: int) -> int:
    return (byte << by | byte >> (8 - by)) & 0xFF


def substitution(byte: int) -> int:
    inverse = next((b for b in range(256) if field_product(byte, b) == 1), 0)
    result = 0x63
    for by in range(5):
        result ^= rotated(inverse, by)
    return result


S_BOX = [substitution(byte) for byte in range(256)]


def round_keys(key: bytes) -> list[list[int]]:
    length = len(key) // 4
    words = [list(key[4 * i : 4 * i + 4]) for i in range(length)]
    constant = 1
    while len(words) < 4 * (length + 7):
        word = list(words[-1])
        if len(words) % length == 0:
            word = [S_BOX[b] for b in word[1:] + word[:1]]
            word[0] ^= constant
            constant = times_x(constant)
        elif length > 6 and len(words) % length == 4:
            word = [S_BOX[b] for b in word]
        words.append([a ^ b for a, b in zip(words[-length], word, strict=True)])
    return [[b for word in words[i : i + 4] for b in word] for i in range(0, len(words), 4)]


def aes_block(key: bytes, block: bytes) -> bytes:
    keys = round_keys(key)
    state = [a ^ b for a, b in zip(block, keys[0], strict=True)]
    for number, round_key in enumerate(keys[1:], 1):
        state = [S_BOX[b] for b in state]
        state = [state[(i + 4 * (i % 4)) % 16] for i in range(16)]
        if number < len(keys) - 1:
            mixed = []
            for column in range(0, 16, 4):
                a = state[column : column + 4]
                for i in range(4):
                    two, three = field_product(a[i], 2), field_product(a[(i + 1) % 4], 3)
                    mixed.append(two ^ three ^ a[(i + 2) % 4] ^ a[(i + 3) % 4])
            state = mixed
        state = [a ^ b for a, b in zip(state, round_key, strict=True)]
    return bytes(state)


# Masks: counter mode with AES-GCM's counters, a nonce for each 8192 blocks; and the ring.


def mask(key: bytes, count: int, bits: int, start: int = 0) -> list[int]:
    width = 4 if bits <= 32 else 8
    words = []
    for index in range(start, start + count):
        block, within = divmod(index * width, 16)
        segment, counted = divmod(block, 8192)
        counter = segment.to_bytes(12, "big") + (counted + 2).to_bytes(4, "big")
        keystream = aes_block(key, counter)
        words.append(int.from_bytes(keystream[within : within + width], "little") % 2**bits)
    return words


def packed(words: list[int], bits: int) -> bytes:
    number = sum(word << (bits * index) for index, word in enumerate(words))
    return number.to_bytes((len(words) * bits + 7) // 8, "little")


# Shamir's secret sharing: polynomials as sums of powers, interpolation as fractions.


def draw_element(randomness: Callable[[int], bytes]) -> int:
    while True:
        element = int.from_bytes(randomness(33), "big") % 2**257
        if element < PRIME:
            return element


def split(secret: bytes, n: int, t: int, randomness: Callable[[int], bytes]) -> list[bytes]:
    from_the_top = [draw_element(randomness) for _ in range(t - 1)]
    coefficients = [int.from_bytes(secret, "big"), *reversed(from_the_top)]
    return [
        (sum(c * x**power for power, c in enumerate(coefficients)) % PRIME).to_bytes(33, "big")
        for x in range(1, n + 1)
    ]


def interpolate(shares: dict[int, bytes], at: int = 0) -> int:
    """Lagrange's formula with exact fractions, taken into the field at the very end."""
    total = 0
    for x, share in shares.items():
        weight = Fraction(1)
        for other in shares:
            if other != x:
                weight *= Fraction(at - other, x - other)
        in_field = weight.numerator * pow(weight.denominator, PRIME - 2, PRIME)
        total += in_field * int.from_bytes(share, "big")
    return total % PRIME


# X25519, RFC 7748 section 5.

CURVE = 2**255 - 19


def x25519(scalar: bytes, point: bytes) -> bytes:
    k = int.from_bytes(scalar, "little")
    k = k & (2**254 - 8) | 2**254
    x1 = (int.from_bytes(point, "little") % 2**255) % CURVE
    x2, z2, x3, z3 = 1, 0, x1, 1
    for t in reversed(range(255)):
        bit = k >> t & 1
        if bit:
            x2, z2, x3, z3 = x3, z3, x2, z2
        a, b, c, d = x2 + z2, x2 - z2, x3 + z3, x3 - z3
        aa, bb, da, cb = a * a, b * b, d * a, c * b
        x3, z3 = (da + cb) ** 2 % CURVE, x1 * (da - cb) ** 2 % CURVE
        x2, z2 = aa * bb % CURVE, (aa - bb) * (aa + 121665 * (aa - bb)) % CURVE
        if bit:
            x2, z2, x3, z3 = x3, z3, x2, z2
    return (x2 * pow(z2, CURVE - 2, CURVE) % CURVE).to_bytes(32, "little")


BASE = (9).to_bytes(32, "little")


# HKDF with SHA-256 and no salt, RFC 5869.


def hkdf(secret: bytes, info: bytes, length: int) -> bytes:
    pseudorandom = hmac.new(bytes(32), secret, hashlib.sha256).digest()
    output, last = b"", b""
    while len(output) < length:
        last = hmac.new(
            pseudorandom, last + info + bytes([len(output) // 32 + 1]), hashlib.sha256
        ).digest()
        output += last
    return output[:length]


# AES-GCM, NIST SP 800-38D, for nonces of 12 bytes.


def gcm_product(x: int, y: int) -> int:
    z = 0
    for i in range(128):
        if x >> (127 - i) & 1:
            z ^= y
        y = (y >> 1) ^ (0xE1 << 120 if y & 1 else 0)
    return z


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 16)


def gcm_seal(key: bytes, nonce: bytes, content: bytes, associated: bytes) -> bytes:
    def keystream(counter: int) -> bytes:
        return aes_block(key, nonce + counter.to_bytes(4, "big"))

    ciphertext = b""
    for index in range(0, len(content), 16):
        part = content[index : index + 16]
        stream = keystream(index // 16 + 2)
        ciphertext += bytes(a ^ b for a, b in zip(part, stream, strict=False))
    hashed = padded(associated) + padded(ciphertext)
    hashed += (8 * len(associated)).to_bytes(8, "big") + (8 * len(ciphertext)).to_bytes(8, "big")
    h, y = int.from_bytes(aes_block(key, bytes(16)), "big"), 0
    for index in range(0, len(hashed), 16):
        y = gcm_product(y ^ int.from_bytes(hashed[index : index + 16], "big"), h)
    tag = bytes(a ^ b for a, b in zip(y.to_bytes(16, "big"), keystream(1), strict=True))
    return ciphertext + tag


# ML-KEM-768, FIPS 203. Names are the standard's.

Q, K, DU, DV = 3329, 3, 10, 4
Poly = list[int]


def reversed_bits(i: int) -> int:
    return int(f"{i:07b}"[::-1], 2)


ZETA = [pow(17, reversed_bits(i), Q) for i in range(128)]
GAMMA = [pow(17, 2 * reversed_bits(i) + 1, Q) for i in range(128)]


def ntt(f: Poly) -> Poly:
    f, i, length = list(f), 1, 128
    while length >= 2:
        for start in range(0, 256, 2 * length):
            for j in range(start, start + length):
                t = ZETA[i] * f[j + length]
                f[j], f[j + length] = (f[j] + t) % Q, (f[j] - t) % Q
            i += 1
        length //= 2
    return f


def inverse_ntt(f: Poly) -> Poly:
    f, i, length = list(f), 127, 2
    while length <= 128:
        for start in range(0, 256, 2 * length):
            for j in range(start, start + length):
                t = f[j]
                f[j] = (t + f[j + length]) % Q
                f[j + length] = ZETA[i] * (f[j + length] - t) % Q
            i -= 1
        length *= 2
    return [a * 3303 % Q for a in f]


def ntt_product(f: Poly, g: Poly) -> Poly:
    h = []
    for i in range(128):
        (a0, a1), (b0, b1) = f[2 * i : 2 * i + 2], g[2 * i : 2 * i + 2]
        h += [(a0 * b0 + a1 * b1 * GAMMA[i]) % Q, (a0 * b1 + a1 * b0) % Q]
    return h


def plus(f: Poly, g: Poly) -> Poly:
    return [(a + b) % Q for a, b in zip(f, g, strict=True)]


def inner(left: list[Poly], right: list[Poly]) -> Poly:
    total = [0] * 256
    for f, g in zip(left, right, strict=True):
        total = plus(total, ntt_product(f, g))
    return total


def byte_encode(f: Poly, d: int) -> bytes:
    return packed(f, d)


def byte_decode(data: bytes, d: int) -> Poly:
    number = int.from_bytes(data, "little")
    return [number >> (d * i) & (2**d - 1) for i in range(256)]


def compress(f: Poly, d: int) -> Poly:
    return [((2 * a << d) + Q) // (2 * Q) % 2**d for a in f]


def decompress(f: Poly, d: int) -> Poly:
    return [(2 * Q * a + 2**d) >> (d + 1) for a in f]


def sample_ntt(seed: bytes) -> Poly:
    stream, found = hashlib.shake_128(seed).digest(3 * 1024), []
    for i in range(0, len(stream), 3):
        a, b, c = stream[i : i + 3]
        found += [d for d in (a + 256 * (b % 16), b // 16 + 16 * c) if d < Q]
    return found[:256]


def sample_cbd(key: bytes, number: int) -> Poly:
    bits = int.from_bytes(hashlib.shake_256(key + bytes([number])).digest(128), "little")
    four = [bits >> (4 * i) & 15 for i in range(256)]
    return [((b & 1) + (b >> 1 & 1) - (b >> 2 & 1) - (b >> 3 & 1)) % Q for b in four]


def matrix(rho: bytes) -> list[list[Poly]]:
    return [[sample_ntt(rho + bytes([j, i])) for j in range(K)] for i in range(K)]


def g_hash(data: bytes) -> tuple[bytes, bytes]:
    digest = hashlib.sha3_512(data).digest()
    return digest[:32], digest[32:]


def kem_keys(seed: bytes) -> tuple[bytes, bytes]:
    """Return encapsulation key and the secret vector of the decapsulation key."""
    rho, sigma = g_hash(seed[:32] + bytes([K]))
    a = matrix(rho)
    s = [ntt(sample_cbd(sigma, i)) for i in range(K)]
    e = [ntt(sample_cbd(sigma, K + i)) for i in range(K)]
    t = [plus(inner(a[i], s), e[i]) for i in range(K)]
    return b"".join(byte_encode(f, 12) for f in t) + rho, b"".join(byte_encode(f, 12) for f in s)


def kem_encrypt(public: bytes, message: bytes, coins: bytes) -> bytes:
    t = [byte_decode(public[384 * i : 384 * i + 384], 12) for i in range(K)]
    a = matrix(public[384 * K :])
    y = [ntt(sample_cbd(coins, i)) for i in range(K)]
    u = [
        plus(inverse_ntt(inner([a[j][i] for j in range(K)], y)), sample_cbd(coins, K + i))
        for i in range(K)
    ]
    mu = decompress(byte_decode(message, 1), 1)
    v = plus(plus(inverse_ntt(inner(t, y)), sample_cbd(coins, 2 * K)), mu)
    return b"".join(byte_encode(compress(f, DU), DU) for f in u) + byte_encode(compress(v, DV), DV)


def kem_encapsulate(public: bytes, message: bytes) -> tuple[bytes, bytes]:
    key, coins = g_hash(message + hashlib.sha3_256(public).digest())
    return key, kem_encrypt(public, message, coins)


def kem_decapsulate(seed: bytes, ciphertext: bytes) -> bytes:
    public, private = kem_keys(seed)
    s = [byte_decode(private[384 * i : 384 * i + 384], 12) for i in range(K)]
    width = 32 * DU
    u = [decompress(byte_decode(ciphertext[width * i : width * (i + 1)], DU), DU) for i in range(K)]
    v = decompress(byte_decode(ciphertext[width * K :], DV), DV)
    w = [(b - a) % Q for a, b in zip(inverse_ntt(inner(s, [ntt(f) for f in u])), v, strict=True)]
    message = byte_encode(compress(w, 1), 1)
    key, coins = g_hash(message + hashlib.sha3_256(public).digest())
    if kem_encrypt(public, message, coins) != ciphertext:
        return hashlib.shake_256(seed[32:] + ciphertext).digest(32)
    return key


# What lepton-fed makes of them: contexts, keys of a pair, envelopes, commitments.

PROTOCOL = "lepton-fed secure aggregation 1"


def bound(context: dict[str, object], purpose: str, **particulars: object) -> bytes:
    text = {name: context[name] for name in ("run", "attempt", "roster", "task", "layout")}
    text |= {"round": context["round_number"]}
    text |= {"protocol": PROTOCOL, "purpose": purpose, "particulars": particulars}
    return json.dumps(text, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def commitment(
    context: dict[str, object], kind: str, secret: bytes, owner: str, holder: str = ""
) -> bytes:
    info = bound(context, "commitment", kind=kind, owner=owner, holder=holder)
    return hashlib.sha256(info + b"\0" + secret).digest()


class Site:
    """One site: its three secrets and what follows from them."""

    def __init__(
        self, index: int, name: str, envelope: bytes, mask: bytes, self_mask: bytes, hybrid: bool
    ) -> None:
        self.index, self.name, self.hybrid = index, name, hybrid
        self.secrets = {"envelope": envelope, "mask": mask, "self_mask": self_mask}

    def scalar(self, purpose: str) -> bytes:
        return hkdf(self.secrets[purpose], f"{PROTOCOL} {purpose} x25519".encode(), 32)

    def kem_seed(self, purpose: str) -> bytes:
        return hkdf(self.secrets[purpose], f"{PROTOCOL} {purpose} ml-kem-768".encode(), 64)

    def public(self, purpose: str) -> bytes:
        point = x25519(self.scalar(purpose), BASE)
        return point + (kem_keys(self.kem_seed(purpose))[0] if self.hybrid else b"")

    def described(self) -> dict[str, object]:
        digests = {p: hashlib.sha256(self.public(p)).hexdigest() for p in ("mask", "envelope")}
        return {"index": self.index, "name": self.name, **digests}


def agreed(context: dict[str, object], purpose: str, one: Site, two: Site, **more: object) -> bytes:
    both = [one, two] if one.index < two.index else [two, one]
    return bound(context, purpose, sites=[site.described() for site in both], **more)


def pair_secret(context: dict[str, object], low: Site, high: Site) -> bytes:
    return hkdf(low.secrets["mask"], agreed(context, "pair secret", low, high), 32)


def wrap(context: dict[str, object], low: Site, high: Site, message: bytes) -> bytes:
    key, ciphertext = kem_encapsulate(high.public("mask")[32:], message)
    info = agreed(context, "wrapped pair secret", low, high)
    secret = pair_secret(context, low, high)
    sealed = gcm_seal(hkdf(key, info, 32), bytes(12), secret, info + ciphertext)
    return ciphertext + sealed + commitment(context, "pair secret", secret, low.name, high.name)


def mask_key(context: dict[str, object], low: Site, high: Site, wrapped: bytes) -> bytes:
    material = x25519(low.scalar("mask"), high.public("mask")[:32])
    if wrapped:
        material += pair_secret(context, low, high)
    info = agreed(context, "mask", low, high, wrapped=hashlib.sha256(wrapped).hexdigest())
    return hkdf(material, info, 32 if wrapped else 16)


def self_mask_key(context: dict[str, object], site: Site) -> bytes:
    info = bound(context, "self mask", index=site.index, name=site.name)
    return hkdf(site.secrets["self_mask"], info, 32 if site.hybrid else 16)


def envelope(
    context: dict[str, object],
    sender: Site,
    recipient: Site,
    content: bytes,
    beside: bytes,
    nonce: bytes,
    message: bytes,
) -> bytes:
    material = x25519(sender.scalar("envelope"), recipient.public("envelope")[:32])
    head = b""
    if sender.hybrid:
        shared, head = kem_encapsulate(recipient.public("envelope")[32:], message)
        material += shared
    info = agreed(
        context,
        "envelope",
        sender,
        recipient,
        sender=sender.name,
        encapsulated=hashlib.sha256(head).hexdigest(),
        bound=hashlib.sha256(beside).hexdigest(),
    )
    return head + nonce + gcm_seal(hkdf(material, info, 32), nonce, content, info)
