"""Who holds shares of whose secrets: all of all in a small cohort, some of some in a large one.

Up to 200 sites every site holds a share of every other's secrets, and each pair has a mask: the
complete graph. Above, each site picks ``degree`` *holders* for its secrets among the others, and
has a mask with each site that it picked or that picked it. Shares and masks then cost each site as
much as its degree and not as the cohort.

A site picks by itself, uniformly, from the operating system's randomness, and after it has seen the
signed cohort. So the coordinator has no say in it, and cannot try until it likes what it gets but
by giving up a whole attempt. Degree and threshold follow from the number of sites alone.

**What is assumed.** At most a third of the cohort works together with the coordinator, and who does
is settled before the holders are picked. Up to a tenth of the sites drop out, and no one chooses
which. The first is needed for secrecy, the second only for the sum to come about. The
probabilities below are of one attempt and for all of its sites together; a coordinator that gives
up an attempt and asks for another takes another draw.

**What must not happen, except with probability 2**-40.** Let ``k`` be the degree, ``t`` the
threshold, ``c`` how many of a site's holders are corrupt; the site itself has a share of its own
seed, so there are ``k + 1``.

* Both secrets of an honest site come out. An honest holder gives one kind of share, whatever it is
  told; corrupt ones give both. Two sets of ``t`` holders have at least ``2 t - k - 1`` in common,
  which must be more than ``c``.
* The sum of a few honest sites comes out, by the masks between them and all others being taken off.
  The coordinator may choose who counts as dropped after it has seen who picked whom, and may tell
  sites different lists. But a site masks only when ``t`` of its ``k + 1`` holders are among the
  senders that it is told, and its seed comes out only when ``t`` reveal. An honest holder that
  reveals has seen ``t`` of its own confirm the same list, hence no one can rebuild its mask secret.
  So at least ``2 t - k - 2`` of the picked holders have neither been kept from the site nor dropped
  out, and they must be corrupt or among the few. For a set of ``a`` honest sites each holder is so
  with the chance of ``c + a - 1`` marked sites in a draw of ``k``, independently for each site.

The second for a set of one is ``c >= 2 t - k - 2`` and includes the first. It decides: the sets of
two up to a sixth of the cohort together are less likely than 2**-70, and so is it that half of
the honest sites, with the corrupt, can open a sum of that many. Hence every sum that can be opened
holds at least a sixth of the cohort in honest sites, and two attempts at a round cannot both be
opened where two thirds of the first cohort must confirm. If all sites are told the same lists, no
part of the survivors can be opened but the whole.

**What must not happen, except with probability 2**-20:** of some site more than ``k - t`` holders
are lost when a tenth drops out.

All of these are tails of the hypergeometric distribution, computed in whole numbers: every site
finds the same degree, on any machine.

References:
    J. Bell, K. Bonawitz, A. Gascón, T. Lepoint, M. Raykova, "Secure Single-Server Aggregation with
    (Poly)Logarithmic Overhead", CCS 2020, section 4 (sites pick their neighbours, and what each
    must see confirmed) and the definitions there of what a good graph is.
"""

from __future__ import annotations

import bisect
import math
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

from lepton_fed.privacy.secagg.shamir import Randomness

__all__ = ["COMPLETE", "Graph", "Graphs", "rare"]

COMPLETE = 200
"""Most sites of a cohort in which everybody holds shares of everybody."""

_CORRUPT = 3  # one site of so many
_DROPPED = 10
_SECURITY_BITS = 40
_CORRECTNESS_BITS = 20
_DRAWN_BYTES = 8


