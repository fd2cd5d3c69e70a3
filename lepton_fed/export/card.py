"""The model card: what a bundle's model is, in Markdown, from facts of task and run only."""

from __future__ import annotations

import json

from lepton_fed.core.task import Column, Step, Task
from lepton_fed.export.manifest import FORMAT_VERSION, Release
from lepton_fed.export.markdown import code_block, escape, figure, listed, table, upper_figure
from lepton_fed.runs.summary import ClientGuarantee, RunSummary

__all__ = ["model_card"]

_MAX_SITES = 50
_MAX_COLUMNS = 200
_MAX_CLASSES = 50
_MAX_ARGUMENTS = 160

_MEANINGS = {
    "accuracy": "fraction of rows whose class is predicted right; 1 is best",
    "precision": "of the rows predicted as a class, the fraction that are of it; mean over the "
    "classes that occur; 1 is best",
    "recall": "of the rows of a class, the fraction that are found; mean over the classes that "
    "occur; 1 is best",
    "macro_f1": "harmonic mean of precision and recall of each class; mean over the classes that "
    "occur; 1 is best",
    "auc": "chance that a row of the second class scores above a row of the first; 0.5 is "
    "guessing, 1 is best",
    "mae": "mean absolute error, in the unit of the target; 0 is best",
    "r2": "fraction of the target's variance that is explained; 1 is best, 0 is as good as the "
    "mean",
}
_LOSSES = {
    "classes": "mean cross-entropy, in nats; 0 is best",
    "number": "mean squared error, in the squared unit of the target; 0 is best",
}
_SMALLER_IS_BETTER = ("loss", "mae")
_OUTSIDE = {"evaluation": "evaluation (counts on held-out rows, from which the metrics are made)"}


def model_card(task: Task, summary: RunSummary, release: Release, signer: str) -> str:
    """Return the card.

    Args:
        task: What was learned.
        summary: What the run says of itself.
        release: What the export adds.
        signer: Fingerprint of the signing key.

    Returns:
        Markdown; every name that comes from task or run is escaped.
    """
    sections = [
        _head(task, summary, release),
        _training(task, summary),
        _metrics(task, summary),
        _privacy(summary),
        _use(task, summary),
        _inputs(task),
        _outputs(task),
        _verify(signer),
        _record(task, summary, release),
    ]
    return "\n".join("\n".join([*lines, ""]) for lines in sections)


def _head(task: Task, summary: RunSummary, release: Release) -> list[str]:
    target, contract = task.data.target, task.data
    if target.kind == "classes":
        what = f"**{escape(target.name)}**, one of {len(target.classes)} classes,"
    else:
        what = f"the number **{escape(target.name)}**"
    if contract.kind == "image":
        source = f"an image of {_shape(contract.example_shape)} {contract.dtype} values"
    else:
        source = f"a row of {_count(len(contract.columns), 'column')}"
    return [
        f"# Model card: {escape(task.name)}",
        "",
        f"This model predicts {what} from {source}. Version {release.version}, exported "
        f"{release.created}.",
    ]


def _training(task: Task, summary: RunSummary) -> list[str]:
    idle = [site.name for site in summary.sites if site.rounds == 0]
    contributors = len(summary.sites) - len(idle)
    how_long = (
        f"{_count(task.training.steps, 'step')} "
        if task.training.steps is not None
        else f"{_count(task.training.epochs or 0, 'epoch')} "
    )
    lines = [
        "## Training",
        "",
        f"- Trained with {escape(summary.strategy)} in {_count(summary.rounds, 'round')}; the "
        f"updates of {_count(contributors, 'site')} were used.",
    ]
    if idle:
        lines.append(f"- Without any update used: {listed(idle, _MAX_SITES)}.")
    lines += [
        f"- Model: {_named(task.model.name, task.model.arguments)}, {summary.parameters:,} numbers "
        "trained together.",
        f"- At a site, each round: {how_long}of {escape(task.training.optimiser)}, learning rate "
        f"{figure(task.training.learning_rate)}, batch size {task.training.batch_size}.",
        f"- Preprocessing, part of the exported model: {_steps(task.preprocessing)}.",
        f"- Augmentation, in training only: {_steps(task.augmentation)}.",
    ]
    return lines


