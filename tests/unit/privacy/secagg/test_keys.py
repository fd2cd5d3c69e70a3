"""Keys of a round: both ends and the coordinator agree, and nobody who should not."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
from cryptography.exceptions import UnsupportedAlgorithm

from lepton_fed.privacy.secagg import keys, shamir
from lepton_fed.privacy.secagg.context import Context
from lepton_fed.privacy.secagg.keys import (
    WRAPPED_BYTES,
    KeyPair,
    Party,
    PublicKey,
    RoundSecrets,
    agree,
    encapsulate,
    mask_key,
    self_mask_key,
    wrap_pair_secret,
    wrapping_party,
)
from tests.unit.privacy.secagg import naive
from tests.unit.privacy.secagg.published import random_bytes

CONTEXT = Context("run", 3, 1, "aa", "bb", "cc")
OTHER_VALUES = ("run2", 4, 2, "ab", "bc", "cd")
CONTEXTS = [
    dataclasses.replace(CONTEXT, **{field.name: value})
    for field, value in zip(dataclasses.fields(Context), OTHER_VALUES, strict=True)
]
P25519 = 2**255 - 19
# All points whose order divides 8, on the curve and its twist, in canonical and other encodings.
LOW_ORDER = [
    number.to_bytes(32, "little")
    for number in (
        0,
        1,
        325606250916557431795983626356110631294008115727848805560023387167927233504,
        39382357235489614581723060781553021112529911719440698176882885853963445705823,
        P25519 - 1,
        P25519,
        P25519 + 1,
        2**255,
        2**255 + 1,
        2**256 - 19 - 1,
    )
]


class Site:
    def __init__(self, index: int, *, post_quantum: bool, name: str = "") -> None:
        source = random_bytes(f"site {index}")
        self.secrets = RoundSecrets.generate(post_quantum=post_quantum, randomness=source)
        self.party = self.secrets.party(index, name or f"site-{index}")

    def wrap(self, other: Site, context: Context = CONTEXT) -> bytes:
        return wrap_pair_secret(self.secrets.mask, context, self.party, other.party)

    def key(self, other: Site, wrapped: bytes, context: Context = CONTEXT) -> bytes:
        return bytes(mask_key(self.secrets.mask, context, self.party, other.party, wrapped))


@pytest.fixture(params=[False, True], ids=["classical", "post-quantum"])
def sites(request: pytest.FixtureRequest) -> list[Site]:
    return [Site(index, post_quantum=request.param) for index in (1, 2, 3)]


@pytest.fixture
def hybrid() -> list[Site]:
    return [Site(index, post_quantum=True) for index in (1, 2, 3)]


def test_both_sites_find_the_same_key_and_no_two_pairs_do(sites: list[Site]) -> None:
    found = set()
    for low, high in itertools.combinations(sites, 2):
        wrapped = low.wrap(high)
        key = low.key(high, wrapped)
        assert key == high.key(low, wrapped)
        assert len(key) == (32 if wrapped else 16)
        found.add(key)
    assert len(found) == 3


def test_the_mask_secret_of_either_site_rebuilt_from_shares_gives_the_key(
    sites: list[Site],
) -> None:
    """What the coordinator does when one of the two drops out, whichever it is."""
    low, high = sites[:2]
    wrapped = low.wrap(high)
    expected = low.key(high, wrapped)
    for gone, stays in ((low, high), (high, low)):
        shares = shamir.split(gone.secrets.mask.secret, 5, 3)
        rebuilt = KeyPair(
            shamir.combine(dict(enumerate(shares, 1)), 3),
            "mask",
            post_quantum=bool(gone.party.mask.kem),
        )
        assert rebuilt.public == gone.party.mask
        assert mask_key(rebuilt, CONTEXT, gone.party, stays.party, wrapped) == expected


def test_a_rebuilt_secret_that_is_not_the_adverts_is_refused(sites: list[Site]) -> None:
    low, high, third = sites
    wrapped = low.wrap(high)
    with pytest.raises(ValueError, match="not the mask pair of site-1's advert"):
        mask_key(third.secrets.mask, CONTEXT, low.party, high.party, wrapped)
    with pytest.raises(ValueError, match="not the mask pair of site-1's advert"):
        wrap_pair_secret(third.secrets.mask, CONTEXT, low.party, high.party)
    # The same secret in the other pair is another key.
    swapped = KeyPair(low.secrets.mask.secret, "envelope", post_quantum=bool(low.party.mask.kem))
    assert swapped.public != low.party.mask


def test_every_part_of_the_round_and_both_adverts_count(sites: list[Site]) -> None:
    low, high, third = sites
    wrapped = low.wrap(high)
    found = {low.key(high, wrapped)}
    if not wrapped:
        found |= {low.key(high, b"", context) for context in CONTEXTS}
        renamed = Site(2, post_quantum=False, name="other")
        moved = Site(2, post_quantum=False)
        moved.party = dataclasses.replace(moved.party, index=9)
        other_envelope = Site(2, post_quantum=False)
        other_envelope.party = dataclasses.replace(high.party, envelope=third.party.envelope)
        found |= {low.key(site, b"") for site in (renamed, moved, other_envelope)}
        assert len(found) == 10
    else:
        for context in CONTEXTS:
            for one, two in ((low, high), (high, low)):
                with pytest.raises(ValueError, match="pair secret"):
                    one.key(two, wrapped, context)


def test_self_masks_have_keys_of_their_own(sites: list[Site]) -> None:
    seed, first = sites[0].secrets.self_mask, sites[0].party
    made = [self_mask_key(seed, context, first) for context in (CONTEXT, *CONTEXTS)]
    made += [self_mask_key(seed, CONTEXT, sites[1].party)]
    made += [self_mask_key(sites[1].secrets.self_mask, CONTEXT, sites[1].party)]
    assert len(set(map(bytes, made))) == 9
    assert {len(key) for key in made} == {32 if first.mask.kem else 16}
    with pytest.raises(ValueError, match="31 bytes, not 32"):
        self_mask_key(seed[:31], CONTEXT, sites[0].party)


@pytest.mark.parametrize("point", LOW_ORDER, ids=lambda point: point.hex()[:8])
def test_a_point_of_low_order_is_refused(point: bytes) -> None:
    site = Site(1, post_quantum=False)
    assert naive.x25519(site.secrets.mask.secret, point) == bytes(32)
    evil = Party(2, "evil", PublicKey(point), PublicKey(point))
    with pytest.raises(ValueError, match="low order"):
        mask_key(site.secrets.mask, CONTEXT, site.party, evil, b"")


def test_a_result_of_zero_is_refused_also_if_the_library_lets_it_pass() -> None:
    class Careless:
        def exchange(self, _: object) -> bytes:
            return bytes(32)

    pair = KeyPair(bytes(32), "mask", post_quantum=False)
    pair._x25519 = Careless()  # type: ignore[assignment]
    with pytest.raises(ValueError, match="low order"):
        pair.exchange(PublicKey(naive.BASE))


def test_x25519_is_that_of_rfc_7748_section_6_1() -> None:
    bob, bobs_public, alices_public, shared = (
        bytes.fromhex(text)
        for text in (
            "5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb",
            "de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f",
            "8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a",
            "4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742",
        )
    )
    assert naive.x25519(bob, naive.BASE) == bobs_public
    assert naive.x25519(bob, alices_public) == shared


def test_x25519_and_ml_kem_are_those_of_their_standards() -> None:
    pair = KeyPair(bytes(range(32)), "mask", post_quantum=True)
    site = naive.Site(1, "a", bytes(32), bytes(range(32)), bytes(32), hybrid=True)
    assert pair.public.encode() == site.public("mask")
    other = KeyPair(bytes(32), "mask", post_quantum=False)
    assert pair.exchange(other.public) == naive.x25519(site.scalar("mask"), other.public.x25519)
    shared, ciphertext = encapsulate(pair.public)
    assert naive.kem_decapsulate(site.kem_seed("mask"), ciphertext) == shared
    mangled = bytes([ciphertext[0] ^ 1]) + ciphertext[1:]
    rejected = pair.decapsulate(mangled)
    assert rejected == naive.kem_decapsulate(site.kem_seed("mask"), mangled)
    assert rejected != shared


@pytest.mark.parametrize("place", [0, 1087, 1088, 1135, 1136, 1167])
def test_a_changed_wrapped_secret_is_refused_by_the_one_it_is_for(
    hybrid: list[Site], place: int
) -> None:
    low, high, _ = hybrid
    changed = bytearray(low.wrap(high))
    changed[place] ^= 1
    with pytest.raises(ValueError, match=r"not wrapped for site-2|committed to another"):
        high.key(low, bytes(changed))


def test_a_wrapped_secret_of_another_pair_or_site_is_refused(hybrid: list[Site]) -> None:
    low, middle, high = hybrid
    with pytest.raises(ValueError, match="of site-1 was not wrapped for site-3"):
        high.key(low, low.wrap(middle))
    with pytest.raises(ValueError, match="of site-1 was not wrapped for site-3"):
        high.key(low, middle.wrap(high))
    with pytest.raises(ValueError, match="site-1 committed to another pair secret with site-3"):
        low.key(high, low.wrap(middle))


def test_who_wraps_another_than_the_derived_secret_is_named(
    hybrid: list[Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other site cannot tell; the coordinator, with the liar's secret rebuilt, can."""
    low, high, _ = hybrid
    with monkeypatch.context() as lying:
        lying.setattr(
            keys, "_pair_secret", lambda *_: bytearray(b"a lie of thirty-two bytes length")
        )
        wrapped = low.wrap(high)
    assert len(high.key(low, wrapped)) == 32
    with pytest.raises(ValueError, match="site-1 committed to another pair secret with site-2"):
        low.key(high, wrapped)


