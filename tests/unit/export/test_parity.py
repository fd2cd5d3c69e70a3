from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

import lepton_fed.export.parity as parity_module
from lepton_fed.errors import TaskError
from lepton_fed.export.inference import Session
from lepton_fed.export.parity import BATCHES, check_parity


def perturbed(data: bytes, by: float) -> bytes:
    """The same graph with one weight of its largest initializer changed."""
    model = onnx.load_model_from_string(data)
    tensor = max(model.graph.initializer, key=lambda t: len(t.raw_data))
    values = numpy_helper.to_array(tensor).copy()
    values.flat[0] += by
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    return bytes(model.SerializeToString())


@pytest.mark.parametrize("name", ["mlp", "cnn", "regressor"])
def test_the_exported_model_answers_as_the_trained_one(
    request: pytest.FixtureRequest, name: str
) -> None:
    case = request.getfixturevalue(name)
    found = check_parity(case.onnx, case.module, case.task, case.examples)
    assert tuple(check.batch for check in found.checks) == BATCHES == (1, 2, 7, 32)
    for check in found.checks:
        assert 0 <= check.difference <= check.tolerance
        assert check.tolerance < 1e-3


def test_the_differences_are_those_of_the_two_outputs(mlp: Any) -> None:
    found = check_parity(mlp.onnx, mlp.module, mlp.task, mlp.examples, batches=[5])
    expected = mlp.torch(mlp.examples)
    answered = Session(mlp.onnx).run("inputs", mlp.examples)
    assert found.checks[0].difference == float(np.abs(expected - answered).max())
    assert found.checks[0].tolerance == 1e-5 * max(1.0, float(np.abs(expected).max()))


def test_the_record_says_what_was_compared(mlp: Any, cnn: Any, regressor: Any) -> None:
    def inputs(case: Any) -> str:
        return check_parity(case.onnx, case.module, case.task, case.examples).inputs

    assert inputs(mlp) == "5 real rows in turn"
    assert inputs(cnn) == "1 real row"
    assert inputs(regressor) == "40 real rows in turn"


def test_batches_go_through_the_rows_in_turn(mlp: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []
    original = parity_module._compare

    def watched(session: Any, module: Any, task: Any, inputs: Any) -> Any:
        seen.extend(inputs[:, 0].tolist())
        return original(session, module, task, inputs)

    monkeypatch.setattr(parity_module, "_compare", watched)
    check_parity(mlp.onnx, mlp.module, mlp.task, mlp.examples, batches=[1, 2, 7])
    assert seen == [mlp.examples[i % 5, 0].item() for i in range(10)]


@pytest.mark.parametrize("name", ["mlp", "cnn", "regressor"])
def test_one_perturbed_weight_is_found(request: pytest.FixtureRequest, name: str) -> None:
    case = request.getfixturevalue(name)
    with pytest.raises(TaskError) as caught:
        check_parity(perturbed(case.onnx, 0.01), case.module, case.task, case.examples)
    assert {problem.code for problem in caught.value.problems} == {"LF3207"}
    assert "nothing was written" in caught.value.problems[0].remedy


class Times(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return values * self.factor


def test_the_tolerance_follows_the_size_of_the_outputs(regressor: Any) -> None:
    scaled = nn.Sequential(regressor.module, Times(1 + 4e-6)).eval()
    found = check_parity(regressor.onnx, scaled, regressor.task, regressor.examples)
    assert max(check.difference for check in found.checks) > 1e-6
    with pytest.raises(TaskError, match="LF3207"):
        check_parity(
            regressor.onnx,
            nn.Sequential(regressor.module, Times(1 + 1e-4)).eval(),
            regressor.task,
            regressor.examples,
        )


def test_nan_is_no_agreement(mlp: Any) -> None:
    with pytest.raises(TaskError, match="differ by nan"):
        check_parity(perturbed(mlp.onnx, np.nan), mlp.module, mlp.task, mlp.examples)


def test_a_file_that_does_not_run_is_refused(mlp: Any) -> None:
    model = onnx.load_model_from_string(mlp.onnx)
    model.graph.node[0].op_type = "NoSuchOperator"
    for data in (b"garbage", bytes(model.SerializeToString())):
        with pytest.raises(TaskError, match="LF3206"):
            check_parity(data, mlp.module, mlp.task, mlp.examples)


def test_an_answer_of_another_shape_is_not_stretched(regressor: Any) -> None:
    model = onnx.load_model_from_string(regressor.onnx)
    reduce = onnx.helper.make_node("ReduceMax", ["value"], ["one"], keepdims=1)
    model.graph.node.append(reduce)
    model.graph.output[0].name = "one"
    with pytest.raises(TaskError, match=r"LF3206.*answers \(1,\)"):
        check_parity(
            bytes(model.SerializeToString()),
            regressor.module,
            regressor.task,
            regressor.examples,
            batches=[2],
        )


def test_examples_that_do_not_fit_are_refused(mlp: Any) -> None:
    with pytest.raises(TaskError, match="LF3204"):
        check_parity(mlp.onnx, mlp.module, mlp.task, mlp.examples[:0])
