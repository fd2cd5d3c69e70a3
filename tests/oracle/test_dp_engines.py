"""Every engine's clipped sum against one record at a time, over layers, shapes and batch sizes."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from opacus.layers import DPLSTM
from torch import nn
from torch.nn import functional

from lepton_fed.privacy.dp.engine import DpSgd
from lepton_fed.privacy.dp.engines.base import clip_factors
from lepton_fed.privacy.dp.engines.bookkeeping import BookKeepingEngine
from lepton_fed.privacy.dp.engines.build import build_engine
from lepton_fed.privacy.dp.engines.pieces import Outer, Rows, Whole, joined
from lepton_fed.privacy.dp.entropy import Entropy
from lepton_fed.privacy.dp.step_noise import IndependentSteps

ENGINES = ["hooks", "ghost", "bookkeeping"]
OURS = ["bookkeeping"]
WORDS = 11


def losses(outputs, targets):
    return functional.cross_entropy(outputs.flatten(1), targets, reduction="none")


def one_by_one(model, inputs, targets, clip, loss=losses):
    """Return the clipped sum by a pass for each record, and the length of what was added."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    total = [torch.zeros_like(p, dtype=torch.float64) for p in parameters]
    added = 0.0
    for index in range(len(targets)):
        part = slice(index, index + 1)
        answer = loss(model(inputs[part]), targets[part]).sum()
        found = torch.autograd.grad(answer, parameters, allow_unused=True)
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in found if g is not None))
        factor = min(1.0, clip / max(norm, 1e-300))
        added += factor * norm
        for at, gradient in zip(total, found, strict=True):
            if gradient is not None:
                at += factor * gradient.double()
    return flat(total), added


def flat(tensors):
    return torch.cat([tensor.flatten().double() for tensor in tensors])


def clipped(engine, model, inputs, targets, clip, loss=losses):
    with build_engine(engine, model, loss, clip) as summing:
        return flat(summing.clipped_sum(inputs, targets))


def agree(model, inputs, clip, engines=ENGINES):
    targets = torch.arange(len(inputs)) % 2
    model.train()
    reference, added = one_by_one(model, inputs, targets, clip)
    for engine in engines:
        found = clipped(engine, model, inputs, targets, clip)
        # Relative to what was added: in the sum, records cancel.
        assert float((found - reference).norm()) <= 1e-5 * added, engine


def seeded(seed):
    return torch.Generator().manual_seed(seed)


CLIPS = st.sampled_from([1e-6, 0.3, 3.0, 1e6])
COUNTS = st.integers(1, 7)
SEEDS = st.integers(0, 2**31)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    count=COUNTS,
    clip=CLIPS,
    seed=SEEDS,
    sizes=st.lists(st.integers(1, 70), min_size=2, max_size=3),
    lead=st.lists(st.integers(1, 5), max_size=2),
    bias=st.booleans(),
)
def test_linear_layers_on_vectors_and_sequences(count, clip, seed, sizes, lead, bias):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = [nn.Linear(a, b, bias) for a, b in pairwise(sizes)]
        model = nn.Sequential(*layers, nn.Tanh(), nn.Linear(sizes[-1], 2))
        # Opacus' ghost norms take linear layers on vectors and on sequences only.
        engines = ENGINES if len(lead) < 2 else ["hooks", "bookkeeping"]
        agree(model, torch.randn(count, *lead, sizes[0]), clip, engines)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    count=COUNTS,
    clip=CLIPS,
    seed=SEEDS,
    dimensions=st.integers(1, 3),
    groups=st.integers(1, 2),
    each=st.integers(1, 3),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    padding=st.sampled_from([0, 1, 2, "same", "valid"]),
    dilation=st.integers(1, 2),
    mode=st.sampled_from(["zeros", "reflect", "circular"]),
    bias=st.booleans(),
)
def test_convolutions(
    count, clip, seed, dimensions, groups, each, kernel, stride, padding, dilation, mode, bias
):
    assume(padding != "same" or stride == 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        convolution = getattr(nn, f"Conv{dimensions}d")(
            2 * groups, each * groups, kernel, stride, padding, dilation, groups, bias, mode
        )
        sides = [7, 6, 5][:dimensions]
        inputs = torch.randn(count, 2 * groups, *sides)
        width = convolution(inputs).flatten(1).shape[1]
        model = nn.Sequential(convolution, nn.ReLU(), nn.Flatten(), nn.Linear(width, 2))
        # Opacus pads convolutions with zeros whatever they say.
        zeros = mode == "zeros" or padding in (0, "valid")
        agree(model, inputs, clip, ENGINES if zeros else OURS)


def test_a_wide_convolution_of_few_places_keeps_factors():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(64, 96, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(384, 2)
    )
    agree(model, torch.randn(4, 64, 2, 2), 0.5)


NORMS = {
    "layer": (lambda: nn.LayerNorm(6), (4, 6)),
    "layer over two": (lambda: nn.LayerNorm([4, 6]), (4, 6)),
    "layer without shift": (lambda: nn.LayerNorm(6, bias=False), (6,)),
    "rms": (lambda: nn.RMSNorm(6), (4, 6)),
    "group": (lambda: nn.GroupNorm(2, 4), (4, 3, 3)),
    "instance 1": (lambda: nn.InstanceNorm1d(4, affine=True), (4, 5)),
    "instance 2": (lambda: nn.InstanceNorm2d(4, affine=True), (4, 3, 3)),
    "instance 3": (lambda: nn.InstanceNorm3d(4, affine=True), (4, 2, 3, 2)),
    "no scale": (lambda: nn.LayerNorm(6, elementwise_affine=False), (6,)),
}


@pytest.mark.parametrize("count", [1, 2, 7])
@pytest.mark.parametrize("kind", NORMS)
def test_normalisation(kind, count):
    torch.manual_seed(count)
    make, shape = NORMS[kind]
    layer = make()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    width = torch.Size(shape).numel()
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(width, 2))
    for clip in (0.3, 1e6):
        # Opacus' rule for layer normalisation takes the shift for granted.
        agree(model, torch.randn(count, *shape), clip, ENGINES if "shift" not in kind else OURS)


