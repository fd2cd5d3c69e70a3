"""docs/explanation/ledger.md: what it shows is what the commands print."""

from __future__ import annotations

from pathlib import Path

from lepton_fed.clients.own_ledger import open_ledger
from lepton_fed.config.load import load_conf
from lepton_fed.config.schema import ClientConf
from lepton_fed.identity.keys import generate_key
from lepton_fed.privacy.dp.accounting import SampledGaussian
from lepton_fed.privacy.ledger.book import RunName

PAGE = "explanation/ledger.md"
CONF = """
kind: client
identity_key: keys/north.pem
name: north
source: {reader: wine}
budget: {dataset: radiology, epsilon: 8, delta: 1.0e-5}
"""


def test_the_commands_print_what_the_page_says(opened):
    Path("client.yaml").write_text(CONF)
    generate_key(Path("keys/north.pem"))
    conf = load_conf(Path("client.yaml"), [], kind=ClientConf).conf
    ledger = open_ledger(conf, "c" * 64)
    event = SampledGaussian(2.0, 0.1, 20)
    for run, rounds, trained in (("mammo1", 2, (1, 2)), ("mammo2", 3, (1,))):
        name = RunName(run, run[-1] * 64, run)
        ledger.reserve(event, name, rounds)
        for number in trained:
            ledger.charge(event, name, number, "t" * 64)
    opened.run()
