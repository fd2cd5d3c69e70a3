"""The primitives put together by hand: a round without messages, drop-outs, the sum of the rest."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lepton_fed.privacy.secagg import masks, packing
from lepton_fed.privacy.secagg.context import commit, opens
from lepton_fed.privacy.secagg.envelopes import open_envelope, seal_envelope
from lepton_fed.privacy.secagg.keys import KeyPair, mask_key, self_mask_key
from lepton_fed.privacy.secagg.shamir import SHARE_BYTES, Weights, split
from tests.unit.privacy.secagg.test_keys import CONTEXT, Site

SIZE = 33


class Round:
    """Adverts and envelopes of a cohort: what stands before anybody masks."""

    def __init__(self, count: int, *, post_quantum: bool) -> None:
        self.threshold = count * 2 // 3 + 1
        self.sites = {i: Site(i, post_quantum=post_quantum) for i in range(1, count + 1)}
        self.wrapped = {
            (i, j): low.wrap(high)
            for i, low in self.sites.items()
            for j, high in self.sites.items()
            if i < j
        }
        self.held: dict[int, dict[int, bytearray]] = {i: {} for i in self.sites}
        for i, sender in self.sites.items():
            shared = [
                split(secret, count, self.threshold)
                for secret in (sender.secrets.self_mask, sender.secrets.mask.secret)
            ]
            for j, recipient in self.sites.items():
                content = shared[0][j - 1] + shared[1][j - 1]
                if i != j:
                    sealed = seal_envelope(
                        sender.secrets.envelope, CONTEXT, sender.party, recipient.party, content
                    )
                    content = open_envelope(
                        recipient.secrets.envelope, CONTEXT, sender.party, recipient.party, sealed
                    )
                self.held[j][i] = bytearray(content)

    def pair(self, i: int, j: int) -> bytes:
        return self.wrapped[min(i, j), max(i, j)]

    def masked(self, i: int, update: np.ndarray, bits: int) -> bytes:
        """Return what a site sends: its update under its own mask and those of all others."""
        site = self.sites[i]
        signed: dict[int, list[bytes | bytearray]] = {1: [], -1: []}
        signed[1].append(self_mask_key(site.secrets.self_mask, CONTEXT, site.party))
        for j, other in self.sites.items():
            if j != i:
                signed[masks.pair_sign(i, j)].append(site.key(other, self.pair(i, j)))
        words = update.copy()
        masks.apply(words, plus=signed[1], minus=signed[-1], bits=bits)
        return packing.pack(words, bits)

    def revealed(self, answering: list[int], owner: int, *, dropped: bool) -> bytes:
        """Return the mask secret of a site that dropped out, or the self mask of another."""
        begin = SHARE_BYTES if dropped else 0
        shares = {j: bytes(self.held[j][owner][begin : begin + SHARE_BYTES]) for j in answering}
        return Weights.at(answering, self.threshold).combine(shares)

    def unmasked(self, sent: dict[int, bytes], answering: list[int], bits: int) -> np.ndarray:
        """Return the sum of those who sent, as the coordinator finds it."""
        total = np.zeros(SIZE, dtype=masks.words_dtype(bits))
        for packed in sent.values():
            total += packing.unpack(packed, SIZE, bits)
        signed: dict[int, list[bytes | bytearray]] = {1: [], -1: []}
        for i in sent:
            seed = self.revealed(answering, i, dropped=False)
            signed[1].append(self_mask_key(seed, CONTEXT, self.sites[i].party))
        for gone in set(self.sites) - set(sent):
            secret = self.revealed(answering, gone, dropped=True)
            party = self.sites[gone].party
            rebuilt = KeyPair(secret, "mask", post_quantum=bool(party.mask.kem))
            for i in sent:
                key = mask_key(rebuilt, CONTEXT, party, self.sites[i].party, self.pair(gone, i))
                signed[masks.pair_sign(i, gone)].append(key)
        masks.apply(total, plus=signed[-1], minus=signed[1], bits=bits)
        return total


@pytest.fixture(scope="module", params=[False, True], ids=["classical", "post-quantum"])
def cohort(request: pytest.FixtureRequest) -> Round:
    return Round(6, post_quantum=request.param)


@given(
    order=st.permutations(range(1, 7)),
    dropped=st.integers(0, 1),
    silent=st.integers(0, 1),
    bits=st.sampled_from([20, 32, 40]),
)
@settings(max_examples=25, deadline=None)
def test_the_sum_of_those_who_sent_is_exact_whoever_drops_out(
    cohort: Round, order: list[int], dropped: int, silent: int, bits: int
) -> None:
    """Some drop out before they send, others after they sent but before they answer."""
    sending, answering = order[dropped:], order[dropped : 6 - silent]
    updates = {
        i: masks.stream(bytes([i]) * 16, SIZE, bits=bits) for i in sending
    }  # any words will do
    sent = {i: cohort.masked(i, update, bits) for i, update in updates.items()}
    if len(answering) < cohort.threshold:
        with pytest.raises(ValueError, match="are needed"):
            cohort.unmasked(sent, answering, bits)
        return
    expected = [
        sum(column) % 2**bits
        for column in zip(*(update.tolist() for update in updates.values()), strict=True)
    ]
    assert cohort.unmasked(sent, answering, bits).tolist() == expected


def test_who_sent_a_false_share_is_found_by_its_commitment(cohort: Round) -> None:
    """One commitment for each share, in the owner's signed advert, names who changed it."""
    owner, kind = 2, "share of self mask"
    committed = {
        j: commit(CONTEXT, kind, held[owner][:SHARE_BYTES], owner=owner, holder=j)
        for j, held in cohort.held.items()
    }
    shares = {j: bytes(held[owner][:SHARE_BYTES]) for j, held in cohort.held.items()}
    shares[5] = shares[4]  # not even changed: another's, taken for its own
    false = [
        j
        for j, share in shares.items()
        if not opens(committed[j], CONTEXT, kind, share, owner=owner, holder=j)
    ]
    assert false == [5]
    del shares[5]
    found = Weights.at(list(shares), cohort.threshold).combine(shares)
    assert found == cohort.sites[owner].secrets.self_mask
