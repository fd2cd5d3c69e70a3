"""`lepton-fed ledger`: what an owner, an officer and an ethics board see."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from lepton_fed.cli import app
from lepton_fed.clients.own_ledger import HeadFile, open_ledger
from lepton_fed.clients.receipts import Receipts, receipt_of
from lepton_fed.config.load import load_conf
from lepton_fed.config.schema import ClientConf
from lepton_fed.core.exchange import Ask, Reply, Update
from lepton_fed.errors import Problem
from lepton_fed.identity.keys import generate_key
from lepton_fed.privacy.client import CLAIM_AGAINST, CLAIM_DELTA, CLAIM_EPSILON
from lepton_fed.privacy.dp.accounting import SampledGaussian
from lepton_fed.privacy.ledger.book import RunName

PAGE = (Path(__file__).parents[3] / "docs" / "reference" / "cli.md").read_text()
EVENT = SampledGaussian(2.0, 0.1, 5)
ONE = RunName("one", "a" * 64, "a")
TWO = RunName("[red]two\x1b[2J", "b" * 64, "b")
ABOUT = dict.fromkeys(("time", "site", "coordinator", "address", "task", "policy", "run"), "x")


def about(name):
    return {**ABOUT, "run": name}


def run(*words, command="show", typed=None):
    return CliRunner().invoke(
        app, ["ledger", command, "--conf", "client.yaml", *words], input=typed
    )


@pytest.fixture
def conf(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "client.yaml").write_text(
        "kind: client\nname: north\nidentity_key: north.pem\n"
        "budget: {dataset: wards, epsilon: 8, delta: 1.0e-5}\n"
        "ledger: {head: head.json}\n"
    )
    generate_key(tmp_path / "north.pem")
    return load_conf(Path("client.yaml"), [], kind=ClientConf).conf


@pytest.fixture
def kept(conf):
    """Two runs: one over, one with two rounds to come."""
    ledger = open_ledger(conf, "c" * 64)
    ledger._rows = None  # what the rows are is told elsewhere
    ledger.reserve(EVENT, ONE, 2)
    ledger.charge(EVENT, ONE, 1, "t")
    ledger.charge(EVENT, ONE, 2, "t")
    ledger.reserve(EVENT, TWO, 3)
    ledger.charge(EVENT, TWO, 1, "t")
    return ledger


def keys_on_page(command):
    section = PAGE.split(f"## lepton-fed ledger {command}\n")[1].split("\n## ")[0]
    text = section.split("JSON keys: ")[1].split(".")[0]
    return re.findall(r"`(\w+)`", re.sub(r"\(.*?\)", "", text))


def test_before_anything_was_spent_it_says_so(conf):
    result = run()
    assert result.exit_code == 0
    assert "no run has reserved or spent anything yet" in result.stdout
    assert not Path("state").exists(), "looking writes nothing"


def test_what_was_spent_is_listed_by_run(kept):
    result = run()
    assert result.exit_code == 0, result.output
    assert "\x1b" not in result.stdout
    lines = [line.split() for line in result.stdout.splitlines()]
    one, two = next(x for x in lines if x[:1] == ["one"]), next(x for x in lines if "two" in str(x))
    assert one[1:5] == ["wards", "dp_sgd,", "poisson", "2"]
    assert (one[-1], two[-1]) == ("0", "2")
    assert f"{kept.spent:.4g} of epsilon 8 at delta 1e-05 is spent" in result.stdout
    assert f"{kept.left:.4g} is neither spent nor reserved" in result.stdout


def test_the_same_as_json(kept):
    found = json.loads(run("--json").stdout)
    assert list(found) == keys_on_page("show")
    assert (found["dataset"], found["budget"], found["left"]) == ("wards", 8.0, kept.left)
    assert found["statement"]["datasets"][0]["spent"] == kept.spent
    assert [r["charges"] for r in found["statement"]["runs"]] == [2, 1]


def test_runs_that_no_ledger_counts_are_named(conf, kept):
    receipts = Receipts(Path(conf.state) / "receipts")
    update = Update("l", {"delta": np.ones(2, np.float32)}, 1.0)
    refusal = Reply("north", refusal=Problem("LF4605", "x"))
    for name, reply, digest in (
        ("bare", Reply("north", update), "a"),
        ("one", Reply("north", update), "b"),
        ("refused", refusal, "c"),
    ):
        receipt = receipt_of(reply, Ask(digest * 64, "l", 1, True, False, {}), about(name))
        receipts.write(replace(receipt, ledger="1 a b" if name == "one" else ""))
    said = run().stdout
    assert "not counted: bare trained without DP" in said.replace("\n", " ")
    assert "refused" not in said
    assert json.loads(run("--json").stdout)["uncounted"] == ["bare"]
    # Another run of the name that one with DP has.
    receipts.write(
        receipt_of(Reply("north", update), Ask("d" * 64, "l", 1, True, False, {}), about("one"))
    )
    assert json.loads(run("--json").stdout)["uncounted"] == ["bare", "one"]


def update_of(name, claims):
    """Write the receipt of an update that left in a run."""
    reply = Reply("north", Update("l", {"delta": np.ones(2, np.float32)}, 1.0))
    about = {**ABOUT, "run": name}
    ask = Ask(name[0] * 64, "l", 1, True, False, {})
    Receipts(Path("state/receipts")).write(receipt_of(reply, ask, about, client=claims))


def claims(epsilon, against):
    return {CLAIM_EPSILON: repr(epsilon), CLAIM_DELTA: "1e-05", CLAIM_AGAINST: against}


def test_what_runs_cost_a_whole_site_is_listed_with_whom_it_holds_against(kept):
    update_of("one", claims(3.25061, "everybody"))
    update_of("two", claims(4.5, "[red]others\x1b[2J"))
    result = run()
    assert result.exit_code == 0, result.output
    assert "\x1b" not in result.stdout
    said = " ".join(result.stdout.split())
    for part in ("3.251 1e-05 everybody", "4.5 1e-05 [red]others?[2J"):
        assert part in said
    assert "this site's whole part: epsilon 7.751 at delta 2e-05, the sum of 2 runs" in said
    assert "it holds against those whom each of them holds against" in said
    assert "without it" not in said
    update_of("bare", {})
    said = " ".join(run().stdout.split())
    assert "epsilon 7.751" in said
    assert "1 runs without it are not in the sum: nothing bounds" in said
    found = json.loads(run("--json").stdout)["client"]
    assert [each["epsilon"] for each in found["runs"]] == [3.25061, 4.5, None]
    assert (found["uncovered"], found["epsilon"]) == (1, 7.75061)


def test_where_no_run_protects_a_whole_site_nothing_is_said_of_it(kept):
    update_of("bare", {})
    assert "whole part" not in run().stdout


def test_a_receipt_that_tells_of_no_epsilon_is_named(kept):
    update_of("one", {CLAIM_EPSILON: "much"})
    result = run()
    assert result.exit_code == 4
    assert "[LF4641]" in result.stderr


def test_a_changed_ledger_is_one_screen_and_exit_code_4(kept):
    path = Path("state/ledger.sqlite")
    content = path.read_bytes()
    place = content.index(b'"sampling_rate"') + 18
    path.write_bytes(content[:place] + b"9" + content[place + 1 :])
    for command in ("show", "verify"):
        result = run(command=command)
        assert result.exit_code == 4
        assert "[LF4204]" in result.stderr
        assert "Traceback" not in result.stderr


def receipt(conf, kept, key=None):
    from lepton_fed.clients.own_ledger import signed_head
    from lepton_fed.identity.keys import load_private_key

    reply = Reply("north", Update("l", {"delta": np.ones(2, np.float32)}, 1.0))
    about = {**ABOUT, "ledger": signed_head(conf, load_private_key(Path(key or "north.pem")))}
    Receipts(Path("state/receipts")).write(
        receipt_of(reply, Ask("a" * 64, "l", 1, True, False, {}), about)
    )


def test_the_heads_in_receipts_are_held_against_the_ledger(conf, kept):
    path = Path("state/ledger.sqlite")
    before = path.read_bytes()
    kept.charge(EVENT, TWO, 2, "t")
    generate_key(Path("old.pem"))
    receipt(conf, kept, "old.pem")
    receipt(conf, kept)
    result = run(command="verify")
    assert result.exit_code == 0, result.output
    assert "the heads in 2 receipts and of the second place head.json are in it" in result.stdout
    assert "1 carry the signature of the key in use" in result.stdout
    found = json.loads(run("--json", command="verify").stdout)
    assert list(found) == keys_on_page("verify")
    assert (found["receipts"], found["signed"]) == (2, 1)
    path.write_bytes(before)
    Path("head.json").unlink()
    result = run(command="verify")
    assert result.exit_code == 4
    assert "[LF4209]" in result.stderr
    assert "ledger accept" in result.stderr


def test_an_export_is_checked_with_the_key_alone(conf, kept, tmp_path, monkeypatch):
    result = run("--out", "out.json", command="export")
    assert result.stdout == "wrote 8 entries to out.json\n"
    assert list(json.loads(run("--out", "out.json", "--json", command="export").stdout)) == (
        keys_on_page("export")
    )
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in ("out.json", "north.pub"):
        (elsewhere / name).write_bytes(Path(name).read_bytes())
    generate_key(elsewhere / "other.pem")
    monkeypatch.chdir(elsewhere)

    def check(*words):
        return CliRunner().invoke(app, ["ledger", "verify", "--export", "out.json", *words])

    result = check("--key", "north.pub")
    assert result.exit_code == 0, result.output
    assert "north signed this; 8 entries, chain and sums whole" in result.stdout
    assert json.loads(check("--key", "north.pub", "--json").stdout)["site"] == "north"
    result = check()
    assert (result.exit_code, "[LF1207]" in result.stderr) == (2, True)
    result = check("--key", "other.pub")
    assert (result.exit_code, "[LF4213]" in result.stderr) == (4, True)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"steps":5', '"steps":4'),
        ('"site":"north"', '"site":"south"'),
        ('"charges":2', '"charges":1'),
        ('"entries"', '"entry"'),
        ('"signature":"', '"signature":"z'),
        ("{", "["),
    ],
)
def test_a_changed_export_is_refused(kept, old, new):
    run("--out", "out.json", command="export")
    path = Path("out.json")
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))
    words = ["ledger", "verify", "--export", "out.json", "--key", "north.pub"]
    result = CliRunner().invoke(app, words)
    assert (result.exit_code, "[LF4213]" in result.stderr) == (4, True)


@pytest.mark.parametrize("what", ["sums", "chain"])
def test_an_export_that_a_site_signed_but_made_up_is_refused(kept, what):
    from lepton_fed.core.digests import canonical_json
    from lepton_fed.identity.keys import load_private_key
    from lepton_fed.identity.signature import sign_payload
    from lepton_fed.privacy.ledger.export import EXPORT_TYPE

    run("--out", "out.json", command="export")
    whole = json.loads(Path("out.json").read_text())
    if what == "sums":
        whole["statement"]["datasets"][0]["spent"] = 0.1
    else:
        del whole["entries"][4]
    body = {name: whole[name] for name in ("site", "statement", "entries")}
    key = load_private_key(Path("north.pem"))
    whole["signature"] = sign_payload(key, EXPORT_TYPE, canonical_json(body)).hex()
    Path("out.json").write_bytes(canonical_json(whole))
    words = ["ledger", "verify", "--export", "out.json", "--key", "north.pub"]
    result = CliRunner().invoke(app, words)
    assert (result.exit_code, "[LF4213]" in result.stderr) == (4, True)
    assert what in result.stderr or "does not follow" in result.stderr


def test_an_abandoned_run_is_released_after_a_question(kept):
    name = TWO.agreement
    result = run(name, command="release", typed="n\n")
    assert (result.exit_code, "nothing was changed" in result.stdout) == (4, True)
    before = kept.left
    result = run(name, command="release", typed="y\n")
    assert result.exit_code == 0, result.output
    assert "2 rounds are free" in result.stdout
    assert kept.left > before
    result = run(name, "--yes", command="release")
    assert (result.exit_code, "[LF4212]" in result.stderr) == (4, True)


def test_a_release_as_json_asks_nothing(kept):
    found = json.loads(run(TWO.agreement, "--json", command="release").stdout)
    assert list(found) == keys_on_page("release")
    assert (found["rounds"], found["left"]) == (2, kept.left)


def test_an_older_copy_is_accepted_after_a_question(conf, kept):
    path = Path("state/ledger.sqlite")
    before = path.read_bytes()
    kept.charge(EVENT, TWO, 2, "t")
    path.write_bytes(before)
    assert run().exit_code == 4
    result = run(command="accept", typed="n\n")
    assert (result.exit_code, path.read_bytes()) == (4, before)
    result = run("--yes", command="accept")
    assert result.exit_code == 0, result.output
    assert "entry 9 is known of and missing" in result.stdout
    assert run().exit_code == 0
    Path("head.json").unlink()
    found = json.loads(run("--json", command="accept").stdout)
    assert list(found) == keys_on_page("accept")
    assert HeadFile(Path("head.json")).read() == open_ledger(conf).book.head


def test_a_ledger_of_the_former_format_is_refused_with_what_to_do(conf):
    Path("state").mkdir()
    Path("state/ledger.jsonl").touch()
    result = run()
    assert (result.exit_code, "[LF4208]" in result.stderr) == (4, True)
    assert "lower budget.epsilon" in result.stderr
