from __future__ import annotations

import logging
import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import lepton_fed.export.onnx as onnx_module
from lepton_fed.core.task import Target
from lepton_fed.errors import TaskError
from lepton_fed.export.onnx import OPSET, export_onnx, reference_outputs
from lepton_fed.export.parity import check_parity


def axes(value: onnx.ValueInfoProto) -> list[int | str]:
    return [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]


def code_of(module: nn.Module, task: Any, examples: Any) -> str:
    with pytest.raises(TaskError) as caught:
        export_onnx(module, task, examples)
    assert all(problem.remedy for problem in caught.value.problems)
    return caught.value.code


@pytest.mark.parametrize(
    ("name", "inputs", "outputs", "element"),
    [
        ("mlp", [3], ("logits", [3]), onnx.TensorProto.FLOAT),
        ("cnn", [1, 6, 6], ("logits", [4]), onnx.TensorProto.UINT8),
        ("regressor", [3], ("value", []), onnx.TensorProto.FLOAT),
    ],
)
def test_the_file_has_the_interface_of_its_task(
    request: pytest.FixtureRequest, name: str, inputs: Any, outputs: Any, element: int
) -> None:
    model = onnx.load_model_from_string(request.getfixturevalue(name).onnx)
    onnx.checker.check_model(model, full_check=True)
    (given,), (answer,) = model.graph.input, model.graph.output
    assert given.name == "inputs"
    assert given.type.tensor_type.elem_type == element
    assert answer.name == outputs[0]
    assert axes(given)[1:] == inputs
    assert axes(answer)[1:] == outputs[1]
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", OPSET)]


@pytest.mark.parametrize("name", ["mlp", "cnn", "regressor"])
def test_the_batch_axis_is_free_even_from_a_single_example(
    request: pytest.FixtureRequest, name: str
) -> None:
    model = onnx.load_model_from_string(request.getfixturevalue(name).onnx)
    assert isinstance(axes(model.graph.input[0])[0], str)
    assert isinstance(axes(model.graph.output[0])[0], str)
    assert len(request.getfixturevalue("cnn").examples) == 1


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_no_note_of_the_exporter_is_left_in_the_file(
    request: pytest.FixtureRequest, name: str
) -> None:
    data = request.getfixturevalue(name).onnx
    for trace in (b"stack_trace", b"conftest", b"site-packages", b".py", b"aten"):
        assert trace not in data
    model = onnx.load_model_from_string(data)
    assert not model.graph.value_info
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)


