"""Seeds by hashing: every random choice has a name, and the name gives the seed.

A seed is SHA-256 over (run seed, round, site, purpose), so two choices never share a stream, the
order in which sites are visited does not matter, and a new purpose disturbs none of the others.
Never used for anything that differential privacy or cryptography depends on.
"""

from __future__ import annotations

import numpy as np

from lepton_fed.core.digests import digest_of

__all__ = ["derive_seed", "generator"]


def derive_seed(run_seed: int, purpose: str, *, round_number: int = 0, site: str = "") -> int:
    """Return the seed of one random choice.

    Args:
        run_seed: Seed of the run, from its conf.
        purpose: What is drawn: ``"init"``, ``"select"``, ``"shuffle"``, ...
        round_number: Round, from 1; 0 for choices made once a run.
        site: Name of the site; empty for the coordinator's choices.

    Returns:
        A number in [0, 2**63), which both numpy and torch accept.
    """
    name = {"run": run_seed, "round": round_number, "site": site, "purpose": purpose}
    return int(digest_of("lepton-fed seed 1", name)[:16], 16) >> 1


def generator(
    run_seed: int, purpose: str, *, round_number: int = 0, site: str = ""
) -> np.random.Generator:
    """Return a numpy generator for one random choice; the arguments are :func:`derive_seed`'s."""
    seed = derive_seed(run_seed, purpose, round_number=round_number, site=site)
    return np.random.Generator(np.random.PCG64(seed))
