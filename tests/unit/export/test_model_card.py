from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
from markdown_it import MarkdownIt

from lepton_fed.core.task import Column, DataContract, ModelSpec, Step, Target, Task, TrainingSpec
from lepton_fed.export.card import model_card
from lepton_fed.export.manifest import Parity, ParityCheck, Release
from lepton_fed.export.markdown import escape, listed, upper_figure
from lepton_fed.runs.summary import ClientGuarantee, SiteSummary

RELEASE = Release(
    version=3,
    created="2026-01-02T03:04:05Z",
    parity=Parity("42 real rows in turn", [ParityCheck(1, 3.7e-8, 1e-5), ParityCheck(32, 0, 1e-5)]),
    exported_with={"torch": "2.13.0", "onnx": "1.23.2"},
)
SIGNER = " ".join(["abcd"] * 16)
DP_SITES = [
    SiteSummary("north", 20, {"accuracy": 0.95}, epsilon=7.5, noise_multiplier=1.03),
    SiteSummary("south", 19, {"accuracy": 0.81}, epsilon=7.98001, noise_multiplier=1.03),
    SiteSummary("empty", 0),
]
HOSTILE = [
    "<script>alert(1)</script>",
    "[here](https://evil.example)",
    "![x](https://evil.example/p.png)",
    "<https://evil.example>",
    "https://evil.example",
    "www.evil.example",
    "a@evil.example",
    "x | y | z",
    "x\n\n# Title\n\n| a |\n",
    "`code` **bold** _it_ ~~no~~",
    "&lt;b&gt; &#60;",
    "trailing \\",
    "\u202eright to left",
    "\x1b[31mred",
    "---",
    "1. item",
    "$x$",
]


def card(task: Task, summary: Any, release: Release = RELEASE) -> str:
    return model_card(task, summary, release, SIGNER)


def table_below(text: str, heading: str) -> list[list[str]]:
    """The cells of the first table after a heading, without the rule."""
    lines = text.split(f"## {heading}\n", 1)[1].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|"))
    rows = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    return [rows[0], *rows[2:]]


@pytest.fixture
def dp(mlp: Any, summary_of: Any) -> Any:
    return summary_of(
        mlp.task, sites=DP_SITES, delta=1e-5, clip=0.5, outside_epsilon=["evaluation", "row|count"]
    )


def test_the_first_paragraph_says_what_it_is(
    mlp: Any, cnn: Any, regressor: Any, summary_of: Any
) -> None:
    def first(case: Any) -> str:
        return card(case.task, summary_of(case.task)).split("\n\n")[1]

    assert first(mlp).startswith(
        "This model predicts **ward**, one of 3 classes, from a row of 3 columns. Version 3,"
    )
    assert "**label**, one of 4 classes, from an image of 1 x 6 x 6 uint8 values" in first(cnn)
    assert "the number **mg** from a row of 3 columns" in first(regressor)


def test_metrics_are_given_for_all_sites_and_for_each(mlp: Any, summary_of: Any) -> None:
    text = card(mlp.task, summary_of(mlp.task))
    assert table_below(text, "Metrics") == [
        ["Site", "loss", "accuracy"],
        ["**all sites**", "0.3123", "0.9123"],
        ["north", "0.2", "0.95"],
        ["south", "0.4", "0.81"],
    ]
    assert "- accuracy: fraction of rows whose class is predicted right; 1 is best." in text
    assert "- loss: mean cross-entropy, in nats" in text
    assert "Sites differ: accuracy is 0.81 at south and 0.95 at north." in text


def test_the_loss_of_a_number_is_another_one(regressor: Any, summary_of: Any) -> None:
    sites = [SiteSummary("a", 1, {"mae": 2.0}), SiteSummary("b", 1, {"mae": 1.0, "own": 5.0})]
    summary = summary_of(regressor.task, metrics={"loss": 2.5, "mae": 1.25}, sites=sites)
    text = card(regressor.task, summary)
    assert "- loss: mean squared error" in text
    assert "Sites differ: mae is 2 at a and 1 at b." in text
    assert table_below(text, "Metrics") == [
        ["Site", "loss", "mae", "own"],
        ["**all sites**", "2.5", "1.25", "-"],
        ["a", "-", "2", "-"],
        ["b", "-", "1", "5"],
    ]


