"""`lepton-fed receipts`: what left this site, in plain words."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lepton_fed.cli.screen import (
    AsJson,
    Overrides,
    guarded,
    print_json,
    print_table,
    size,
    stdout,
)

if TYPE_CHECKING:
    from lepton_fed.clients.receipts import Receipt


_LONGEST = 1000
"""Characters of a cell or line: a file's text is not trusted to talk to a terminal."""


def receipts(
    number: Annotated[
        int | None,
        typer.Option(
            "--number", min=1, help="Show this receipt whole; all in short when left out."
        ),
    ] = None,
    overrides: Overrides = None,
    conf: Annotated[Path, typer.Option("--conf", help="The site's conf.")] = Path(
        "conf/client.yaml"
    ),
    as_json: AsJson = False,
) -> None:
    """Print what left this site: to whom, in which run, under which task and policy."""
    with guarded(as_json=as_json):
        from lepton_fed.config.load import load_conf
        from lepton_fed.config.schema import ClientConf

        loaded = load_conf(conf, overrides or [], kind=ClientConf)
    with guarded(as_json=as_json, loaded=loaded):
        from lepton_fed.clients.receipts import Receipts
        from lepton_fed.errors import ConfError, Problem

        kept = Receipts(Path(loaded.conf.state) / "receipts")
        found = kept.read()
        if number is not None and number > len(found):
            raise ConfError(
                Problem("LF1205", f"there is no receipt {number}; there are {len(found)}",
                        key="--number", remedy="leave it out to list them")
            )  # fmt: skip
        if as_json:
            whole = {"receipts": found, "head": kept.head()}
            print_json(whole if number is None else found[number - 1])
        elif number is not None:
            _show(found[number - 1], number)
        else:
            _list(found, kept.head())


def _list(found: list[Receipt], head: str) -> None:
    if not found:
        stdout().print("nothing has left this site yet: there are no receipts")
        return
    rows = [_row(receipt, number) for number, receipt in enumerate(found, start=1)]
    print_table(
        f"{len(found)} receipts, chain whole",
        ["receipt", "time", "run", "round", "what left", "update"],
        rows,
        words=5,
        narrow=True,
    )
    stdout().print(f"last receipt's hash {head}; note it down, and you see if any are taken off")


def _row(receipt: Receipt, number: int) -> list[str]:
    from lepton_fed.core.exchange import legible

    update = size(sum(vector.bytes for vector in receipt.vectors.values()))
    cells = [str(number), receipt.time, receipt.run or "-", str(receipt.round), _what(receipt)]
    return [legible(cell, _LONGEST) for cell in [*cells, update]]


def _what(receipt: Receipt) -> str:
    if receipt.refusal:
        return f"a refusal, {receipt.refusal}"
    update = ["an update"] if receipt.vectors else []
    return ", ".join([*update, *receipt.numbers]) or "nothing"


def _show(receipt: Receipt, number: int) -> None:
    from lepton_fed.core.exchange import legible

    out = stdout()
    lines = [
        f"receipt {number} of site {receipt.site}, {receipt.time}",
        f"to            {receipt.address}, coordinator {receipt.coordinator}",
        f"for           run {receipt.run or '-'}, round {receipt.round}",
        f"task          {receipt.task or '-'}",
        f"policy        {receipt.policy}",
        f"agreement     {receipt.agreement}",
    ]
    for name, vector in receipt.vectors.items():
        lines.append(
            f"update        {name}: {vector.elements:,} numbers, {size(vector.bytes)}, norm "
            f"{vector.norm_before:.4g} before clipping, {vector.norm_after:.4g} after"
        )
        lines.append(f"              sha256 {vector.sha256}")
    lines += [f"{name:<13} {value}" for name, value in receipt.numbers.items()]
    if receipt.refusal:
        lines.append(f"refusal       {receipt.refusal}")
    if not (receipt.vectors or receipt.numbers or receipt.refusal):
        lines.append("nothing else left")
    for line in lines:
        out.print(legible(line, _LONGEST), markup=False)