def _metrics(task: Task, summary: RunSummary) -> list[str]:
    lines = ["## Metrics", ""]
    names = list(summary.metrics)
    names += sorted({n for site in summary.sites for n in site.metrics} - set(names))
    if not names:
        return [*lines, "The sites sent no metrics; how well the model predicts is not known."]
    rows = [["**all sites**", *(figure(summary.metrics.get(name)) for name in names)]]
    reporting = [site for site in summary.sites if site.metrics]
    rows += [
        [escape(site.name), *(figure(site.metrics.get(name)) for name in names)]
        for site in reporting[:_MAX_SITES]
    ]
    lines += [
        "Of the final model, on rows that the sites held out of training, as the sites report "
        "them: nobody else has seen those rows. Those of all sites are made from added-up counts, "
        "not by averaging.",
        "",
        *table(["Site", *(f"{escape(name)}>" for name in names)], rows),
        "",
    ]
    if len(reporting) > _MAX_SITES:
        lines += [f"{len(reporting) - _MAX_SITES} more sites are not shown.", ""]
    meanings = {"loss": _LOSSES[task.data.target.kind], **_MEANINGS}
    lines += [f"- {escape(name)}: {meanings[name]}." for name in names if name in meanings]
    lines += [
        f"- {escape(name)} is made from binned scores: over all sites the exact value lies within "
        f"{figure(bound)} of the one shown."
        for name, bound in summary.error_bounds.items()
        if name in names
    ]
    return lines


_MASKED = (
    "The sites masked their updates (secure aggregation): the coordinator could read the sum of a "
    "round alone, which was of three sites or more."
)


_INSECURE = (
    "**Insecure.** Noise and batches came from a seed: whoever knows it takes the noise off, and "
    "no epsilon below holds. This was a simulation of rows that need no protection."
)

_SAMPLERS = {
    "poisson": (
        "one is the other with one record added or removed",
        "Each step draws records by Poisson sampling",
    ),
    "shuffled": (
        "one is the other with the place of one record left empty",
        "Each step takes the next records of a random order, for which epsilon credits nothing",
    ),
    "full": (
        "one is the other with the place of one record left empty",
        "Each step takes the next records in the order of the rows",
    ),
}


def _client(client: ClientGuarantee | None) -> list[str]:
    if client is None:
        return []
    noise = _NOISES.get(client.mechanism, escape(client.mechanism))
    return [
        f"Client-level differential privacy: a site's whole part in this run, epsilon = "
        f"{upper_figure(client.epsilon)} at delta = {client.delta:g} for all rounds. Two runs are "
        "neighbours when all updates of one site are zero in one of them; that the site took part "
        f"is public. It holds against {escape(client.against)}.",
        "",
        f"- Mechanism: each update is clipped to Euclidean norm {figure(client.clip)}"
        + _moved(client)
        + f"; the sum of a round has {noise} noise, its standard deviation "
        f"{figure(client.noise_multiplier)} times "
        + ("that norm" if client.quantile is None else "1.05 times the round's norm")
        + (f" once {client.honest} sites have added their share." if client.honest else "."),
        "- Several runs with the same site add up.",
        "",
    ]


def _moved(client: ClientGuarantee) -> str:
    """Return where the norm came to; empty where it stayed."""
    if client.quantile is None:
        return ""
    last = "" if client.last_clip is None else f", {figure(client.last_clip)} after the last"
    return (
        f" in the first round and then to a norm that follows the {figure(client.quantile)} "
        f"quantile of the norms{last}; how many updates were longer is released with the sum, "
        "under the same noise"
    )


_NOISES = {"discrete_gaussian": "discrete Gaussian", "skellam": "Skellam"}


