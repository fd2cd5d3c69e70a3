"""How long `lepton-fed --help` takes against a Python that does nothing. The goal is 0.3 s.

Run it as `python -m benchmarks.startup`.
"""

from __future__ import annotations

import functools
import subprocess
import sys

from benchmarks.timing import in_turn

COMMANDS = (("--help",), ("simulate", "--help"), ("config", "explain", "seed"))


def main() -> None:
    """Print a table: seconds of a command, and the ratio."""
    print("wall clock of a whole process; ratio command / python -c pass, median (range)")
    nothing = functools.partial(_run, "-c", "pass")
    for words in COMMANDS:
        command = functools.partial(_run, "-m", "lepton_fed", *words)
        ours, floor, (low, middle, high) = in_turn(command, nothing, repeats=9)
        print(
            f"lepton-fed {' '.join(words):<22} {ours:6.3f} s  python {floor:6.3f} s  "
            f"{middle:6.2f} ({low:.2f} to {high:.2f})"
        )


def _run(*words: str) -> None:
    subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)  # noqa: S603


if __name__ == "__main__":
    main()
