"""What secure aggregation's primitives cost: against Flower's SecAgg+, and against AES itself.

Run it as `python -m benchmarks.secagg`. Times are CPU seconds of the process, all threads together,
so that others on the machine do not count; wall seconds stand beside them.
"""

from __future__ import annotations

import functools
import secrets
import time
from collections.abc import Callable, Sequence

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from flwr.common.secure_aggregation.crypto.shamir import combine_shares, create_shares
from flwr.common.secure_aggregation.ndarrays_arithmetic import (
    parameters_addition,
    parameters_mod,
    parameters_subtraction,
)
from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen

from benchmarks.timing import in_turn
from lepton_fed.core.norms import clipped
from lepton_fed.core.ring import RingEncoding
from lepton_fed.privacy.secagg import masks, packing, shamir
from lepton_fed.privacy.secagg.context import Context
from lepton_fed.privacy.secagg.envelopes import open_envelope, seal_envelope
from lepton_fed.privacy.secagg.keys import KeyPair, Party, RoundSecrets, mask_key, wrap_pair_secret
from lepton_fed.privacy.secagg.vector import MaskedLayout

PARAMETERS = 10_000_000
COMPARED = 4  # masks in the comparison: enough for a rate, few enough for Flower
NEIGHBOURS = 30
SITES, THRESHOLD, DROPPED = 100, 67, 10
PEM_BYTES = 306  # what Flower shares for a private key

Clock = Callable[[], float]


def keys(count: int, length: int = 16) -> list[bytes]:
    """Return that many keys of masks."""
    return [secrets.token_bytes(length) for _ in range(count)]


def flower_masking(vector: np.ndarray, seeds: Sequence[bytes]) -> np.ndarray:
    """Mask as Flower's client does: its generator, its sums, its modulus at the end."""
    masked = [vector]
    for number, seed in enumerate(seeds):
        mask = pseudo_rand_gen(seed, 1 << 32, [vector.shape])
        masked = (parameters_subtraction if number % 2 else parameters_addition)(masked, mask)
    return parameters_mod(masked, 1 << 32)[0]


def our_masking(vector: np.ndarray, seeds: Sequence[bytes], bits: int = 32) -> None:
    """Mask in place on one thread, half the masks added and half taken off."""
    masks.apply(vector, plus=seeds[::2], minus=seeds[1::2], bits=bits, workers=1)