@dataclass(frozen=True)
class Graph:
    """How many holders a site has, and how many of them give its secrets.

    Args:
        sites: How many sites the cohort has.
        degree: How many of the others hold shares of a site's secrets.
        threshold: How many holders must be there, must confirm, and give a secret; a site counts
            among its own.

    Raises:
        ValueError: The degree is not of so many sites, or not even all holders would do.
    """

    sites: int
    degree: int
    threshold: int

    def __post_init__(self) -> None:
        if not 0 <= self.degree < self.sites or not 1 <= self.threshold <= self.degree + 1:
            raise ValueError(
                f"no threshold of {self.threshold} of {self.degree} holders in {self.sites} sites"
            )

    @classmethod
    def of(cls, sites: int, threshold: int) -> Graph:
        """Return the graph of a cohort.

        Args:
            sites: How many sites it has.
            threshold: How many of them must stay; in the complete graph it serves for shares too.
        """
        if sites > COMPLETE:
            degree, of_holders = _smallest(sites)
            if degree < sites - 1:
                return cls(sites, degree, of_holders)
        return cls(sites, sites - 1, threshold)

    @property
    def is_complete(self) -> bool:
        """Return whether every site holds shares of every other."""
        return self.degree == self.sites - 1

    def holders(self, own: int, randomness: Randomness = secrets.token_bytes) -> tuple[int, ...]:
        """Pick the holders of a site's secrets, all sets of them with the same probability.

        Args:
            own: Index of the site in the cohort, from 1.
            randomness: Where the choice comes from; not asked in the complete graph.

        Returns:
            Their indices and the site's own, ascending.

        Raises:
            ValueError: The site is none of the cohort, or the source gives too little.
        """
        if not 1 <= own <= self.sites:
            raise ValueError(f"site {own} of {self.sites}")
        others = [index for index in range(1, self.sites + 1) if index != own]
        if not self.is_complete:
            # Fisher and Yates' shuffle as far as it is needed.
            for at in range(self.degree):
                other = at + _below(len(others) - at, randomness)
                others[at], others[other] = others[other], others[at]
        return tuple(sorted((own, *others[: self.degree])))


Graphs: TypeAlias = Callable[[int, int], Graph]
"""Gives the graph of a cohort from its number of sites and its threshold: :meth:`Graph.of`."""


def rare(population: int, marked: int, drawn: int, odds: int) -> int:
    """Return from how many hits on the hits of a draw are rare.

    Args:
        population: How many there are.
        marked: How many of them are hits.
        drawn: How many are drawn, without putting any back.
        odds: What is rare: a probability of at most one to this.

    Returns:
        The smallest number that is reached at most that often; one more than there can be if even
        the most that there can be come more often.
    """
    least, most = max(0, drawn - (population - marked)), min(marked, drawn)
    ways = math.comb(marked, most) * math.comb(population - marked, drawn - most)
    allowed, reached = math.comb(population, drawn) // odds, 0
    for hits in range(most, least - 1, -1):
        reached += ways
        if reached > allowed:
            return hits + 1
        # From the ways to so many hits to those to one less; the division leaves no rest.
        ways *= hits * (population - marked - drawn + hits)
        ways //= (marked - hits + 1) * (drawn - hits + 1)
    return least


@lru_cache(maxsize=64)
def _smallest(sites: int) -> tuple[int, int]:
    """Return degree and threshold; the degree is that of the complete graph if no other will do."""
    degrees = range(1, sites)
    at = bisect.bisect_left(degrees, True, key=lambda degree: _is_enough(sites, degree))
    degree = degrees[min(at, len(degrees) - 1)]
    return degree, _secure_threshold(sites, degree)


def _secure_threshold(sites: int, degree: int) -> int:
    corrupt = sites // _CORRUPT
    odds = (sites - corrupt) << _SECURITY_BITS  # any of the honest sites
    too_many = rare(sites - 1, corrupt, degree, odds)
    return -(-(degree + 2 + too_many) // 2)  # 2 t - k - 2 is at least that


def _is_enough(sites: int, degree: int) -> bool:
    lost = rare(sites - 1, sites // _DROPPED, degree, sites << _CORRECTNESS_BITS)
    return degree - _secure_threshold(sites, degree) + 1 >= lost


def _below(bound: int, randomness: Randomness) -> int:
    """Return a uniform number below a bound; what would make it uneven is drawn again."""
    even = (1 << 8 * _DRAWN_BYTES) // bound * bound
    while True:
        drawn = randomness(_DRAWN_BYTES)
        if len(drawn) != _DRAWN_BYTES:
            raise ValueError(f"the source gave {len(drawn)} random bytes, not {_DRAWN_BYTES}")
        number = int.from_bytes(drawn, "big")
        if number < even:
            return number % bound
