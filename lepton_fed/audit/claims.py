"""What a run says of its privacy, and what its ledgers say that it did."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lepton_fed.clients.own_ledger import ledger_path
from lepton_fed.clients.receipts import Receipts
from lepton_fed.config.agreement import Agreement
from lepton_fed.config.load import kind_of, load_conf
from lepton_fed.config.schema import ClientConf, RecordPrivacy, ServerConf, SimulationConf
from lepton_fed.core.decode import decode, strict_json
from lepton_fed.core.layout import Layout, Vector
from lepton_fed.errors import Problem, RunError
from lepton_fed.privacy.dp.accounting import Event
from lepton_fed.privacy.dp.shared import honest_of, noise_to_agree_on
from lepton_fed.privacy.ledger.book import Book
from lepton_fed.privacy.ledger.chain import GENESIS, Chain, Head, changed
from lepton_fed.runs.files import reading
from lepton_fed.runs.folder import RunFolder

__all__ = ["Claims", "SiteClaim", "claims_of_run", "claims_of_site", "require_auditable"]

_NEWEST = "last"


@dataclass(frozen=True)
class SiteClaim:
    """What is said of one site.

    Args:
        name: Its name.
        epsilon: Epsilon its records spent in the run, as it says; None when it does not say.
        rounds: Rounds in which its update was used, or left it.
        charged: What its ledger has of the run; None where the ledger is not to be had.
    """

    name: str
    epsilon: float | None
    rounds: int
    charged: tuple[Event, ...] | None


@dataclass(frozen=True)
class Claims:
    """What is said of a run.

    Args:
        agreement: What its sites agreed to.
        sites: The sites whose records are at hand.
        verdict: Where the audit's result goes.
        conf: Whose record it is: a simulation's, a coordinator's or a site's.
        folder: The run's folder; None at a site.
        honest: How many shares of the noise are said to be enough; 0 where sites share none.
    """

    agreement: Agreement
    sites: tuple[SiteClaim, ...]
    verdict: Path
    conf: SimulationConf | ServerConf | ClientConf
    folder: RunFolder | None = None
    honest: int = 0

    @property
    def record(self) -> RecordPrivacy:
        """Return target epsilon, delta and clipping norm."""
        return self.agreement.privacy.record

    def model(self, layout: Layout) -> Vector | None:
        """Return the run's final model, if it is at hand.

        Args:
            layout: Layout of the task's model.
        """
        if self.folder is None or not (self.folder.path / "model.safetensors").exists():
            return None
        return self.folder.read_model(layout)


def claims_of_run(run: RunFolder) -> Claims:
    """Read what a run's folder says: a simulation's with its ledgers, a coordinator's without.

    Raises:
        LeptonError: The folder is not whole, or the run is not finished (LF5206).
    """
    conf: SimulationConf | ServerConf
    if kind_of(run.conf) == "simulation":
        conf = load_conf(run.conf, kind=SimulationConf).conf
    else:
        conf = load_conf(run.conf, kind=ServerConf).conf
    summary = run.read_summary()
    if summary is None:
        raise RunError(
            Problem("LF5206", "this run is not finished", where=run.name,
                    remedy="`lepton-fed runs list` shows which runs are")
        )  # fmt: skip
    sites = []
    for site in summary.sites:
        book = _book(run.site(site.name) / "ledger.sqlite")
        charged = None if book is None else _charged(book, run.name)
        sites.append(SiteClaim(site.name, site.epsilon, site.rounds, charged))
    cohort = conf.rounds.cohort_size(len(sites))
    agreement = Agreement(
        run.name, conf.task, conf.strategy, conf.rounds.count, conf.seed, conf.privacy, cohort,
        noise_to_agree_on(conf.privacy, conf.rounds.count),
    )  # fmt: skip
    return Claims(
        agreement, tuple(sites), run.path / "audit.json", conf, run, honest=summary.honest
    )  # fmt: skip


def claims_of_site(words: str, conf: ClientConf) -> Claims:
    """Read what a site's own records say of a run: its agreement, ledger and receipts.

    Args:
        words: The run's name or its end, or ``last``.
        conf: The site's conf.

    Raises:
        LeptonError: The site agreed to no such run (LF5205), or its records are not whole.
    """
    state = Path(conf.state)
    agreement = _agreement(words, state / "agreements")
    left = [
        receipt
        for receipt in Receipts(state / "receipts").read()
        if receipt.run == agreement.run and receipt.vectors
    ]
    said = [float(r.numbers["epsilon"]) for r in left if "epsilon" in r.numbers]
    book = _book(ledger_path(conf))
    charged = () if book is None else tuple(book.of_run(agreement.digest))
    site = SiteClaim(conf.name, max(said, default=None), len({r.round for r in left}), charged)
    honest = honest_of(agreement) if agreement.privacy.record.is_shared else 0
    verdict = state / "audits" / f"{agreement.digest}.json"
    return Claims(agreement, (site,), verdict, conf, honest=honest)


def require_auditable(claims: Claims) -> None:
    """Refuse a run that claims nothing that is rehearsed.

    Args:
        claims: The run's.

    Raises:
        RunError: LF5232, it had no record-level DP.
    """
    if not claims.record.enabled:
        raise RunError(
            Problem("LF5232", "this run had no record-level DP: it claims no epsilon to audit",
                    where=claims.agreement.run, key="privacy.record.enabled",
                    remedy="--attacks shows what can be read of its updates")
        )  # fmt: skip


def _agreement(words: str, folder: Path) -> Agreement:
    with reading(folder):
        kept = sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
        found = [decode(Agreement, strict_json(path.read_bytes())) for path in kept]
    names = {agreement.run: agreement for agreement in found}
    wanted = [
        agreement for name, agreement in names.items()
        if name == words or name.endswith(f"-{words}")
    ]  # fmt: skip
    if words == _NEWEST and found:
        return found[-1]
    if len(wanted) != 1:
        raise RunError(
            Problem("LF5205", f"this site agreed to no run, or more than one, by {words!r}",
                    where=str(folder), remedy=f"one of: {', '.join(names) or 'none'}")
        )  # fmt: skip
    return wanted[0]


def _charged(book: Book, run: str) -> tuple[Event, ...]:
    """Return what a simulated site's ledger has of its run."""
    accounts = [account for account in book.runs if account.name.run == run]
    return tuple(event for account in accounts for event in account.charged)


def _book(ledger: Path) -> Book | None:
    """Return what a ledger's entries add up to, each checked; None when there is no ledger.

    It is only read: its owner may have it open.

    Raises:
        Refused: LF4203 to LF4206, it cannot be read, or is not whole.
    """
    chain, book = Chain(ledger), Book()
    if not chain.exists:
        return None
    with chain.reading(thoroughly=True) as transaction:
        for entry in transaction.after(Head(0, GENESIS)):
            try:
                book.add(entry)
            except (KeyError, TypeError, ValueError):
                raise changed(ledger, entry.number) from None
    return book
