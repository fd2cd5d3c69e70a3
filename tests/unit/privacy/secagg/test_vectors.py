"""Published vectors: the file, the naive implementation and the fast modules say the same."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from lepton_fed.privacy.secagg import masks, packing, shamir
from lepton_fed.privacy.secagg.context import Context, commit, opens
from lepton_fed.privacy.secagg.envelopes import open_envelope, seal_envelope
from lepton_fed.privacy.secagg.keys import Party, PublicKey, RoundSecrets, mask_key, self_mask_key
from tests.unit.privacy.secagg import naive
from tests.unit.privacy.secagg.published import FILE, random_bytes, vectors

VECTORS: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
CONTEXT = Context(**VECTORS["context"])


class Cohort:
    """The three published sites, from their secrets."""

    def __init__(self, vector: dict[str, Any]) -> None:
        self.vector = vector
        self.secrets = [
            RoundSecrets(
                *(bytes.fromhex(one[f"{name}_secret"]) for name in ("envelope", "mask")),
                bytes.fromhex(one["self_mask_secret"]),
                post_quantum=vector["post_quantum"],
            )
            for one in vector["sites"]
        ]
        self.parties = [
            secrets.party(one["index"], one["name"])
            for secrets, one in zip(self.secrets, vector["sites"], strict=True)
        ]

    def __getitem__(self, index: int) -> tuple[RoundSecrets, Party]:
        return self.secrets[index - 1], self.parties[index - 1]


@pytest.fixture(params=VECTORS["cohorts"], ids=["classical", "post-quantum"])
def cohort(request: pytest.FixtureRequest) -> Cohort:
    return Cohort(request.param)


def test_the_published_file_is_what_the_naive_implementation_makes() -> None:
    assert vectors() == VECTORS


def test_the_context_is_bound_as_published() -> None:
    assert CONTEXT.bind("mask", sites=[1, 2]).decode() == VECTORS["bound"]


@pytest.mark.parametrize("vector", VECTORS["commitments"], ids=lambda v: v["kind"])
def test_commitments_are_as_published(vector: dict[str, Any]) -> None:
    secret, committed = (bytes.fromhex(vector[name]) for name in ("secret", "commitment"))
    about = {"owner": vector["owner"], "holder": vector["holder"]}
    assert commit(CONTEXT, vector["kind"], secret, **about) == committed
    assert opens(committed, CONTEXT, vector["kind"], secret, **about)


@pytest.mark.parametrize("vector", VECTORS["masks"])
def test_masks_are_as_published(vector: dict[str, Any]) -> None:
    words, bits = vector["words"], vector["bits"]
    made = masks.stream(bytes.fromhex(vector["key"]), len(words), bits=bits, start=vector["start"])
    assert made.tolist() == words
    assert made.dtype == (np.uint32 if bits <= 32 else np.uint64)


@pytest.mark.parametrize("vector", VECTORS["packing"], ids=lambda v: v["bits"])
def test_packing_is_as_published(vector: dict[str, Any]) -> None:
    bits = vector["bits"]
    words = np.array(vector["words"], dtype=masks.words_dtype(bits))
    packed = bytes.fromhex(vector["packed"])
    assert packing.pack(words, bits) == packed
    assert packing.unpack(packed, words.size, bits).tolist() == words.tolist()


@pytest.mark.parametrize("vector", VECTORS["sharing"], ids=lambda v: v["coefficients_label"])
def test_shares_are_as_published(vector: dict[str, Any]) -> None:
    assert VECTORS["prime"] == shamir.PRIME
    secret, shares = bytes.fromhex(vector["secret"]), vector["shares"]
    source = random_bytes(vector["coefficients_label"])
    made = shamir.split(secret, len(shares), vector["threshold"], source)
    assert [share.hex() for share in made] == shares
    assert shamir.combine(dict(enumerate(made, 1)), vector["threshold"]) == secret
    assert naive.interpolate(dict(enumerate(made, 1))) == int.from_bytes(secret, "big")


def test_public_keys_follow_from_the_secrets(cohort: Cohort) -> None:
    for party, one in zip(cohort.parties, cohort.vector["sites"], strict=True):
        for published, key in (("mask", party.mask), ("envelope", party.envelope)):
            encoded = bytes.fromhex(one[f"{published}_public"])
            assert key.encode() == encoded
            assert PublicKey.parse(encoded) == key


def test_both_sites_and_the_coordinator_find_the_published_mask_keys(cohort: Cohort) -> None:
    for pair in cohort.vector["pairs"]:
        (low, low_party), (high, high_party) = (cohort[index] for index in pair["sites"])
        wrapped, key = bytes.fromhex(pair["wrapped"]), bytes.fromhex(pair["mask_key"])
        assert mask_key(low.mask, CONTEXT, low_party, high_party, wrapped) == key
        assert mask_key(high.mask, CONTEXT, high_party, low_party, wrapped) == key
    for index, one in enumerate(cohort.vector["sites"], 1):
        secrets, party = cohort[index]
        assert self_mask_key(secrets.self_mask, CONTEXT, party).hex() == one["self_mask_key"]


def test_masked_vectors_and_their_sum_are_as_published(cohort: Cohort) -> None:
    bits = cohort.vector["bits"]
    total = np.zeros(len(cohort.vector["sum"]), dtype=np.uint32)
    self_keys = [bytes.fromhex(one["self_mask_key"]) for one in cohort.vector["sites"]]
    for index, update in enumerate(cohort.vector["updates"], 1):
        signed: dict[int, list[bytes]] = {1: [self_keys[index - 1]], -1: []}
        for pair in cohort.vector["pairs"]:
            if index in pair["sites"]:
                (other,) = set(pair["sites"]) - {index}
                signed[masks.pair_sign(index, other)].append(bytes.fromhex(pair["mask_key"]))
        words = np.array(update, dtype=np.uint32)
        masks.apply(words, plus=signed[1], minus=signed[-1], bits=bits)
        assert words.tolist() == cohort.vector["masked"][index - 1]
        total += words
    masks.apply(total, minus=self_keys, bits=bits)
    assert total.tolist() == cohort.vector["sum"]


def test_the_published_envelope_opens_and_is_sealed_again(cohort: Cohort) -> None:
    vector = cohort.vector["envelope"]
    content, beside, nonce, sealed = (
        bytes.fromhex(vector[name]) for name in ("content", "bound", "nonce", "sealed")
    )
    (sender, sending), (recipient, receiving) = (
        cohort[vector[name]] for name in ("sender", "recipient")
    )
    opened = open_envelope(recipient.envelope, CONTEXT, sending, receiving, sealed, bound=beside)
    assert opened == content
    again = seal_envelope(
        sender.envelope,
        CONTEXT,
        sending,
        receiving,
        content,
        bound=beside,
        randomness=lambda count: nonce[:count],
    )
    if not cohort.vector["post_quantum"]:  # the library draws an encapsulation's randomness itself
        assert again == sealed
    assert len(again) == len(sealed)
    assert open_envelope(
        recipient.envelope, CONTEXT, sending, receiving, again, bound=beside
    ) == content  # fmt: skip