def test_the_error_bound_of_the_auc_is_printed(mlp: Any, summary_of: Any) -> None:
    summary = summary_of(mlp.task, metrics={"auc": 0.95}, error_bounds={"auc": 0.00031, "x": 1})
    text = card(mlp.task, summary)
    assert (
        "- auc is made from binned scores: over all sites the exact value lies within 0.00031"
        in text
    )
    assert "- x is" not in text


def test_without_metrics_the_card_says_so(mlp: Any, summary_of: Any) -> None:
    summary = summary_of(mlp.task, metrics={}, sites=[SiteSummary("a", 1)])
    text = card(mlp.task, summary)
    assert "The sites sent no metrics; how well the model predicts is not known." in text
    assert "Sites differ" not in text
    assert "The metrics describe" not in text


def test_without_dp_the_card_promises_nothing(mlp: Any, summary_of: Any) -> None:
    privacy = card(mlp.task, summary_of(mlp.task)).split("## Privacy")[1].split("## ")[0]
    assert "**None promised.**" in privacy
    assert "without differential privacy" in privacy
    assert "psilon" not in privacy


def test_with_dp_the_card_says_what_is_promised_and_what_is_not(mlp: Any, dp: Any) -> None:
    text = card(mlp.task, dp)
    privacy = text.split("## Privacy")[1].split("## ")[0]
    assert "None promised" not in privacy
    assert table_below(text, "Privacy") == [
        ["Site", "Epsilon", "Noise multiplier"],
        ["south", "7.981", "1.03"],
        ["north", "7.500", "1.03"],
    ]
    for said in (
        "delta = 1e-05",
        "one record added or removed",
        "Poisson sampling",
        "Euclidean norm 0.5",
        "**No epsilon is recorded for empty.**",
        "evaluation (counts on held-out rows, from which the metrics are made), row\\|count.",
    ):
        assert said in privacy


@pytest.mark.parametrize("sampler", ["shuffled", "full"])
def test_the_card_of_an_order_credits_it_nothing(mlp: Any, dp: Any, sampler: str) -> None:
    privacy = card(mlp.task, replace(dp, sampler=sampler)).split("## Privacy")[1].split("## ")[0]
    assert "the place of one record left empty" in privacy
    assert "Poisson" not in privacy
    assert "order" in privacy


def test_the_card_names_correlated_noise(mlp: Any, dp: Any) -> None:
    told = card(mlp.task, replace(dp, sampler="full", mechanism="dp_ftrl"))
    assert "- Mechanism: DP-FTRL. Each step takes the next records in the order of the rows" in told
    assert "takes back some of the noise of the steps before" in told
    assert "- Mechanism: DP-SGD." in card(mlp.task, replace(dp, mechanism="dp_sgd"))


def test_the_card_calls_noise_from_a_seed_insecure(mlp: Any, dp: Any) -> None:
    assert "**Insecure.**" in card(mlp.task, replace(dp, randomness="insecure_seeded"))
    assert "Insecure" not in card(mlp.task, replace(dp, randomness="system"))


def test_the_card_does_not_promise_what_epsilon_does_not_cover(mlp: Any, dp: Any) -> None:
    privacy = " ".join(card(mlp.task, dp).split("## Privacy")[1].split("## ")[0].split())
    assert "anything that the site sent" not in privacy
    assert "bounds how far the updates that the site sent in this run, and so this model" in privacy
    assert "Row counts are treated as public" in privacy
    made = privacy.split("epsilon does not cover what is made from a site's row count")[1]
    for said in ("epsilon and noise multiplier", "sampling rate", "steps", "took part"):
        assert said in made


def test_the_card_says_whose_claim_a_metric_is(mlp: Any, summary_of: Any) -> None:
    assert "as the sites report them: nobody else has seen" in card(mlp.task, summary_of(mlp.task))


def test_nothing_outside_epsilon_is_said_too(mlp: Any, dp: Any) -> None:
    text = card(mlp.task, replace(dp, outside_epsilon=[], metrics={}))
    assert "Outside epsilon, left the sites without noise: nothing." in text


def test_an_epsilon_is_never_shown_too_small() -> None:
    for value in (7.98, 7.9800001, 8.00001, 1e-9, 0.0, 123456.7, 1e25, 2.5e26, 1.7e308):
        assert float(upper_figure(value)) >= value
        assert float(upper_figure(value)) <= value + 0.001
    assert upper_figure(7.98) == "7.980"
    assert upper_figure(None) == "-"


def test_sites_without_a_used_update_are_named(mlp: Any, dp: Any) -> None:
    text = card(mlp.task, dp)
    assert "Trained with fedavg in 20 rounds; the updates of 2 sites were used." in text
    assert "- Without any update used: empty." in text