def test_an_export_is_repeatable_quiet_and_leaves_no_state(
    mlp: Any, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    filters = list(warnings.filters)
    loggers = [logging.getLogger(name) for name in onnx_module._NOISE]
    before = [(list(logger.filters), logger.level, logger.disabled) for logger in loggers]
    assert export_onnx(mlp.module, mlp.task, mlp.examples) == mlp.onnx
    assert list(warnings.filters) == filters
    assert [(list(lg.filters), lg.level, lg.disabled) for lg in loggers] == before
    assert [record for record in caplog.records if record.levelno >= logging.INFO] == []
    assert capfd.readouterr() == ("", "")


def test_only_the_known_noise_is_silenced(caplog: pytest.LogCaptureFixture) -> None:
    name = next(iter(onnx_module._NOISE))
    with caplog.at_level(logging.WARNING), onnx_module._quiet():
        logging.getLogger(name).warning("torchvision is not installed. Skipping %s", "nms")
        logging.getLogger(name).warning("something else")
        warnings.warn("`isinstance(treespec, LeafSpec)` is deprecated", FutureWarning, stacklevel=1)
        with pytest.warns(FutureWarning, match="another"):
            warnings.warn("another one", FutureWarning, stacklevel=1)
        with pytest.warns(UserWarning, match="LeafSpec"):
            warnings.warn("LeafSpec, but not a deprecation", UserWarning, stacklevel=1)
    assert [record.getMessage() for record in caplog.records] == ["something else"]


def test_noise_is_let_through_again_after_a_failure() -> None:
    with pytest.raises(ZeroDivisionError), onnx_module._quiet():
        raise ZeroDivisionError
    assert not any(logging.getLogger(name).filters for name in onnx_module._NOISE)


class Branches(nn.Module):
    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return rows if rows.sum() > 0 else -rows


def test_a_model_that_cannot_be_traced_is_named(
    mlp: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    branching = nn.Sequential(mlp.module, Branches()).eval()
    assert code_of(branching, mlp.task, mlp.examples) == "LF3201"
    capfd.readouterr()  # torch prints the graph it got stuck in, which helps the model's author


class Attention(nn.Module):
    """A layer whose batch axis the exporter freezes, without a word, at an example of one row."""

    def __init__(self) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(3, 1, batch_first=True)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        tokens = rows[:, None]
        answer: torch.Tensor = self.attend(tokens, tokens, tokens, need_weights=False)[0][:, 0]
        return answer


def test_one_example_gives_a_free_batch_axis_where_the_exporter_would_freeze_it(
    mlp: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = nn.Sequential(mlp.module[0], Attention()).eval()
    data = export_onnx(module, mlp.task, mlp.examples[:1])
    assert isinstance(axes(onnx.load_model_from_string(data).graph.input[0])[0], str)
    check_parity(data, module, mlp.task, mlp.examples)

    monkeypatch.setattr(onnx_module, "_TRACED_ROWS", 1)
    with pytest.raises(TaskError) as caught:
        export_onnx(module, mlp.task, mlp.examples[:1])
    assert [problem.code for problem in caught.value.problems] == ["LF3202", "LF3202"]
    assert "the batch axis of 'inputs' is 1, not free" in str(caught.value)


def test_a_file_that_breaks_the_standard_is_refused(
    mlp: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = onnx.load_model_from_string(mlp.onnx)
    saved.graph.node[0].op_type = "NoSuchOperator"
    monkeypatch.setattr(onnx_module, "_trace", lambda *_: saved)
    assert code_of(mlp.module, mlp.task, mlp.examples) == "LF3203"


def test_examples_are_held_to_the_contract(mlp: Any) -> None:
    for examples in (
        mlp.examples.astype(np.float64),
        mlp.examples[:, :2],
        mlp.examples[:0],
        mlp.examples[0],
    ):
        assert code_of(mlp.module, mlp.task, examples) == "LF3204"


def test_an_output_of_another_width_is_refused(mlp: Any) -> None:
    target = Target(classes=["a", "b"])
    task = replace(mlp.task, data=replace(mlp.task.data, target=target))
    assert code_of(mlp.module, task, mlp.examples) == "LF3204"
    number = replace(mlp.task, data=replace(mlp.task.data, target=Target(kind="number")))
    assert code_of(mlp.module, number, mlp.examples) == "LF3204"


def test_a_model_that_diverged_is_refused(mlp: Any) -> None:
    task = replace(mlp.task, data=replace(mlp.task.data, target=Target(classes=["a", "b", "c"])))
    assert code_of(nn.Sequential(nn.Identity()).eval(), task, mlp.examples) == "LF3204"
    with pytest.raises(TaskError, match="NaN or infinity"):
        export_onnx(nn.Sequential(nn.Identity()).eval(), task, mlp.examples)


def test_a_model_beyond_two_gigabytes_is_refused_before_it_is_traced(
    mlp: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_module, "_MAX_ONNX_BYTES", 100)
    monkeypatch.setattr(onnx_module, "_trace", None)
    assert code_of(mlp.module, mlp.task, mlp.examples) == "LF3205"


def test_a_module_in_training_mode_is_the_callers_mistake(mlp: Any) -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5))
    with pytest.raises(ValueError, match="eval"):
        export_onnx(module, mlp.task, mlp.examples)


def test_a_number_may_come_with_or_without_a_last_axis(regressor: Any) -> None:
    flat = nn.Sequential(regressor.module, nn.Flatten(0)).eval()
    expected = reference_outputs(regressor.module, regressor.task, regressor.examples)
    assert expected.shape == (40,)
    assert np.array_equal(reference_outputs(flat, regressor.task, regressor.examples), expected)


def test_read_only_examples_are_taken(mlp: Any) -> None:
    examples = mlp.examples.copy()
    examples.setflags(write=False)
    assert reference_outputs(mlp.module, mlp.task, examples).shape == (5, 3)