@pytest.mark.parametrize("length", [0, 1, 1088, WRAPPED_BYTES - 1, WRAPPED_BYTES + 1])
def test_a_wrapped_secret_of_another_length_is_refused(hybrid: list[Site], length: int) -> None:
    for one, two in ((0, 1), (1, 0)):
        with pytest.raises(ValueError, match=f"{length} bytes, not {WRAPPED_BYTES}"):
            hybrid[one].key(hybrid[two], bytes(length))


def test_nothing_wrapped_may_come_where_there_are_no_post_quantum_keys() -> None:
    low, high = (Site(index, post_quantum=False) for index in (1, 2))
    assert low.wrap(high) == b""
    with pytest.raises(ValueError, match="3 bytes"):
        low.key(high, b"abc")
    with pytest.raises(ValueError, match="no post-quantum key"):
        high.key(low, bytes(WRAPPED_BYTES))


def test_a_pair_falls_back_to_no_weaker_keys(hybrid: list[Site]) -> None:
    classical = Site(2, post_quantum=False)
    with pytest.raises(ValueError, match="only some keys of site-1 and site-2 are post-quantum"):
        hybrid[0].wrap(classical)
    half = dataclasses.replace(hybrid[1].party, mask=classical.party.mask)
    with pytest.raises(ValueError, match="only some keys"):
        agree(CONTEXT, "mask", hybrid[0].party, half)


