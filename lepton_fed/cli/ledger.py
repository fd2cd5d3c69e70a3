"""`lepton-fed ledger`: what a site's records have spent, checked, signed, and put right."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lepton_fed.cli.screen import AsJson, Overrides, guarded, print_json, print_table, stdout

if TYPE_CHECKING:
    from lepton_fed.clients.whole_part import WholePart
    from lepton_fed.config.load import Loaded
    from lepton_fed.config.schema import ClientConf
    from lepton_fed.privacy.ledger.export import Statement

app = typer.Typer(
    help="What the site's records have spent: look at it, check it, hand it on, put it right.",
    no_args_is_help=True,
)

Conf = Annotated[Path, typer.Option("--conf", help="The site's conf.")]
Yes = Annotated[bool, typer.Option("--yes", help="Do it without asking.")]
_CONF = Path("conf/client.yaml")
_LONGEST = 200  # a run's name is the coordinator's
_MOST_UNCOUNTED = 5


@app.command("show")
def show(overrides: Overrides = None, conf: Conf = _CONF, as_json: AsJson = False) -> None:
    """Print what was spent by run, what is reserved, and what remains of the budget."""
    loaded = _loaded(conf, overrides, as_json)
    with guarded(as_json=as_json, loaded=loaded):
        from lepton_fed.clients.own_ledger import open_ledger, uncounted_runs
        from lepton_fed.privacy.ledger.export import statement_of

        part = _whole_part(loaded.conf)
        budget = loaded.conf.budget
        ledger = open_ledger(loaded.conf)
        said = statement_of(ledger.book, budget.delta)
        uncounted = uncounted_runs(loaded.conf)
        if as_json:
            about = {"dataset": budget.dataset, "budget": budget.epsilon, "left": ledger.left}
            print_json({**about, "uncounted": uncounted, "statement": said, "client": part})
            return
        _print(said)
        stdout().print(
            f"{budget.dataset}: {_spent(said, budget.dataset):.4g} of epsilon {budget.epsilon:g} "
            f"at delta {budget.delta:g} is spent, {ledger.left:.4g} is neither spent nor reserved",
            markup=False,
        )
        if uncounted:
            _print_uncounted(uncounted)
        _print_whole(part)


@app.command("verify")
def verify(
    overrides: Overrides = None,
    conf: Conf = _CONF,
    export: Annotated[
        Path | None, typer.Option("--export", help="Check this export; the ledger when left out.")
    ] = None,
    key: Annotated[
        Path | None, typer.Option("--key", help="The site's public key, PEM, for an export.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check the ledger: its chain, every receipt's head and the second place; or an export."""
    if export is not None:
        with guarded(as_json=as_json):
            _verify_export(export, key, as_json)
        return
    loaded = _loaded(conf, overrides, as_json)
    with guarded(as_json=as_json, loaded=loaded):
        from lepton_fed.clients.own_ledger import check_receipts, open_ledger

        ledger = open_ledger(loaded.conf)
        receipts, signed = check_receipts(loaded.conf, ledger)
        book = ledger.book
        second = loaded.conf.ledger.head
        found = {
            "entries": book.head.number,
            "head": book.head.hash,
            "receipts": receipts,
            "signed": signed,
            "second_place": second or None,
        }
        if as_json:
            print_json(found)
            return
        place = f"and of the second place {second} " if second else ""
        stdout().print(
            f"{book.head.number} entries, chain whole\n"
            f"the heads in {receipts} receipts {place}are in it; {signed} carry the signature of "
            f"the key in use\nlast entry's hash {book.head.hash}",
            markup=False,
        )
        if not second:
            stdout().print("no second place keeps the head: set ledger.head to a file elsewhere")


