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
    "ago",
    "guarded",
    "number",
    "print_json",
    "print_table",
    "show_failure",
    "show_problems",
    "size",
    "span",
    "stdout",
    "table_width",
]

EXIT_CODES = (
    "Exit codes: 0 done; 1 a bug in lepton-fed; 2 wrong conf, task or command line; 3 data does "
    "not fit; 4 a protection refused; 5 the run could not go on; 6 an extra is missing; "
    "130 interrupted."
)

_INTERRUPTED = 130
_LARGEST_PLAIN = 1024
_MINUTE, _HOUR, _DAY = 60, 3600, 86400

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
        narrow: Leave no more space between two columns than the screen has.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    out = stdout()
    tight = narrow and table_width([columns, *rows], gap=2) > out.width
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        padding=(0, 0 if tight else 1),
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
    out.print(table)


def table_width(rows: Sequence[Sequence[str]], gap: int = 1) -> int:
    """Return how many columns of a screen a narrow table takes.

    Args:
        rows: Its cells, the names of the columns among them.
        gap: Spaces between two columns.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return sum(widths) + gap * (len(widths) - 1) + 2


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


def span(seconds: float) -> str:
    """Return a length of time as text, in the unit that says it best.

    Example:
        >>> span(0.4), span(59), span(150), span(4000), span(200000)
        ('0 s', '59 s', '2 min', '1.1 h', '2.3 d')
    """
    if seconds < _MINUTE:
        return f"{max(0, int(seconds))} s"
    if seconds < _HOUR:
        return f"{int(seconds / _MINUTE)} min"
    return f"{seconds / _HOUR:.1f} h" if seconds < _DAY else f"{seconds / _DAY:.1f} d"


def ago(time: str, now: datetime, zone: str = "") -> str:
    """Return a UTC time as text, with how long ago that was.

    Args:
        time: ISO 8601.
        now: The present time.
        zone: What stands after the time.

    Example:
        >>> now = datetime(2026, 11, 20, 12, 3, 30, tzinfo=UTC)
        >>> ago("2026-11-20T12:00:00.000+00:00", now), ago("2026-11-17T09:00:00+00:00", now)
        ('12:00:00, 3 min ago', '2026-11-17 09:00, 3.1 d ago')
    """
    then = datetime.fromisoformat(time)
    passed = span((now - then).total_seconds())
    same_day = then.astimezone(UTC).date() == now.astimezone(UTC).date()
    return f"{then:{'%H:%M:%S' if same_day else '%Y-%m-%d %H:%M'}}{zone}, {passed} ago"


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