def test_either_may_wrap_and_the_smaller_index_has_where_both_could(hybrid: list[Site]) -> None:
    low, high, last = hybrid
    for one, two in ((low, high), (high, low)):
        wrapped = one.wrap(two)
        found = {
            bytes(
                mask_key(own.secrets.mask, CONTEXT, own.party, other.party, wrapped, wrapper=maker)
            )
            for own, other in ((low, high), (high, low))
            for maker in (one.party,)
        }
        assert len(found) == 1, "both sites, and whoever rebuilt the secret of one, find the same"
    with pytest.raises(ValueError, match=r"not wrapped for site-2|committed to another"):
        high.key(low, high.wrap(low))  # as if the smaller index had
    parties = (low.party, high.party)
    assert wrapping_party(*parties, ["site-2"]) is high.party
    assert wrapping_party(*reversed(parties), ["site-2", "site-1"]) is low.party
    with pytest.raises(ValueError, match="hold no shares of each other"):
        wrapping_party(*parties, [last.party.name])


def test_nobody_wraps_for_itself(sites: list[Site]) -> None:
    with pytest.raises(ValueError, match=r"no pair: site-1 \(1\), site-1 \(1\)"):
        sites[0].wrap(sites[0])
    double = Site(2, post_quantum=bool(sites[0].party.mask.kem), name="site-1")
    with pytest.raises(ValueError, match="no pair"):
        sites[0].key(double, b"" if not sites[0].party.mask.kem else bytes(WRAPPED_BYTES))