def _verify_export(export: Path, key: Path | None, as_json: bool) -> None:
    from lepton_fed.errors import ConfError, Problem
    from lepton_fed.identity.keys import load_public_key
    from lepton_fed.privacy.ledger.export import verified
    from lepton_fed.runs.files import reading

    if key is None:
        raise ConfError(
            Problem("LF1207", "an export says nothing without the key of the site that signed it",
                    key="--key", remedy="give the site's public key, from the roster")
        )  # fmt: skip
    public = load_public_key(key)
    with reading(export):
        content = export.read_bytes()
    site, said = verified(content, public, str(export))
    if as_json:
        print_json({"site": site, "statement": said})
        return
    _print(said)
    stdout().print(f"{site} signed this; {said.entries} entries, chain and sums whole")


@app.command("export")
def export(
    out: Annotated[Path, typer.Option("--out", help="The file to write.")],
    overrides: Overrides = None,
    conf: Conf = _CONF,
    as_json: AsJson = False,
) -> None:
    """Write all entries and what they add up to, signed with the site's identity key."""
    loaded = _loaded(conf, overrides, as_json)
    with guarded(as_json=as_json, loaded=loaded):
        from lepton_fed.clients.own_ledger import open_ledger
        from lepton_fed.identity.keys import load_private_key
        from lepton_fed.privacy.ledger.export import exported
        from lepton_fed.runs.files import write_atomic

        identity = load_private_key(Path(loaded.conf.identity_key))
        entries = open_ledger(loaded.conf).entries()
        write_atomic(
            out, exported(loaded.conf.name, entries, loaded.conf.budget.delta, identity), 0o600
        )
        if as_json:
            print_json({"file": str(out), "entries": len(entries)})
        else:
            stdout().print(f"wrote {len(entries)} entries to {out}", markup=False)


