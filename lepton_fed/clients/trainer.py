"""The training child of a site: holds the rows, answers asks, and can be killed.

``python -m lepton_fed.clients.trainer`` speaks frames on its standard input and output. It reads
the site's rows once and keeps them over rounds and runs. It ends at once when its parent does, so
that the ledger is free for the next one.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from lepton_fed.clients.answers import Answers
from lepton_fed.clients.frames import read_frame, write_frame
from lepton_fed.clients.own_ledger import open_ledger
from lepton_fed.clients.own_rows import OwnRows
from lepton_fed.clients.site import Site
from lepton_fed.config.agreement import Agreement
from lepton_fed.config.schema import ClientConf
from lepton_fed.core.decode import decode
from lepton_fed.core.exchange import Ask
from lepton_fed.errors import LeptonError, Problem
from lepton_fed.strategies.build import build_strategy
from lepton_fed.training.device import devices_of
from lepton_fed.training.kit import build_kit

__all__ = ["Trainer", "main"]

_WATCH_S = 0.5

_log = logging.getLogger("lepton_fed.site")


class Trainer:
    """What the child holds: the rows as read, and the site of the run in progress.

    Args:
        conf: The site's conf.
    """

    def __init__(self, conf: ClientConf) -> None:
        self._conf = conf
        self._rows = OwnRows(conf)
        self._site: Site | None = None

    def begin(self, agreement: Agreement) -> dict[str, Any]:
        """Get ready for a run; the one before is over.

        Raises:
            LeptonError: Data, model, privacy or budget do not allow it.
        """
        self.close()
        conf = self._conf
        devices = devices_of(conf.device)
        kit = build_kit(agreement.task, agreement.seed)
        strategy = build_strategy(agreement.strategy)
        training, held_out = self._rows.split(agreement)
        ledger = None
        if agreement.privacy.record.enabled:
            contract = agreement.task.data
            ledger = open_ledger(conf, self._rows.identity, lambda: self._rows.read(contract))
        self._site = Site(
            conf.name,
            kit,
            strategy.site,
            training,
            held_out,
            agreement,
            devices=devices,
            folder=Path(conf.state),
            ledger=ledger,
            coordinator=conf.coordinator,
            answers=Answers(Path(conf.state) / "answers", agreement.digest),
            noise_bytes=conf.policy.noise_bytes,
        )
        return {
            "layout": kit.layout.digest,
            "vectors": list(strategy.site.vectors),
            "size": kit.layout.size,
            "counts": kit.plan.size,
            "rows": len(training) + len(held_out),
            "noise_multiplier": self._site.noise_multiplier,
        }

    def budget_left(self) -> float | None:
        """Return the epsilon neither spent nor reserved; None where no run keeps a ledger."""
        return self._site.budget_left if self._site else None

    def answer(self, ask: Ask) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return head and arrays of the answer to an ask."""
        if self._site is None:
            raise RuntimeError("begin() comes first")
        reply = self._site.answer(ask)
        head: dict[str, Any] = {
            "refusal": asdict(reply.refusal) if reply.refusal else None,
            "epsilon": reply.epsilon,
            "noise_multiplier": reply.noise_multiplier,
            "counts": reply.counts is not None,
            "again": reply.again,
            "update": None,
        }
        arrays: dict[str, Any] = {}
        if reply.update is not None:
            update = reply.update
            head["update"] = {
                "layout": update.layout, "weight": update.weight, "norms": dict(update.norms)
            }  # fmt: skip
            arrays |= {f"vector/{name}": vector for name, vector in update.vectors.items()}
        if reply.counts is not None:
            arrays["counts"] = reply.counts
        return head, arrays

    def close(self) -> None:
        """Let go of the run in progress."""
        if self._site is not None:
            self._site.close()
            self._site = None


def main() -> None:
    """Answer frames until the parent is gone."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    threading.Thread(target=_watch, args=(os.getppid(),), daemon=True).start()
    source, sink = _own_streams()
    trainer: Trainer | None = None
    try:
        while True:
            head, arrays = read_frame(source)
            if head["do"] == "open":
                trainer = Trainer(decode(ClientConf, head["conf"]))
                write_frame(sink, {"ok": True})
            elif trainer is None:
                raise ValueError("the first frame opens")
            elif head["do"] == "begin":
                _begin(trainer, head, sink)
            elif head["do"] == "budget":
                write_frame(sink, {"left": trainer.budget_left()})
            else:
                ask = Ask(**head["ask"], vectors=arrays)
                write_frame(sink, *trainer.answer(ask))
    except (EOFError, KeyboardInterrupt):
        pass
    finally:
        if trainer is not None:
            trainer.close()


def _begin(trainer: Trainer, head: dict[str, Any], sink: IO[bytes]) -> None:
    try:
        write_frame(sink, {"ready": trainer.begin(decode(Agreement, head["agreement"]))})
    except LeptonError as error:
        write_frame(sink, {"problems": [asdict(problem) for problem in error.problems]})
    except Exception:  # noqa: BLE001 - whatever went wrong, only a code goes further
        _log.exception("site.failed begin")
        write_frame(sink, {"problems": [asdict(Problem("LF5301", "it could not begin"))]})


def _own_streams() -> tuple[IO[bytes], IO[bytes]]:
    """Return what frames come from and go to, out of the reach of libraries.

    What one prints goes to the log, and one that asks a question reads nothing.
    """
    sys.stdout.flush()
    source, sink = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return source, sink


def _watch(parent: int) -> None:
    """End this process, whatever it does, once its parent is gone."""
    while os.getppid() == parent:
        time.sleep(_WATCH_S)
    os._exit(1)


if __name__ == "__main__":
    main()
