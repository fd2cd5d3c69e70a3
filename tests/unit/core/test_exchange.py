from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from lepton_fed.core.exchange import MODEL, Ask, Reply, Update, legible


def test_a_reply_says_nothing_that_the_site_did_not_say() -> None:
    reply = Reply("a")
    assert (reply.update, reply.counts, reply.refusal) == (None, None, None)
    assert (reply.epsilon, reply.noise_multiplier, reply.sent_bytes) == (None, None, 0)


def test_what_was_said_cannot_be_changed() -> None:
    ask = Ask("agreement", "layout", 1, True, True, {MODEL: np.zeros(2, np.float32)})
    with pytest.raises(dataclasses.FrozenInstanceError):
        ask.round_number = 4  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        Update("layout", {}, 1.0).weight = 2.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("no rows", "no rows"),
        ("Zürich 心", "Zürich 心"),
        ("\x1b[31mred\x07", "?[31mred?"),
        ("a\r\nb\u2028c", "a??b?c"),
        ("\u202egnp.exe", "?gnp.exe"),
        ("\ud800half", "?half"),
        ("x" * 500, "x" * 20),
        ("", ""),
    ],
)
def test_a_strangers_text_is_cut_and_cannot_steer_a_terminal(text: str, shown: str) -> None:
    assert legible(text, 20) == shown