@app.command("release")
def release(
    run: Annotated[str, typer.Argument(help="Name of the run, or digest of its agreement.")],
    overrides: Overrides = None,
    conf: Conf = _CONF,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Free what a run that does not come back has reserved; what it spent stays spent."""
    loaded = _loaded(conf, overrides, as_json)
    with guarded(as_json=as_json, loaded=loaded):
        from lepton_fed.clients.own_ledger import open_ledger
        from lepton_fed.core.exchange import legible
        from lepton_fed.errors import Problem, Refused

        ledger = open_ledger(loaded.conf)
        waiting = [
            account
            for account in ledger.book.runs
            if account.remaining and run in (account.name.run, account.name.agreement)
        ]
        if not waiting:
            raise Refused(
                Problem("LF4212", f"no run {legible(run, _LONGEST)!r} has anything reserved",
                        remedy="`lepton-fed ledger show` lists the runs")
            )  # fmt: skip
        rounds = sum(account.remaining for account in waiting)
        _confirm(
            yes or as_json,
            f"{rounds} rounds of {legible(run, _LONGEST)} are reserved. Offered again, the run is "
            "accepted only if it still fits.",
        )
        ledger.release(run, "the owner")
        if as_json:
            print_json({"run": run, "rounds": rounds, "left": ledger.left})
        else:
            stdout().print(
                f"{rounds} rounds are free; {ledger.left:.4g} of the budget is left",
                markup=False,
            )


@app.command("accept")
def accept(
    overrides: Overrides = None, conf: Conf = _CONF, yes: Yes = False, as_json: AsJson = False
) -> None:
    """Go on with an older copy, or without the second place: what is missing is not counted."""
    loaded = _loaded(conf, overrides, as_json)
    with guarded(as_json=as_json, loaded=loaded):
        from lepton_fed.clients.own_ledger import open_ledger

        ledger = open_ledger(loaded.conf, check_heads=False)
        _confirm(
            yes or as_json,
            f"This copy has {ledger.book.head.number} entries. What was spent after them is not "
            "counted any more, unless the budget is lowered by it. It is written down that you "
            "accept this.",
        )
        lacking = ledger.accept_older_copy()
        newest = max((head.number for head in lacking), default=0)
        if as_json:
            print_json({"entries": ledger.book.head.number, "known": newest})
        else:
            stdout().print(
                f"accepted: entry {newest} is known of and missing" if lacking else "accepted"
            )


def _loaded(conf: Path, overrides: list[str] | None, as_json: bool) -> Loaded[Any]:
    with guarded(as_json=as_json):
        from lepton_fed.config.load import load_conf
        from lepton_fed.config.schema import ClientConf

        return load_conf(conf, overrides or [], kind=ClientConf)


def _confirm(agreed: bool, what: str) -> None:
    if agreed:
        return
    stdout().print(what, markup=False)
    if not typer.confirm("Go on?"):
        stdout().print("nothing was changed")
        raise typer.Exit(4)


def _print_uncounted(runs: list[str]) -> None:
    from lepton_fed.core.exchange import legible

    more = f" and {len(runs) - _MOST_UNCOUNTED} more" if len(runs) > _MOST_UNCOUNTED else ""
    names = ", ".join(legible(run, _LONGEST) for run in runs[:_MOST_UNCOUNTED])
    stdout().print(
        f"not counted: {names}{more} trained without DP, and nothing bounds what that "
        "tells of a record; `lepton-fed receipts` lists what left",
        markup=False,
    )


def _whole_part(conf: ClientConf) -> WholePart:
    """Return what a site's receipts say of its whole part in its runs."""
    from lepton_fed.clients.receipts import Receipts
    from lepton_fed.clients.whole_part import whole_part
    from lepton_fed.errors import Problem, Refused

    folder = Path(conf.state) / "receipts"
    try:
        return whole_part(reversed(list(Receipts(folder).newest_first())))
    except ValueError as error:
        raise Refused(
            Problem("LF4641", f"a receipt tells of no client-level DP as sites write it: {error}",
                    where=str(folder), remedy="compare with a backup")
        ) from None  # fmt: skip


def _print_whole(part: WholePart) -> None:
    """Print what the site's whole part has cost; nothing where no run protects it."""
    from lepton_fed.core.exchange import legible

    if part.uncovered == len(part.runs):
        return
    rows = [
        [
            legible(each.run, _LONGEST),
            str(each.rounds),
            "none" if each.epsilon is None else f"{_up(each.epsilon):.4g}",
            "" if each.delta is None else f"{each.delta:g}",
            legible(each.against, _LONGEST),
        ]
        for each in part.runs
    ]
    print_table(
        "client-level DP, by the receipts that are here",
        ["run", "rounds", "epsilon", "delta", "holds against"],
        rows,
        words=1,
    )
    covered = len(part.runs) - part.uncovered
    stdout().print(
        f"this site's whole part: epsilon {_up(part.epsilon):.4g} at delta {part.delta:g}, the sum "
        f"of {covered} runs with client-level DP; it holds against those whom each of them holds "
        "against",
        markup=False,
    )
    if part.uncovered:
        stdout().print(
            f"{part.uncovered} runs without it are not in the sum: nothing bounds what their "
            "updates tell of the whole site",
            markup=False,
        )


def _up(epsilon: float) -> float:
    """Return an epsilon with three decimals, rounded up."""
    return math.ceil(1000 * epsilon) / 1000


def _spent(said: Statement, dataset: str) -> float:
    return next((each.spent for each in said.datasets if each.dataset == dataset), 0.0)


def _print(said: Statement) -> None:
    from lepton_fed.core.exchange import legible

    if not said.runs:
        stdout().print("no run has reserved or spent anything yet")
        return
    rows = [
        [
            legible(each.run, _LONGEST),
            each.dataset,
            ", ".join((*each.mechanisms, *each.samplers)),
            str(each.charges),
            f"{each.epsilon:.4g}",
            str(each.reserved),
        ]
        for each in said.runs
    ]
    print_table(
        f"{said.entries} entries; epsilon at delta {said.delta:g}, {said.adjacency}, PLD at grid "
        f"{said.grid:g} or finer",
        ["run", "data set", "mechanism", "rounds charged", "epsilon", "rounds reserved"],
        rows,
        words=3,
        narrow=True,
    )
    for each in said.datasets:
        shared = ", ".join(each.shares_rows_with)
        also = f"; shares rows with {shared}" if shared else ""
        stdout().print(
            f"{each.dataset}: {each.spent:.4g} spent, {each.committed:.4g} with what is "
            f"reserved{also}",
            markup=False,
        )
