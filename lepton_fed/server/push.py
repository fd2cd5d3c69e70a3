"""The coordinator's half of a push: a bundle to every site, in chunks, from where each stands."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from lepton_fed.core.exchange import PushReply, PushStep
from lepton_fed.errors import Problem
from lepton_fed.export.bundle import VerifiedBundle
from lepton_fed.export.manifest import MANIFEST, SIGNATURE

__all__ = ["PushOutcome", "push_bundle"]

_CHUNK_BYTES = 4 * 1024 * 1024
_MOST_RETRIES = 3


@dataclass
class PushOutcome:
    """What came of a push at one site.

    Args:
        bytes_sent: Bytes of the bundle that were sent now; what was there before is not.
        in_force: Version in use there, as it says; 0 for none.
        refusal: Why it was not taken; None when it was.
    """

    bytes_sent: int = 0
    in_force: int = 0
    refusal: Problem | None = None


Exchange = Callable[[Mapping[str, PushStep]], Iterator[PushReply]]


def push_bundle(
    bundle: VerifiedBundle,
    sites: Sequence[str],
    exchange: Exchange,
    *,
    chunk_bytes: int = _CHUNK_BYTES,
) -> dict[str, PushOutcome]:
    """Hand a bundle to sites.

    Every round of messages carries one step for each site that is still taking part; a site that
    refuses is out. A reply that is lost is asked for again.

    Args:
        bundle: What is pushed.
        sites: Names of the sites.
        exchange: Sends each site its step and yields what they say.
        chunk_bytes: Most bytes of a chunk.

    Returns:
        What came of it, by site.
    """
    push = _Push(bundle, sites, chunk_bytes)
    while push.pending:
        steps = {site: push.step(site) for site in push.pending}
        heard = set()
        for reply in exchange(steps):
            heard.add(reply.site)
            push.hear(reply, steps[reply.site])
        for site in set(steps) - heard:
            push.hear(PushReply(site, refusal=Problem("LF5306", "no reply")), steps[site])
    return push.outcomes


class _Push:
    """Where each site stands."""

    def __init__(self, bundle: VerifiedBundle, sites: Sequence[str], chunk_bytes: int) -> None:
        self._files = bundle.files
        self._manifest = (bundle.folder / MANIFEST).read_bytes()
        self._signature = (bundle.folder / SIGNATURE).read_bytes()
        self._id = hashlib.sha256(self._manifest).hexdigest()
        self._version = bundle.manifest.version
        self._chunk_bytes = chunk_bytes
        self._have: dict[str, Mapping[str, int] | None] = dict.fromkeys(sites)
        self._lost = dict.fromkeys(sites, 0)
        self.outcomes = {site: PushOutcome() for site in sites}
        self.pending = sorted(sites)

    def step(self, site: str) -> PushStep:
        have = self._have[site]
        if have is None:
            return PushStep("begin", self._id, self._manifest, self._signature)
        for name, content in sorted(self._files.items()):
            start = have.get(name, 0)
            if start < len(content):
                data = bytes(content[start : start + self._chunk_bytes])
                return PushStep("chunk", self._id, file=name, offset=start, data=data)
        return PushStep("finish", self._id)

    def hear(self, reply: PushReply, step: PushStep) -> None:
        outcome = self.outcomes[reply.site]
        if reply.refusal is not None:
            self._lost[reply.site] += 1
            again = reply.refusal.code in _TRY_AGAIN and self._lost[reply.site] <= _MOST_RETRIES
            if again:
                self._have[reply.site] = None  # ask what it has
                return
            outcome.refusal = reply.refusal
            self.pending.remove(reply.site)
            return
        outcome.in_force = reply.in_force or outcome.in_force
        if step.step == "finish":
            if reply.in_force != self._version:
                what = f"version {reply.in_force} is in use there after the push"
                outcome.refusal = Problem("LF4127", what, where=reply.site)
            self.pending.remove(reply.site)
            return
        if step.step == "chunk":
            before = self._have[reply.site] or {}
            if reply.have.get(step.file, 0) <= before.get(step.file, 0):
                self._lost[reply.site] += 1
                if self._lost[reply.site] > _MOST_RETRIES:
                    outcome.refusal = Problem("LF4128", "it takes no further bytes", reply.site)
                    self.pending.remove(reply.site)
                    return
            else:
                outcome.bytes_sent += len(step.data)
        self._have[reply.site] = reply.have


_TRY_AGAIN = frozenset({"LF4124", "LF5303", "LF5304", "LF5306"})