def keystream(size_bytes: int, streams: int, length: int = 16) -> None:
    """Encrypt zeros by AES-GCM into one buffer again and again: AES at its fastest, and no more."""
    block = masks.SEGMENT_BYTES
    zeros, room = bytes(block), bytearray(block + 16)
    for _ in range(streams):
        cipher = AESGCM(secrets.token_bytes(length))
        for number in range(size_bytes // block):
            cipher.encrypt_into(number.to_bytes(12, "big"), zeros, None, room)


def counter_mode(size_bytes: int, streams: int) -> None:
    """Encrypt zeros by AES-128 in OpenSSL's plain counter mode, as one would write it first."""
    block = masks.SEGMENT_BYTES
    zeros, room = bytes(block), bytearray(block)
    for _ in range(streams):
        mode = modes.CTR(bytes(16))
        cipher = Cipher(algorithms.AES(secrets.token_bytes(16)), mode).encryptor()
        for _ in range(size_bytes // block):
            cipher.update_into(zeros, room)


def masking_against_others() -> None:
    """Print one core's rate of masking beside Flower's and beside AES alone."""
    print(f"\nMasking {PARAMETERS:,} parameters with {COMPARED} masks, one core")
    print(f"{'':34} {'ours, ns':>9} {'other, ns':>9} {'GB/s':>6} {'ours/other':>22}")
    each = PARAMETERS * COMPARED * 1e-9
    words, wide = np.zeros(PARAMETERS, np.uint32), np.zeros(PARAMETERS, np.int64)
    doubles = np.zeros(PARAMETERS, np.uint64)
    seeds, long_seeds = keys(COMPARED), keys(COMPARED, 32)
    ring20 = functools.partial(our_masking, words, seeds, 20)
    words_bytes, doubles_bytes = words.nbytes, doubles.nbytes
    cases: list[tuple[str, Callable[[], object], Callable[[], object], int, int]] = [
        ("32-bit words / Flower", functools.partial(our_masking, words, seeds),
         functools.partial(flower_masking, wide, long_seeds), 4, 3),
        ("32-bit words / plain counter mode", functools.partial(our_masking, words, seeds),
         functools.partial(counter_mode, words_bytes, COMPARED), 4, 7),
        ("32-bit words / AES-128", functools.partial(our_masking, words, seeds),
         functools.partial(keystream, words_bytes, COMPARED), 4, 7),
        ("20-bit ring / AES-128", ring20,
         functools.partial(keystream, words_bytes, COMPARED), 4, 7),
        ("64-bit words / AES-128", functools.partial(our_masking, doubles, seeds, 64),
         functools.partial(keystream, doubles_bytes, COMPARED), 8, 7),
        ("32-bit words, AES-256 / AES-256", functools.partial(our_masking, words, long_seeds),
         functools.partial(keystream, words_bytes, COMPARED, 32), 4, 7),
    ]  # fmt: skip
    for name, ours, other, width, repeats in cases:
        a, b, (low, middle, high) = in_turn(ours, other, repeats, time.process_time)
        print(
            f"{name:34} {a / each:>9.3f} {b / each:>9.3f} {each * width / a:>6.2f}"
            f" {middle:>8.3f} ({low:.3f} to {high:.3f}) = 1/{1 / middle:.1f}"
        )


def two_cores_against_flower() -> None:
    """Print wall time on two threads beside Flower's, which uses one."""
    words, wide = np.zeros(PARAMETERS, np.uint32), np.zeros(PARAMETERS, np.int64)
    seeds, long_seeds = keys(NEIGHBOURS + 1), keys(NEIGHBOURS + 1, 32)
    ours = functools.partial(masks.apply, words, plus=seeds[::2], minus=seeds[1::2], workers=2)
    theirs = functools.partial(flower_masking, wide, long_seeds)
    a, b, (low, middle, high) = in_turn(ours, theirs, 5, time.perf_counter)
    print(f"\n{NEIGHBOURS + 1} masks on two threads, wall time; Flower uses one")
    print(f"{a:.3f} s against {b:.3f} s: {1 / middle:.1f} times ({1 / high:.1f} to {1 / low:.1f})")


def measured(name: str, call: Callable[[], object], floor_s: float, cores: int = 1) -> None:
    """Print CPU and wall seconds of one call, and the share of what is allowed."""
    cpu, wall = time.process_time(), time.perf_counter()
    call()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    share = cpu / cores / floor_s
    print(f"{name:58} {cpu:>8.3f} {wall:>8.3f} {floor_s:>9.2f} on {cores} {share:>7.2f}")


def whole_steps() -> None:
    """Print what a site's masking, the coordinator's unmasking and all sharing take."""
    print("\nWhole steps; the last column is CPU seconds / cores / what is allowed")
    print(f"{'':58} {'CPU s':>8} {'wall s':>8} {'allowed':>14} {'share':>7}")
    words = np.zeros(PARAMETERS, np.uint32)
    seeds = keys(NEIGHBOURS + 1)
    plus, minus = seeds[: NEIGHBOURS // 2], seeds[NEIGHBOURS // 2 :]
    for workers in (1, 2):
        masking = functools.partial(masks.apply, words, plus=plus, minus=minus, workers=workers)
        measured(f"site: {NEIGHBOURS} neighbours and its own mask", masking, 0.6, workers)
    update = np.random.default_rng(1).normal(scale=1e-2, size=PARAMETERS).astype(np.float32)
    encoding = RingEncoding.plan(
        cohort=NEIGHBOURS + 1, coordinate_bound=10.0, weight_bound=1.0, bits=32
    )
    layout = MaskedLayout(encoding, ("delta",), PARAMETERS, 10)

    def site_step() -> None:
        vector, _ = clipped(update, 10.0)
        encoded, _ = layout.encode({"delta": vector}, 1.0, np.zeros(10))
        masks.apply(encoded, plus=plus, minus=minus, workers=2)

    measured(f"site: norm, clip, encode, {NEIGHBOURS + 1} masks", site_step, 0.6, 2)
    packed = packing.pack(masks.stream(plus[0], PARAMETERS, bits=20), 20)
    twenty = packing.unpack(packed, PARAMETERS, 20)
    measured("site: packing to 20 bits", lambda: packing.pack(twenty, 20), 0.6)
    measured("coordinator: unpacking", lambda: packing.unpack(packed, PARAMETERS, 20), 0.6)
    stayed = SITES - DROPPED
    plus, minus = keys(DROPPED * stayed // 2), keys(DROPPED * stayed // 2 + stayed)
    unmasking = functools.partial(masks.apply, words, plus=plus, minus=minus, workers=2)
    name = f"coordinator: {SITES} sites, {DROPPED} dropped, {len(plus + minus)} masks"
    measured(name, unmasking, 6.0, 2)

    sharing = [secrets.token_bytes(32) for _ in range(SITES)]
    shared = [shamir.split(secret, SITES, THRESHOLD) for secret in sharing]
    answered = range(SITES - THRESHOLD + 1, SITES + 1)

    def combine_all() -> None:
        weights = shamir.Weights.at(answered, THRESHOLD)
        for secret, shares in zip(sharing, shared, strict=True):
            assert weights.combine({x: shares[x - 1] for x in answered}) == secret  # noqa: S101

    measured(f"coordinator: secrets of {SITES} sites, t = {THRESHOLD}", combine_all, 0.2)
    measured(
        "site: sharing out its two secrets",
        lambda: [shamir.split(secret, SITES, THRESHOLD) for secret in sharing[:2]],
        0.2,
    )


def sharing_against_flower() -> None:
    """Print what sharing one site's key costs beside Flower's."""
    secret, pem = secrets.token_bytes(32), secrets.token_bytes(PEM_BYTES)
    print(f"\nOne secret, n = {SITES}, t = {THRESHOLD}; Flower shares a key as {PEM_BYTES} bytes")
    print(f"{'':34} {'ours, ms':>9} {'Flower, ms':>11} {'Flower/ours':>12}")
    shares = shamir.split(secret, SITES, THRESHOLD)
    pem_shares = create_shares(pem, THRESHOLD, SITES)
    mapped = dict(enumerate(shares[:THRESHOLD], 1))
    cases: list[tuple[str, Callable[[], object], Callable[[], object]]] = [
        ("split", lambda: shamir.split(secret, SITES, THRESHOLD),
         lambda: create_shares(pem, THRESHOLD, SITES)),
        ("combine t, weights made anew", lambda: shamir.combine(mapped, THRESHOLD),
         lambda: combine_shares(pem_shares[:THRESHOLD])),
    ]  # fmt: skip
    for name, ours, theirs in cases:
        a, b, (_, middle, _) = in_turn(ours, theirs, 1, time.process_time)
        print(f"{name:34} {a * 1e3:>9.3f} {b * 1e3:>11.1f} {1 / middle:>12.0f}")


def key_agreement() -> None:
    """Print what one pair of sites costs."""
    context = Context("run", 1, 1, "a" * 64, "b" * 64, "c" * 64)
    print("\nKeys, microseconds of CPU a pair of sites (or a site)")
    print(f"{'':34} {'X25519':>9} {'hybrid':>9}")
    found: dict[str, list[float]] = {}
    for post_quantum in (False, True):
        pairs = [RoundSecrets.generate(post_quantum=post_quantum) for _ in range(2)]
        (one, two), parties = pairs, [s.party(i, f"site-{i}") for i, s in enumerate(pairs, 1)]
        a, b = parties
        wrapped = wrap_pair_secret(one.mask, context, a, b)
        sealed = seal_envelope(one.envelope, context, a, b, bytes(66))
        for name, call in _pair_steps(context, one, two, a, b, wrapped, sealed, post_quantum):
            start = time.process_time()
            for _ in range(200):
                call()
            found.setdefault(name, []).append((time.process_time() - start) / 200 * 1e6)
    for name, (classical, hybrid) in found.items():
        print(f"{name:34} {classical:>9.0f} {hybrid:>9.0f}")


def _pair_steps(
    context: Context,
    one: RoundSecrets,
    two: RoundSecrets,
    a: Party,
    b: Party,
    wrapped: bytes,
    sealed: bytes,
    post_quantum: bool,
) -> list[tuple[str, Callable[[], object]]]:
    rebuilt = bytes(two.mask.secret)
    return [
        ("a site's keys of a round", lambda: RoundSecrets.generate(post_quantum=post_quantum)),
        ("pair secret, wrapped", lambda: wrap_pair_secret(one.mask, context, a, b)),
        ("mask key, smaller index", lambda: mask_key(one.mask, context, a, b, wrapped)),
        ("mask key, larger index", lambda: mask_key(two.mask, context, b, a, wrapped)),
        ("envelope sealed", lambda: seal_envelope(one.envelope, context, a, b, bytes(66))),
        ("envelope opened", lambda: open_envelope(two.envelope, context, a, b, sealed)),
        ("key pair of a dropped site", lambda: KeyPair(rebuilt, "mask", post_quantum=post_quantum)),
    ]


def main() -> None:
    """Print the tables."""
    masking_against_others()
    two_cores_against_flower()
    whole_steps()
    sharing_against_flower()
    key_agreement()


if __name__ == "__main__":
    main()
