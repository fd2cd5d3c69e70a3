"""Share envelopes: opened by one site, from one site, in one round, with what came beside."""

from __future__ import annotations

import dataclasses

import pytest

from lepton_fed.privacy.secagg.context import Context
from lepton_fed.privacy.secagg.envelopes import envelope_bytes, open_envelope, seal_envelope
from tests.unit.privacy.secagg.test_keys import CONTEXT, CONTEXTS, Site

CONTENT = bytes(range(66))


@pytest.fixture(params=[False, True], ids=["classical", "post-quantum"])
def sites(request: pytest.FixtureRequest) -> list[Site]:
    return [Site(index, post_quantum=request.param) for index in (1, 2, 3)]


def seal(sender: Site, recipient: Site, *, bound: bytes = b"", context: Context = CONTEXT) -> bytes:
    return seal_envelope(
        sender.secrets.envelope, context, sender.party, recipient.party, CONTENT, bound=bound
    )


def opened(
    sender: Site,
    recipient: Site,
    envelope: bytes,
    *,
    bound: bytes = b"",
    context: Context = CONTEXT,
) -> bytearray:
    return open_envelope(
        recipient.secrets.envelope, context, sender.party, recipient.party, envelope, bound=bound
    )


def test_content_comes_back_in_either_direction(sites: list[Site]) -> None:
    first, second, _ = sites
    for sender, recipient in ((first, second), (second, first)):
        envelope = seal(sender, recipient, bound=b"beside")
        assert CONTENT not in envelope
        size = envelope_bytes(len(CONTENT), post_quantum=bool(sender.party.mask.kem))
        assert len(envelope) == size
        assert opened(sender, recipient, envelope, bound=b"beside") == CONTENT


def test_the_content_can_be_wiped(sites: list[Site]) -> None:
    assert isinstance(opened(sites[0], sites[1], seal(sites[0], sites[1])), bytearray)


def test_no_two_envelopes_of_the_same_content_are_alike(sites: list[Site]) -> None:
    assert len({seal(sites[0], sites[1]) for _ in range(5)}) == 5


def test_an_envelope_is_of_no_use_elsewhere(sites: list[Site]) -> None:
    first, second, third = sites
    envelope = seal(first, second, bound=b"beside")
    for sender, recipient in ((second, first), (third, second), (first, third), (second, third)):
        with pytest.raises(ValueError, match="was not made by"):
            opened(sender, recipient, envelope, bound=b"beside")
    for bound in (b"", b"besides"):
        with pytest.raises(ValueError, match="not made by site-1 for site-2 in this round"):
            opened(first, second, envelope, bound=bound)
    for context in CONTEXTS:
        with pytest.raises(ValueError, match="in this round"):
            opened(first, second, envelope, bound=b"beside", context=context)
    another_mask = dataclasses.replace(first.party, mask=third.party.mask)
    first.party = another_mask  # an advert with one key exchanged
    with pytest.raises(ValueError, match="in this round"):
        opened(first, second, envelope, bound=b"beside")


def test_every_byte_of_an_envelope_counts(sites: list[Site]) -> None:
    first, second, _ = sites
    envelope = seal(first, second)
    head = len(envelope) - envelope_bytes(len(CONTENT), post_quantum=False)
    for place in [*range(0, head, 97), *range(head, len(envelope))]:
        changed = bytearray(envelope)
        changed[place] ^= 0x80
        with pytest.raises(ValueError, match="was not made by"):
            opened(first, second, bytes(changed))
    with pytest.raises(ValueError, match="was not made by"):
        opened(first, second, envelope + b"\0")
    for length in range(0, len(envelope), 13):
        with pytest.raises(ValueError, match=r"was not made by|has only"):
            opened(first, second, envelope[:length])


def test_an_envelope_without_content_is_possible_and_one_byte_less_is_not(
    sites: list[Site],
) -> None:
    first, second, _ = sites
    empty = seal_envelope(first.secrets.envelope, CONTEXT, first.party, second.party, b"")
    assert opened(first, second, empty) == b""
    with pytest.raises(ValueError, match=f"has only {len(empty) - 1} bytes"):
        opened(first, second, empty[:-1])


def test_only_the_owner_of_a_pair_seals_and_opens_with_it(sites: list[Site]) -> None:
    first, second, third = sites
    with pytest.raises(ValueError, match="not the envelope pair of site-1's advert"):
        seal_envelope(third.secrets.envelope, CONTEXT, first.party, second.party, CONTENT)
    with pytest.raises(ValueError, match="not the envelope pair of site-1's advert"):
        seal_envelope(first.secrets.mask, CONTEXT, first.party, second.party, CONTENT)
    envelope = seal(first, second)
    with pytest.raises(ValueError, match="not the envelope pair of site-2's advert"):
        open_envelope(third.secrets.envelope, CONTEXT, first.party, second.party, envelope)


def test_a_rebuilt_mask_secret_opens_no_envelope(sites: list[Site]) -> None:
    first, second, _ = sites
    envelope = seal(first, second)
    second.party = dataclasses.replace(second.party, envelope=second.party.mask)
    second.secrets.envelope = second.secrets.mask
    with pytest.raises(ValueError, match="was not made by"):
        opened(first, second, envelope)