class Text(nn.Module):
    """Words, a place for each, and layers on the sequence."""

    def __init__(self, padding=None):
        super().__init__()
        self.words = nn.Embedding(WORDS, 6, padding_idx=padding)
        self.places = nn.Embedding(9, 6)
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 2)

    def forward(self, words):
        places = torch.arange(words.shape[1]).expand_as(words)
        return self.head(torch.tanh(self.norm(self.words(words) + self.places(places))).mean(1))


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    count=COUNTS,
    clip=CLIPS,
    seed=SEEDS,
    length=st.integers(1, 9),
    padding=st.sampled_from([None, 0, 3]),
)
def test_words_that_repeat_within_a_record(count, clip, seed, length, padding):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # Opacus sends a gradient to the padding; its ghost norms fail on expanded indices.
        engines = ["hooks", "bookkeeping"] if padding is None else OURS
        agree(Text(padding), torch.randint(WORDS, (count, length)), clip, engines)


class Attention(nn.Module):
    """One head of attention, of linear layers."""

    def __init__(self, width=6):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.head = nn.Linear(width, 2)

    def forward(self, tokens):
        scores = self.query(tokens) @ self.key(tokens).mT
        return self.head((scores.softmax(-1) @ self.value(tokens)).mean(1))


class Tied(nn.Module):
    """Uses one layer over and over, as a layer."""

    def __init__(self, width=5, wide=40):
        super().__init__()
        self.first, self.again = nn.Linear(width, wide), nn.Linear(wide, wide)
        self.convolution, self.head = nn.Conv1d(1, 1, 3, padding=1), nn.Linear(wide, 2)

    def forward(self, inputs):
        hidden = self.first(inputs)
        for _ in range(3):
            hidden = torch.tanh(self.again(hidden))
            hidden = torch.tanh(self.convolution(hidden.unsqueeze(1)).squeeze(1))
        return self.head(hidden)


class Shared(nn.Module):
    """Has one weight in two layers of different kinds."""

    def __init__(self):
        super().__init__()
        self.words, self.middle = nn.Embedding(WORDS, 6), nn.Linear(6, 6)
        self.head = nn.Linear(6, WORDS, bias=False)
        self.head.weight = self.words.weight

    def forward(self, words):
        return self.head(torch.tanh(self.middle(self.words(words))).mean(1))


class Bare(nn.Module):
    """Holds a parameter of its own beside layers."""

    def __init__(self):
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(6))
        self.inner, self.head = nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, inputs):
        return self.head(self.scale * torch.tanh(self.inner(inputs)) + self.shift)