def test_the_training_is_described_from_the_task(summary_of: Any) -> None:
    task = Task(
        data=DataContract(columns=[Column("a")], target=Target(classes=["n", "y"])),
        preprocessing=[Step("clip", {"low": -5, "high": 5.0})],
        augmentation=[Step("flip")],
        model=ModelSpec("mlp", {"hidden": [64, 32]}),
        training=TrainingSpec(epochs=None, steps=1, optimiser="adam", learning_rate=0.001),
    )
    text = card(task, summary_of(task))
    assert "Model: mlp (hidden \\[64, 32\\]), 1,234 numbers trained together." in text
    assert "each round: 1 step of adam, learning rate 0.001, batch size 32." in text
    assert "part of the exported model: clip (high 5.0, low -5)." in text
    assert "in training only: flip." in text


def test_the_input_contract_is_a_table(summary_of: Any) -> None:
    columns = [
        Column("age", minimum=0, maximum=120, fill=54.25),
        Column("mean_radius"),
        Column("dose", minimum=0.5),
        Column("depth", maximum=3),
        Column("ward", kind="category", values=["a", "b"], fill=1.0),
    ]
    task = Task(
        data=DataContract(columns=columns, target=Target(classes=["n", "y"])),
        preprocessing=[Step("impute")],
    )
    assert table_below(card(task, summary_of(task)), "Inputs") == [
        ["No.", "Column", "Kind", "Admitted", "When missing"],
        ["1", "age", "number", "0 to 120", "filled with 54.25"],
        ["2", "mean\\_radius", "number", "any number", "refused"],
        ["3", "dose", "number", "at least 0.5", "refused"],
        ["4", "depth", "number", "at most 3", "refused"],
        ["5", "ward", "category", "a, b", "refused"],
    ]
    bare = replace(task, preprocessing=[])
    assert "filled with" not in card(bare, summary_of(bare))


def test_outputs_versions_digests_and_the_way_to_verify_are_there(mlp: Any, dp: Any) -> None:
    text = card(mlp.task, dp)
    assert "one for each class in this order: a, b, c." in text
    assert f"`{SIGNER}`" in text
    assert "lepton-fed predict --bundle" in text
    assert f"| task | `{mlp.task.digest}` |" in text
    assert "| onnx | - | 1.23.2 |" in text
    assert "| torch | 2.13.0 | 2.13.0 |" in text
    assert "on 42 real rows in turn: 3.7e-08 at batch 1, 0 at batch 32." in text
    assert "with this seed has the same run digest" in text
    assert "need not have the same" in card(mlp.task, replace(dp, repeatable=False))


def test_a_number_is_described_with_its_range(regressor: Any, summary_of: Any) -> None:
    text = card(regressor.task, summary_of(regressor.task))
    assert "`value`: float32, batch. Targets in training: 0 to 9." in text
    assert "softmax" not in text


def test_long_lists_are_cut_and_counted(summary_of: Any) -> None:
    task = Task(
        data=DataContract(
            columns=[Column(f"c{i}") for i in range(300)],
            target=Target(classes=[f"k{i}" for i in range(80)]),
        ),
        model=ModelSpec("mlp", {"hidden": list(range(500))}),
    )
    sites = [SiteSummary(f"s{i:03}", 1, {"loss": 1.0}, epsilon=i / 100) for i in range(120)]
    text = card(task, summary_of(task, sites=sites, delta=1e-5, clip=1.0))
    assert "70 more sites are not shown." in text
    assert "70 more sites spent no more than the last one shown." in text
    assert len(table_below(text, "Metrics")) == 52
    assert len(table_below(text, "Privacy")) == 51
    assert table_below(text, "Privacy")[1][:2] == ["s119", "1.190"]
    assert "100 more columns are in `task.json`." in text
    assert "k49, and 30 more" in text
    assert max(len(line) for line in text.splitlines()) < 1000