def test_two_wrappings_differ_and_lead_to_different_masks(hybrid: list[Site]) -> None:
    low, high, _ = hybrid
    first, second = low.wrap(high), low.wrap(high)
    assert first != second
    assert low.key(high, first) != low.key(high, second)


def test_malformed_public_keys_are_refused() -> None:
    for length in (0, 31, 33, 1215, 1217):
        with pytest.raises(ValueError, match="not of 32 and 0 or 1184"):
            PublicKey.parse(bytes(length))
    good = KeyPair(bytes(32), "mask", post_quantum=True).public
    assert PublicKey.parse(good.encode()) == good
    beyond = PublicKey(good.x25519, b"\xff" * 1184)  # coefficients above the modulus
    with pytest.raises(ValueError, match="ML-KEM-768"):
        encapsulate(beyond)
    with pytest.raises(ValueError, match="ML-KEM-768"):
        encapsulate(PublicKey(good.x25519))
    with pytest.raises(ValueError, match="index 0"):
        Party(0, "a", good, good)


@pytest.mark.parametrize("length", [0, 31, 33])
def test_secrets_of_another_length_are_refused(length: int) -> None:
    right, wrong = bytes(32), bytes(length)
    for three in itertools.permutations([right, right, wrong]):
        with pytest.raises(ValueError, match=f"{length} bytes, not 32"):
            RoundSecrets(*three, post_quantum=False)


def test_secrets_come_whole_and_in_order_from_the_source() -> None:
    source = random_bytes("order")
    made = RoundSecrets.generate(post_quantum=False, randomness=random_bytes("order"))
    assert made.envelope.secret == source(32)
    assert made.mask.secret == source(32)
    assert made.self_mask == source(32)
    drawn = [RoundSecrets.generate(post_quantum=False) for _ in range(3)]
    everything = [bytes(s) for one in drawn for s in (one.envelope.secret, one.mask.secret)]
    assert len({*everything, *(bytes(one.self_mask) for one in drawn)}) == 9


def test_after_wiping_nothing_is_left_to_use(hybrid: list[Site]) -> None:
    low, high, _ = hybrid
    wrapped = low.wrap(high)
    held = [high.secrets.envelope.secret, high.secrets.mask.secret, high.secrets.self_mask]
    assert all(any(secret) for secret in held)
    high.secrets.wipe()
    assert not any(any(secret) for secret in held)
    assert {len(secret) for secret in held} == {32}
    for use in (
        lambda: high.secrets.mask.secret,
        lambda: high.secrets.mask.decapsulate(wrapped[:1088]),
        lambda: high.secrets.envelope.exchange(low.party.envelope),
        lambda: high.key(low, wrapped),
    ):
        with pytest.raises(ValueError, match="wiped"):
            use()


def test_a_pair_does_not_show_its_secret() -> None:
    secret = b"\xab" * 32
    pair = KeyPair(secret, "mask", post_quantum=True)
    assert repr(pair) == f"KeyPair(mask, {pair.public.digest[:8]})"
    assert str(secret) not in str(vars(pair.public))


def test_whether_ml_kem_is_there_can_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert keys.post_quantum_available()

    class Missing:
        @staticmethod
        def from_seed_bytes(_: bytes) -> None:
            raise UnsupportedAlgorithm("not here")

    monkeypatch.setattr(keys, "MLKEM768PrivateKey", Missing)
    assert not keys.post_quantum_available()
    assert KeyPair(bytes(32), "mask", post_quantum=False).public.kem == b""
    with pytest.raises(UnsupportedAlgorithm):
        RoundSecrets.generate(post_quantum=True)