class InPlace(nn.Module):
    """Overwrites what its layers answer."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, tokens):
        hidden = torch.relu_(self.first(tokens))
        hidden = hidden + torch.relu_(self.second(hidden).mul_(2.0))
        return self.head(hidden.mean(1))


class TwoBranches(nn.Module):
    """Answers from layers of which none is behind the other, one of them idle, one frozen."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.idle = (nn.Linear(6, 2) for _ in range(3))
        self.frozen = nn.Linear(6, 2).requires_grad_(False)

    def forward(self, inputs):
        self.idle(inputs)
        return self.left(inputs) * torch.tanh(self.right(inputs)) + self.frozen(inputs)


@pytest.mark.parametrize("clip", [0.05, 1e6])
@pytest.mark.parametrize("count", [1, 2, 6])
@pytest.mark.parametrize(
    ("model", "shape", "engines"),
    [
        (Attention, (4, 6), ENGINES),
        (Tied, (5,), ["hooks", "bookkeeping"]),
        (lambda: Tied(wide=300), (5,), ["hooks", "bookkeeping"]),
        (Bare, (6,), ["bookkeeping"]),
        (InPlace, (4, 6), ["bookkeeping"]),
        (TwoBranches, (6,), ENGINES),
    ],
    ids=["attention", "tied", "tied wide", "bare", "in place", "branches"],
)
def test_models_that_are_more_than_a_chain(model, shape, engines, count, clip):
    torch.manual_seed(count)
    agree(model(), torch.randn(count, *shape), clip, engines)


@pytest.mark.parametrize("count", [1, 5])
def test_one_weight_in_layers_of_two_kinds(count):
    torch.manual_seed(count)
    agree(Shared(), torch.randint(WORDS, (count, 4)), 0.1, ["hooks", "bookkeeping"])


class Recurrent(nn.Module):
    """Opacus' LSTM, which lists the parameters of its layers under a second name."""

    def __init__(self):
        super().__init__()
        self.lstm, self.head = DPLSTM(3, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, tokens):
        return self.head(self.lstm(tokens)[0][:, -1])


def test_a_layer_without_a_rule_is_taken_all_the_same_and_named():
    torch.manual_seed(0)
    model, bare = Recurrent(), Bare()
    agree(model, torch.randn(5, 3, 3), 0.1, ["hooks", "bookkeeping"])
    assert BookKeepingEngine(bare, losses, 1.0).without_rule == ["the model"]
    # Opacus' linear layers of a recurrent cell are linear layers.
    assert BookKeepingEngine(model, losses, 1.0).without_rule == []
    assert BookKeepingEngine(Attention(), losses, 1.0).without_rule == []
    for engine in ENGINES:
        assert private(bare, engine).without_rule == ["the model"]
        assert private(Attention(), engine).without_rule == []


class Scaled(nn.Module):
    """Multiplies by one number that is trained."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, inputs):
        return inputs * self.scale


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("clip", [0.05, 1e6])
def test_a_parameter_of_a_single_number(count, clip):
    torch.manual_seed(count)
    model = nn.Sequential(nn.Linear(4, 4), Scaled(), nn.Linear(4, 3))
    agree(model, torch.randn(count, 4), clip)


class InDouble(nn.Module):
    """Layers that are kept in float64, as a site's own may be."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(WORDS, 4).double()
        self.lines = nn.Linear(4, 5).double()
        self.last = nn.Linear(5, 3).double()

    def forward(self, inputs):
        return self.last(torch.tanh(self.lines(self.words(inputs))).mean(1))


@pytest.mark.parametrize("clip", [0.05, 1e6])
def test_layers_in_float64_are_measured_without_being_changed(clip):
    torch.manual_seed(3)
    agree(InDouble(), torch.randint(0, WORDS, (5, 6)), clip)


@pytest.mark.parametrize("engine", ENGINES)
def test_an_empty_batch_gives_zeros(engine):
    model = nn.Linear(3, 2)
    with private(model, engine) as dp:
        found = dp.clipped_sum(torch.empty(0, 3), torch.empty(0, dtype=torch.int64))
    assert [t.shape for t in found] == [(2, 3), (2,)]
    assert not flat(found).any()


