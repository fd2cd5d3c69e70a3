"""What every command shows: results as tables or JSON on stdout, errors as one screen on stderr."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from lepton_fed.errors import LeptonError, Problem, RunError

if TYPE_CHECKING:
    from rich.console import Console

    from lepton_fed.config.load import Loaded

__all__ = [
    "EXIT_CODES",
    "AsJson",
    "Overrides",
    "guarded",
    "number",
    "print_json",
    "print_table",
    "show_failure",
    "show_problems",
    "size",
    "stdout",
]

EXIT_CODES = (
    "Exit codes: 0 done; 1 a bug in lepton-fed; 2 wrong conf, task or command line; 3 data does "
    "not fit; 4 a protection refused; 5 the run could not go on; 6 an extra is missing; "
    "130 interrupted."
)

_INTERRUPTED = 130
_LARGEST_PLAIN = 1024

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Replace conf keys, for example rounds.count=5."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]


def stdout() -> Console:
    """Return the console that results go to."""
    from rich.console import Console

    return Console(file=sys.stdout, highlight=False, soft_wrap=True)


@contextmanager
def guarded(*, as_json: bool = False, loaded: Loaded[Any] | None = None) -> Iterator[None]:
    """Turn an error of lepton-fed into one screen and its exit code.

    What the operating system refuses and nobody expected is one too, not a traceback.

    Args:
        as_json: Also print the problems as JSON on stdout.
        loaded: The conf in force: problems that name one of its keys get the key's place.
    """
    _quiet_logs()
    try:
        yield
    except (LeptonError, OSError) as error:
        told = error if isinstance(error, LeptonError) else _refused_by_system(error)
        problems = [loaded.located(p) if loaded else p for p in told.problems]
        if as_json:
            with suppress(OSError):  # stdout itself may be what is refused; stderr says so
                print_json({"error": {"exit_code": told.exit_code, "problems": _plain(problems)}})
        show_problems(problems)
        raise typer.Exit(told.exit_code) from None
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        raise typer.Exit(_INTERRUPTED) from None


def print_json(value: object) -> None:
    """Print plain data as JSON on stdout."""
    from lepton_fed.core.digests import plain

    sys.stdout.write(json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    sys.stdout.flush()


def print_table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    words: int = 1,
    narrow: bool = False,
) -> None:
    """Print a table on stdout; words to the left, numbers to the right.

    Args:
        title: Heading.
        columns: Names of the columns.
        rows: Cells.
        words: How many columns, from the left, hold words.
        narrow: Leave no more than one space between two columns.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=not narrow,
        collapse_padding=narrow,
    )
    for index, name in enumerate(columns):
        table.add_column(
            name,
            justify="left" if index < words else "right",
            overflow="fold",
            no_wrap=index == 0,  # the name of a site, run or file stays whole
        )
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    stdout().print(table)


def number(values: Mapping[str, float], name: str) -> str:
    """Return a metric as text, or a dash when it is not there."""
    return f"{values[name]:.3f}" if name in values else "-"


def size(count: int) -> str:
    """Return a number of bytes as text."""
    if count < _LARGEST_PLAIN:
        return f"{count} B"
    if count < _LARGEST_PLAIN**2:
        return f"{count / _LARGEST_PLAIN:.1f} KiB"
    return f"{count / _LARGEST_PLAIN**2:.1f} MiB"


def show_failure(result: Mapping[str, Any], *, as_json: bool) -> None:
    """Say why a running coordinator could not do a job, if it could not, and exit as it would.

    Args:
        result: What it answered; ``error`` holds what went wrong.
        as_json: Also print it as JSON on stdout.
    """
    if "error" not in result:
        return
    if as_json:
        print_json(result)
    show_problems([Problem(**problem) for problem in result["error"]["problems"]])
    raise typer.Exit(int(result["error"]["exit_code"]))


def show_problems(problems: Sequence[Problem]) -> None:
    """Print problems on stderr: where, what, what to do."""
    lines = []
    for problem in problems:
        place = "  ".join(part for part in (problem.where, problem.key) if part)
        lines += [place] if place else []
        lines.append(f"  {problem.what} [{problem.code}]")
        if problem.remedy:
            lines.append(f"  -> {problem.remedy}")
    count = len(problems)
    lines.append(f"\n{count} problem{'s' if count > 1 else ''}; see docs/reference/errors.md")
    sys.stderr.write("\n".join(lines) + "\n")


def _refused_by_system(error: OSError) -> RunError:
    return RunError(
        Problem("LF5401", f"the operating system refused: {error.strerror or error}",
                where=str(error.filename or ""),
                remedy="look at free disk space, rights and limits (ulimit -a), then run again")
    )  # fmt: skip


def _plain(problems: Sequence[Problem]) -> list[dict[str, str]]:
    return [asdict(problem) for problem in problems]


class _Stderr(logging.StreamHandler[TextIO]):
    """Writes to stderr as it is at the time: a progress line on a terminal takes it over."""

    @property
    def stream(self) -> TextIO:
        return sys.stderr

    @stream.setter
    def stream(self, value: TextIO) -> None:
        del value


class _Plain(logging.Formatter):
    """The message for a person, with its level where that is worse than a note."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if record.levelno <= logging.INFO:
            return text
        return f"{record.levelname.lower()}: {text}"


class _JsonLine(logging.Formatter):
    """One JSON object a record, like the events beside it."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "event": "log",
            "level": record.levelname.lower(),
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return json.dumps(line, separators=(",", ":"), ensure_ascii=False)


def _quiet_logs() -> None:
    """Send lepton-fed's own log to stderr, plainly, and keep libraries' chatter out."""
    log = logging.getLogger("lepton_fed")
    if not log.handlers:
        handler = _Stderr()
        handler.setFormatter(_Plain() if sys.stderr.isatty() else _JsonLine())
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        log.propagate = False
    logging.getLogger("flwr").setLevel(logging.WARNING)