def _privacy(summary: RunSummary) -> list[str]:
    protected = [site for site in summary.sites if site.epsilon is not None]
    lines = ["## Privacy", "", *_client(summary.client)]
    if not protected and summary.client is not None:
        outside = [_OUTSIDE.get(name) or escape(name) for name in summary.outside_epsilon]
        return [
            *lines,
            "**Nothing is promised for a single record** beyond what is promised for its whole "
            "site: no record-level noise was added.",
            *(["", _MASKED] if summary.masked else []),
            "",
            f"- Outside epsilon, left the sites without noise: {', '.join(outside) or 'nothing'}.",
        ]
    if not protected:
        return [
            *lines,
            "**None promised.** This model was trained without differential privacy: nothing "
            "bounds what it, or the updates that the sites sent, may reveal about a single record.",
            *(["", _MASKED] if summary.masked else []),
        ]
    delta = "an unrecorded delta" if summary.delta is None else f"delta = {summary.delta:g}"
    clip = (
        "an unrecorded norm" if summary.clip is None else f"Euclidean norm {figure(summary.clip)}"
    )
    bare = [site.name for site in summary.sites if site.epsilon is None]
    shown = sorted(protected, key=lambda site: (-(site.epsilon or 0.0), site.name))[:_MAX_SITES]
    if summary.randomness == "insecure_seeded":
        lines += [_INSECURE, ""]
    neighbours, drawn = _SAMPLERS.get(summary.sampler, _SAMPLERS["poisson"])
    lines += [
        f"Record-level differential privacy, {delta}. Two data sets of a site are neighbours when "
        f"{neighbours}; the epsilon below bounds how far the "
        "updates that the site sent in this run, and so this model, can tell them apart. It holds "
        "against whoever sees those updates.",
        "",
        *table(
            ["Site", "Epsilon>", "Noise multiplier>"],
            [
                [escape(site.name), upper_figure(site.epsilon), figure(site.noise_multiplier)]
                for site in shown
            ],
        ),
        "",
    ]
    if len(protected) > len(shown):
        rest = len(protected) - len(shown)
        lines += [f"{_count(rest, 'more site')} spent no more than the last one shown.", ""]
    if bare:
        lines += [f"**No epsilon is recorded for {listed(bare, _MAX_SITES)}.**", ""]
    outside = [_OUTSIDE.get(name) or escape(name) for name in summary.outside_epsilon]
    if summary.masked:
        lines += [
            f"{_MASKED} No site says what it spent: the epsilon above is what each agreed to at "
            "most.",
            "",
        ]
    if summary.mechanism == "dp_ftrl":
        mechanism = (
            f"DP-FTRL. {drawn}, clips the gradient of each record to {clip}, and adds Gaussian "
            "noise that takes back some of the noise of the steps before. All steps are one "
            "Gaussian mechanism; the noise multiplier is its noise over what one record moves."
        )
    else:
        mechanism = (
            f"DP-SGD. {drawn}, clips the gradient of each record to {clip}, and adds Gaussian "
            "noise; its standard deviation is the noise multiplier times that norm."
        )
    return [
        *lines,
        f"- Mechanism: {mechanism}",
        f"- Outside epsilon, left the sites without noise: {', '.join(outside) or 'nothing'}.",
        "- Row counts are treated as public, and epsilon does not cover what is made from a site's "
        "row count: its epsilon and noise multiplier themselves, the sampling rate, the number of "
        "steps, and whether the site took part.",
        "- One record is protected, in this run. Several records of one person, several sites that "
        "hold the same person, and several runs on the same records add up.",
    ]


def _use(task: Task, summary: RunSummary) -> list[str]:
    lines = [
        "## Use and limits",
        "",
        f"- Made to predict {escape(task.data.target.name)} for inputs that fit the contract "
        "below. The task declares no other purpose.",
    ]
    if summary.metrics:
        lines.append(
            "- The metrics describe held-out rows of the sites above. They say nothing about data "
            "from elsewhere, or from later."
        )
    worst = _worst(summary)
    if worst:
        lines.append(worst)
    if task.data.target.kind == "classes":
        lines.append("- Probabilities are the softmax of the model's outputs, not calibrated.")
    else:
        lines.append("- The prediction is one number without an interval around it.")
    return lines


def _worst(summary: RunSummary) -> str:
    """Return how unequal the sites are in the first metric that more than one of them has."""
    for name in ("accuracy", "auc", "macro_f1", "r2", "mae", "loss"):
        found = sorted((s.metrics[name], s.name) for s in summary.sites if name in s.metrics)
        if len(found) > 1:
            if name in _SMALLER_IS_BETTER:
                found.reverse()
            worst, best = (f"{figure(v)} at {escape(site)}" for v, site in (found[0], found[-1]))
            return f"- Sites differ: {escape(name)} is {worst} and {best}."
    return ""