def private(model, engine, clip=0.3, noise=0.0, **more):
    return DpSgd(
        model,
        losses,
        clip=clip,
        noise=IndependentSteps(noise * clip, Entropy(bytes(range(32)))),
        expected_batch=4,
        engine=engine,
        **more,
    )


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("most", [1, 3, 8, 9])
def test_a_batch_in_parts_gives_the_same_step_with_the_noise_once(engine, most):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2))
    inputs, targets = torch.randn(8, 5), torch.arange(8) % 2
    seen = []
    model.register_forward_hook(lambda module, given, answer: seen.append(len(answer)))
    steps = []
    for limit in (None, most):
        with private(model, engine, noise=1.5, most_records=limit) as dp:
            dp.gradient(inputs, targets)
        steps.append(flat(p.grad for p in model.parameters()))
    assert max(seen[1:]) <= most
    assert sum(seen) == 16
    assert float((steps[0] - steps[1]).norm()) <= 1e-6 * float(steps[0].norm())


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (nn.Sequential(nn.Embedding(5, 2, max_norm=1.0), nn.Flatten()), "mix records"),
        (nn.Sequential(nn.Embedding(5, 2, scale_grad_by_freq=True), nn.Flatten()), "mix records"),
    ],
)
def test_an_embedding_whose_rows_depend_on_other_records_is_refused(model, why):
    with pytest.raises(NotImplementedError, match=why):
        clipped("bookkeeping", model, torch.randint(5, (3, 1)), torch.zeros(3).long(), 1.0)


class PlacesOnce(Text):
    """Looks the places up once for all records."""

    def forward(self, words):
        places = torch.arange(words.shape[1])
        return self.head(torch.tanh(self.words(words) + self.places(places)).mean(1))


class Overwriting(nn.Module):
    """Overwrites what a layer was given, after it."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, inputs):
        given = inputs.clone()
        answer = self.first(given)
        given.zero_()
        return self.head(answer)


class Made(nn.Module):
    """Makes a layer's weight of another parameter."""

    def __init__(self):
        super().__init__()
        self.head = nn.utils.parametrizations.weight_norm(nn.Linear(6, 2))

    def forward(self, inputs):
        return self.head(inputs)


class Drawing(Bare):
    """Draws at random inside a layer without a rule."""

    def forward(self, inputs):
        return super().forward(functional.dropout(inputs, 0.5, training=self.training))


@pytest.mark.parametrize(
    ("model", "inputs", "why"),
    [
        (PlacesOnce, torch.randint(WORDS, (3, 5)), "one input for each record"),
        (Overwriting, torch.randn(3, 6), "overwritten"),
        (Drawing, torch.randn(3, 6), "record by record"),
        (Made, torch.randn(3, 6), "made of other parameters|one input for each record"),
    ],
)
def test_what_cannot_be_told_apart_by_record_is_refused(model, inputs, why):
    with pytest.raises(NotImplementedError, match=why):
        clipped("bookkeeping", model(), inputs, torch.zeros(3).long(), 1.0)


def test_pieces_say_the_same_in_every_form():
    draws = seeded(3)
    factors = torch.tensor([0.5, 0.0, 1.0, 0.25], dtype=torch.float64)
    for places, width, height in ((1, 3, 4), (3, 5, 2), (2, 30, 40)):
        inputs = torch.randn(4, places, width, generator=draws)
        gradients = torch.randn(4, places, height, generator=draws)
        outer = Outer(inputs, gradients, torch.Size((height, width)))
        whole = outer.whole()
        torch.testing.assert_close(outer.squared_norms(), whole.squared_norms(), rtol=1e-6, atol=0)
        for piece in (outer, whole):
            wanted = torch.einsum("b,b...->...", factors, whole.values.double())
            torch.testing.assert_close(piece.weighted_sum(factors), wanted, rtol=1e-5, atol=1e-6)
    index = torch.tensor([[2, 2, 0], [1, 0, 1], [0, 1, 2], [2, 2, 2]])
    gradients = torch.randn(4, 3, 5, generator=draws)
    table = Rows.read(index, gradients, 4)
    wanted = torch.zeros(4, 4, 5)
    for record in range(4):
        for place in range(3):
            wanted[record, index[record, place]] += gradients[record, place]
    torch.testing.assert_close(table.whole().values, wanted)
    torch.testing.assert_close(
        table.squared_norms().float(), wanted.flatten(1).square().sum(1), rtol=1e-5, atol=0
    )
    torch.testing.assert_close(
        table.weighted_sum(factors),
        torch.einsum("b,b...->...", factors, wanted.double()),
        rtol=1e-6,
        atol=1e-6,
    )
    both = joined([table, Whole(wanted)])
    torch.testing.assert_close(both.whole().values, 2 * wanted)


def test_factors_bound_what_is_added():
    norms = torch.tensor([0.0, 1e-40, 1.0, 2.0, 1e37, 1e39, math.inf, math.nan]).double()
    factors = clip_factors(norms, 1.0)
    assert factors.tolist() == pytest.approx([1.0, 1.0, 1.0, 0.5, 1e-37, 0.0, 0.0, 0.0])
