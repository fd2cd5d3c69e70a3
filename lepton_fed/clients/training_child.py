"""The worker's hold on the training child: ask, wait so long and no longer, kill, start again.

A child that hangs is killed long before its time is up: the SuperNode takes no other message while
it waits for an answer, so that the site would be lost to the federation until then.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from lepton_fed.clients.frames import Arrays, read_frame, write_frame
from lepton_fed.clients.stall import StallWatch
from lepton_fed.config.agreement import Agreement
from lepton_fed.config.schema import ClientConf
from lepton_fed.core.digests import plain
from lepton_fed.core.exchange import Ask, Reply, Update
from lepton_fed.errors import Problem, Refused, RunError
from lepton_fed.privacy.masked_plan import Shape

__all__ = ["TrainingChild"]

_BEGIN_S = 900.0
_CLOSE_S = 5.0
_LOOK_S = 1.0
_HUNG_LOOKS = 60
_HUNG_LOOKS_READING = 300  # a reader may wait for somebody's database

# What another child may be spared: an import that failed half-way, on a full disk, fails for the
# life of its process.
_UNEXPECTED = "LF5301"
_MOST_UNEXPECTED = 2  # in a row: the first may be the round's, and a child holds a run's state

_log = logging.getLogger("lepton_fed.site")


class TrainingChild:
    """A process that trains, started when it is first needed, or before: see :meth:`warm`.

    Args:
        conf: The site's conf.
        command: Starts it; another in tests.
        watch: From its process group and a number of looks to what tells that it hangs.
    """

    def __init__(
        self,
        conf: ClientConf,
        command: list[str] | None = None,
        watch: Callable[[int, int], StallWatch] = StallWatch,
    ) -> None:
        self._conf = conf
        self._watch = watch
        self._command = command or [sys.executable, "-m", "lepton_fed.clients.trainer"]
        self._process: subprocess.Popen[bytes] | None = None
        self._opened = False  # whether it has the conf
        self._ready = ""
        self._shape: Shape | None = None
        self._busy = False
        self._closed = False
        self._unexpected = 0

    def warm(self) -> None:
        """Start the child, if it is not there: its imports take seconds, of which a round has few.

        Nobody may ask it anything meanwhile.
        """
        if not self._alive():
            self._drop()
            self._spawn()

    def begin(self, agreement: Agreement) -> Shape:
        """Get the child ready for a run, unless it is.

        Args:
            agreement: The run.

        Returns:
            What an update is made of.

        Raises:
            LeptonError: Data, model, privacy or budget do not allow it.
            RunError: LF5310, the child took too long; LF5311, it died; LF5314, it hung.
        """
        if self._ready == agreement.digest and self._alive() and self._shape is not None:
            return self._shape
        self._ready = ""
        head, _ = self._ask(
            {"do": "begin", "agreement": plain(agreement)}, {}, _BEGIN_S, _HUNG_LOOKS_READING
        )
        if "problems" in head:
            if any(problem["code"] == _UNEXPECTED for problem in head["problems"]):
                self._drop()
            raise Refused([Problem(**problem) for problem in head["problems"]])
        self._ready = agreement.digest
        ready = head["ready"]
        names = tuple(ready["vectors"])
        self._shape = Shape(ready["layout"], names, ready["size"], ready["counts"])
        return self._shape

    def budget_left(self) -> float | None:
        """Return the epsilon of the data set's budget that is neither spent nor reserved now.

        Returns:
            It; None without record-level DP.

        Raises:
            RunError: LF5310, the child took too long; LF5311, it died.
        """
        head, _ = self._ask({"do": "budget"}, {}, _BEGIN_S, _HUNG_LOOKS)
        left: float | None = head["left"]
        return left

    def answer(self, site: str, ask: Ask, limit_s: float) -> Reply:
        """Let the child answer.

        Args:
            site: Name of the site.
            ask: What is asked.
            limit_s: Seconds after which it is killed.

        Raises:
            RunError: LF5310, it took too long and was killed; LF5311, it died; LF5313, it was
                closed; LF5314, it hung and was killed.
        """
        fields: dict[str, Any] = {
            "agreement": ask.agreement,
            "layout": ask.layout,
            "round_number": ask.round_number,
            "train": ask.train,
            "evaluate": ask.evaluate,
            "limit_s": ask.limit_s,
            "clip": ask.clip,
        }
        head, arrays = self._ask({"do": "answer", "ask": fields}, ask.vectors, limit_s, _HUNG_LOOKS)
        update = None
        if head["update"] is not None:
            vectors = {
                name.removeprefix("vector/"): array
                for name, array in arrays.items()
                if name != "counts"
            }
            said = head["update"]
            update = Update(said["layout"], vectors, said["weight"], said["norms"])
        refusal = Problem(**head["refusal"]) if head["refusal"] else None
        code = refusal.code if refusal else ""
        self._unexpected = self._unexpected + 1 if code == _UNEXPECTED else 0
        if self._unexpected >= _MOST_UNEXPECTED:
            self._unexpected = 0
            self._drop()
        return Reply(
            site,
            update=update,
            counts=arrays["counts"] if head["counts"] else None,
            refusal=refusal,
            epsilon=head["epsilon"],
            noise_multiplier=head["noise_multiplier"],
            again=head["again"],
        )

    def interrupt(self) -> None:
        """End what is in progress, also from another thread; the next ask starts another child."""
        process = self._process
        if self._busy and process is not None:
            _kill(process)

    def close(self) -> None:
        """End the child, for good; also from another thread, in the middle of an answer."""
        self._closed = True
        process = self._process
        if self._busy and process is not None:
            _kill(process)  # whoever waits for its answer finds it dead
        else:
            self._drop()

    def _drop(self) -> None:
        process, self._process, self._ready = self._process, None, ""
        if process is None:
            return
        with suppress(OSError):
            _pipes(process)[0].close()
        try:
            process.wait(_CLOSE_S)
        except subprocess.TimeoutExpired:
            _kill(process)
        with suppress(OSError):
            _pipes(process)[1].close()

    def _alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def _ask(
        self, head: Mapping[str, Any], arrays: Arrays, limit_s: float, looks: int
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        self._busy = True
        try:
            self.warm()
            if not self._opened:
                self._exchange(
                    {"do": "open", "conf": plain(self._conf)}, {}, _BEGIN_S, _HUNG_LOOKS_READING
                )
                self._opened = True
            return self._exchange(head, arrays, limit_s, looks)
        finally:
            self._busy = False

    def _spawn(self) -> None:
        # A session of its own: a kill reaches what the child started, Ctrl-C does not reach it.
        self._process = subprocess.Popen(  # noqa: S603 - our own module
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        self._opened = False
        if self._closed:  # meanwhile
            _kill(self._process)

    def _exchange(
        self, head: Mapping[str, Any], arrays: Arrays, limit_s: float, looks: int
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Write and read in a thread, so that neither a full pipe nor silence can hold us."""
        process = self._process
        if self._closed or process is None:
            raise RunError(Problem("LF5313", "the site is being stopped"))
        answer: list[Any] = []

        def converse() -> None:
            sink, source = _pipes(process)
            with suppress(OSError, EOFError, ValueError, KeyError, TypeError):
                write_frame(sink, head, arrays)
                answer.append(read_frame(source))

        thread = threading.Thread(target=converse, daemon=True)
        thread.start()
        problem = self._wait(thread, limit_s, self._watch(process.pid, looks))
        if problem is not None:
            _kill(process)
            thread.join(_CLOSE_S)
            self._drop()
            _log.error("trainer.killed %s", problem.what)
            raise RunError(problem)
        if not answer:
            _kill(process)
            status = process.returncode
            self._drop()
            _log.error("trainer.died status=%s", status)
            raise RunError(
                Problem("LF5311", "the training process died",
                        remedy="the site's log says more; memory is the usual reason")
            )  # fmt: skip
        return answer[0]  # type: ignore[no-any-return]

    def _wait(self, thread: threading.Thread, limit_s: float, watch: StallWatch) -> Problem | None:
        """Wait for the child's answer; return why there will be none, None when it came.

        Time is counted in looks, so that a machine that slept does not count.
        """
        waited = 0.0
        while waited < limit_s:
            step = min(_LOOK_S, limit_s - waited)
            thread.join(step)
            if not thread.is_alive():
                return None
            waited += step
            if watch.hung():
                return Problem(
                    "LF5314",
                    "training hung: it used no CPU time any more, and was ended",
                    remedy="the site's log says more; look at its disks and GPUs",
                )
        return Problem(
            "LF5310",
            f"training took longer than {limit_s:g} s and was ended",
            key="policy.seconds_per_round",
        )


def _pipes(process: subprocess.Popen[bytes]) -> tuple[Any, Any]:
    return process.stdin, process.stdout


def _kill(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):  # one that waits for a dead disk ends with the wait
        process.wait(_CLOSE_S)
