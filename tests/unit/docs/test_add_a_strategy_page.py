"""docs/how-to/add-a-strategy.md: its files are installed, its tests and commands are run."""

import importlib
import json

import numpy as np
import pytest
from safetensors.numpy import load_file

PAGE = "how-to/add-a-strategy.md"


def test_the_commands_print_what_the_page_says(opened):
    opened.run()
    (run,) = opened.folder.glob("runs/*")
    assert json.loads((run / "summary.json").read_text())["strategy"] == "fedavgm"
    checkpoint = load_file(run / "checkpoints" / "round-0005.safetensors")
    assert checkpoint["state/velocity"].shape == checkpoint["model"].shape
    assert np.abs(checkpoint["state/velocity"]).max() > 0


@pytest.mark.parametrize(
    "name",
    [
        "test_two_rounds_by_hand",
        "test_without_momentum_it_is_federated_averaging",
        "test_what_it_is_given_stays_as_it_is",
    ],
)
def test_the_page_s_tests_pass(opened, name):
    getattr(importlib.import_module("test_fedavgm"), name)()


def test_what_the_annotations_refuse_the_rule_itself_refuses_too(opened):
    fedavgm = importlib.import_module("fedavgm").fedavgm
    for arguments in ((1.0, 1.0), (-0.1, 1.0), (0.5, 0.0), (0.5, float("inf"))):
        with pytest.raises(ValueError, match="no such momentum or rate"):
            fedavgm(*arguments)