def _inputs(task: Task) -> list[str]:
    contract = task.data
    lines = ["## Inputs", ""]
    if contract.kind == "image":
        return [
            *lines,
            f"`inputs`: {contract.dtype}, batch x {_shape(contract.example_shape)} (channels, "
            "height, width), as read. Any batch size.",
        ]
    imputed = any(step.step == "impute" for step in task.preprocessing)
    rows = [
        [str(place), escape(column.name), *_column(column, imputed=imputed)]
        for place, column in enumerate(contract.columns[:_MAX_COLUMNS], start=1)
    ]
    lines += [
        f"`inputs`: {contract.dtype}, batch x {len(contract.columns)}, in this order, as read: a "
        "missing number is NaN, a category is the place of its word, from 0. Any batch size.",
        "",
        *table(["No.>", "Column", "Kind", "Admitted", "When missing"], rows),
    ]
    if len(contract.columns) > _MAX_COLUMNS:
        rest = len(contract.columns) - _MAX_COLUMNS
        lines += ["", f"{rest} more columns are in `task.json`."]
    return lines


def _column(column: Column, *, imputed: bool) -> list[str]:
    if column.kind == "category":
        return ["category", listed(column.values, _MAX_CLASSES), "refused"]
    missing = f"filled with {figure(column.fill)}" if imputed and column.fill is not None else ""
    return ["number", _range(column.minimum, column.maximum), missing or "refused"]


def _outputs(task: Task) -> list[str]:
    target = task.data.target
    if target.kind == "classes":
        return [
            "## Outputs",
            "",
            f"`logits`: float32, batch x {len(target.classes)}, one for each class in this order: "
            f"{listed(target.classes, _MAX_CLASSES)}.",
        ]
    return [
        "## Outputs",
        "",
        f"`value`: float32, batch. Targets in training: {_range(target.minimum, target.maximum)}.",
    ]


def _verify(signer: str) -> list[str]:
    return [
        "## Verify and use",
        "",
        "The folder is signed with the Ed25519 key of this fingerprint (SHA-256 of its raw bytes):",
        "",
        f"`{signer}`",
        "",
        "A card can be forged together with a key: compare the fingerprint with the one that the "
        "coordinator gave you by another way.",
        "",
        *code_block(
            [
                "lepton-fed predict --bundle FOLDER --key coordinator.pub \\",
                "  --input rows.csv --output predictions.csv",
            ]
        ),
        "",
        "verifies signature and hashes before it opens anything, and refuses a folder with a "
        "changed, missing or added file.",
    ]


def _record(task: Task, summary: RunSummary, release: Release) -> list[str]:
    digests = [
        ["task", task.digest],
        ["layout", summary.layout],
        ["model", summary.model],
        ["run", summary.digest],
    ]
    libraries = sorted({*summary.versions, *release.exported_with})
    promise = "has" if summary.repeatable else "need not have"
    checks = ", ".join(
        f"{figure(check.difference)} at batch {check.batch}" for check in release.parity.checks
    )
    return [
        "## Record",
        "",
        f"- Run {escape(summary.run)}, finished {escape(summary.finished)}, seed {summary.seed}; a "
        f"second run with this seed {promise} the same run digest.",
        f"- Largest difference between the exported and the trained model on "
        f"{escape(release.parity.inputs)}: {checks}.",
        f"- Bundle format {FORMAT_VERSION}.",
        "",
        *table(["Digest", "SHA-256"], [[name, f"`{escape(value)}`"] for name, value in digests]),
        "",
        *table(
            ["Library", "Training", "Export"],
            [
                [
                    escape(name),
                    escape(summary.versions.get(name, "-")),
                    escape(release.exported_with.get(name, "-")),
                ]
                for name in libraries
            ],
        ),
    ]


def _steps(steps: list[Step]) -> str:
    return ", ".join(_named(step.step, step.arguments) for step in steps) or "none"


def _named(name: str, arguments: dict[str, object]) -> str:
    if not arguments:
        return escape(name)
    shown = ", ".join(
        f"{key} {json.dumps(value, ensure_ascii=False)}" for key, value in sorted(arguments.items())
    )
    if len(shown) > _MAX_ARGUMENTS:
        shown = f"{shown[:_MAX_ARGUMENTS]}..."
    return f"{escape(name)} ({escape(shown)})"


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(str(size) for size in shape)


def _range(low: float | None, high: float | None) -> str:
    if low is None and high is None:
        return "any number"
    if high is None:
        return f"at least {figure(low)}"
    return f"at most {figure(high)}" if low is None else f"{figure(low)} to {figure(high)}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