@pytest.mark.parametrize("name", HOSTILE)
def test_names_cannot_write_markdown_or_html(summary_of: Any, name: str) -> None:
    task = Task(
        name=name,
        data=DataContract(
            columns=[Column(name), Column(name, kind="category", values=[name, name])],
            target=Target(name=name, classes=[name, "other"]),
        ),
        preprocessing=[Step(name, {name: name})],
        model=ModelSpec(name, {name: [name]}),
    )
    sites = [SiteSummary(name, 1, {name: 1.0}, epsilon=1.0, noise_multiplier=1.0)]
    sites.append(SiteSummary(f"{name}2", 0))
    summary = summary_of(
        task,
        run=name,
        sites=sites,
        strategy=name,
        metrics={name: 1.0},
        outside_epsilon=[name],
        versions={name: name},
        layout=name,
        delta=1e-5,
    )
    plain = Task(data=DataContract(columns=[Column("n")] * 2, target=Target(classes=["n", "o"])))
    reader = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    text = card(task, summary)
    html = reader.render(text)
    assert "\x1b" not in text
    assert "\u202e" not in text
    for tag in ("script", "a ", "img", "b>", "em", "s>", "ol"):
        assert f"<{tag}" not in html
    assert html.count("<h1>") == 1
    assert html.count("<h2>") == reader.render(card(plain, summary_of(plain))).count("<h2>")
    assert html.count("<table>") == 5
    for cells in re.findall(r"<tr>(.*?)</tr>", html.split("<table>")[1], flags=re.DOTALL):
        assert len(re.findall(r"<t[hd]", cells)) == 2
    # Readers that make links of bare addresses look at the source, before escapes are taken away.
    assert not re.search(r"(?i)https?://|www\.|[^\\]@", text)


def test_escaped_names_read_as_they_were() -> None:
    reader = MarkdownIt("commonmark")
    for name in ("mean_radius", "a*b", "x|y", "C:\\dir", "a & b", "<5 mg", "p@q", "www.x"):
        rendered = reader.renderInline(escape(name))
        for entity, sign in (("&lt;", "<"), ("&gt;", ">"), ("&quot;", '"'), ("&amp;", "&")):
            rendered = rendered.replace(entity, sign)
        assert rendered == name
    assert escape("2026-01-02T03:04:05Z") == "2026-01-02T03:04:05Z"
    assert escape("a\n b\t c") == "a b c"
    assert len(escape("x" * 10_000)) < 210
    assert listed(["a", "", "c_"], 2) == "a, (empty), and 1 more"


def test_the_card_ends_in_one_line_break_and_has_no_stray_blank(mlp: Any, dp: Any) -> None:
    for summary in (dp, replace(dp, sites=DP_SITES[2:], metrics={})):
        text = card(mlp.task, summary)
        assert text.endswith("\n")
        assert not text.endswith("\n\n")
        assert "\n\n\n" not in text
        assert not re.search(r"[ \t]\n", text)


CLIENT = ClientGuarantee(
    epsilon=7.9991,
    delta=1e-5,
    adjacency="zero-out-one-site",
    against="the coordinator and [others](https://evil.example)",
    noise="shared",
    mechanism="skellam",
    clip=0.5,
    noise_multiplier=4.24,
    honest=7,
)


def test_both_guarantees_stand_there_each_with_what_it_protects_and_from_whom(
    mlp: Any, dp: Any
) -> None:
    text = card(mlp.task, replace(dp, client=CLIENT, masked=True))
    said = text.split("## Privacy\n", 1)[1].split("\n## ", 1)[0]
    assert "a site's whole part in this run, epsilon = 8.000 at delta = 1e-05" in said
    assert "Skellam noise" in said
    assert "once 7 sites have added their share" in said
    assert "Record-level differential privacy" in said
    assert "](https://evil.example)" not in said.replace("\\]", "")
    assert "None promised" not in said


def test_a_norm_that_moved_is_told_with_what_it_followed(mlp: Any, dp: Any) -> None:
    moved = replace(CLIENT, quantile=0.8, last_clip=0.1234)
    text = card(mlp.task, replace(dp, client=moved))
    assert "follows the 0.8 quantile of the norms, 0.1234 after the last" in text
    assert "4.24 times 1.05 times the round's norm once 7 sites" in text
    text = card(mlp.task, replace(dp, client=CLIENT))
    assert "quantile" not in text
    assert "4.24 times that norm once 7 sites" in text


def test_without_record_level_noise_nothing_is_promised_for_a_record(
    mlp: Any, summary_of: Any
) -> None:
    bare = replace(summary_of(mlp.task), client=replace(CLIENT, noise="coordinator", honest=0))
    text = card(mlp.task, replace(bare, outside_epsilon=["evaluation"]))
    assert "Nothing is promised for a single record" in text
    assert "None promised" not in text
    assert "added their share" not in text
    assert "Outside epsilon, left the sites without noise: evaluation" in text
    assert "Client-level" not in card(mlp.task, summary_of(mlp.task))
