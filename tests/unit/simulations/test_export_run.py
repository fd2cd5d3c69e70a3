"""From a run's folder to a signed bundle that predicts what the trained model predicts."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch

from lepton_fed.data.read import read
from lepton_fed.errors import BundleRefused, RunError, TaskError
from lepton_fed.export.bundle import verify_bundle
from lepton_fed.export.predict import ClassPredictions, NumberPredictions, predict
from lepton_fed.identity.keys import generate_key, load_public_key
from lepton_fed.server.release import export_run, next_version
from lepton_fed.simulations.sequential import simulate

MLP = {"name": "mlp", "arguments": {"hidden": [8]}}
TRAINING = {"batch_size": 32, "learning_rate": 0.0005, "epochs": 2}


@pytest.fixture
def key(tmp_path):
    path = tmp_path / "keys" / "coordinator.pem"
    path.parent.mkdir()
    generate_key(path)
    return path


@pytest.mark.parametrize("reader", ["digits", "diabetes"])
def test_a_run_becomes_a_bundle_that_predicts_as_the_model_does(load, key, reader):
    loaded = load(reader=reader, model=MLP, training=TRAINING)
    done = simulate(loaded)
    report = export_run(done.folder, loaded.conf, key=key)
    assert report.bundle.folder == done.folder.bundle
    verified = verify_bundle(done.folder.bundle, load_public_key(key.with_suffix(".pub")))
    assert verified.manifest.run == done.summary.run
    assert verified.manifest.version == 1
    assert verified.task == loaded.conf.task
    rows = read(loaded.conf.sites.source, loaded.conf.task.data).inputs[:50]
    module = done.kit.predictor(done.outcome.model)
    with torch.no_grad():
        expected = module(torch.from_numpy(rows)).numpy()
    predictions = predict(verified, rows)
    if reader == "digits":
        assert isinstance(predictions, ClassPredictions)
        assert np.array_equal(predictions.codes, expected.argmax(axis=1))
    else:
        assert isinstance(predictions, NumberPredictions)
        np.testing.assert_allclose(predictions.values, expected, rtol=1e-5, atol=1e-4)
    assert next_version(done.folder.path.parent, loaded.conf.task.digest) == 2
    assert next_version(done.folder.path.parent, "0" * 64) == 1
    stranger = key.with_name("stranger.pem")
    generate_key(stranger)
    with pytest.raises(BundleRefused):
        verify_bundle(done.folder.bundle, load_public_key(stranger.with_suffix(".pub")))


def refusal(kind, done, loaded, key, folder=None):
    with pytest.raises(kind) as caught:
        export_run(folder or done.folder, loaded.conf, key=key)
    assert not done.folder.bundle.exists()
    return caught.value.code


def test_a_run_that_is_not_finished_is_not_exported(load, key):
    loaded = load()
    done = simulate(loaded)
    (done.folder.path / "summary.json").unlink()
    assert refusal(RunError, done, loaded, key) == "LF5206"


def test_a_model_that_was_changed_is_not_exported(load, key):
    loaded = load()
    done = simulate(loaded)
    path = done.folder.path / "model.safetensors"
    whole = path.read_bytes()
    changed = bytearray(whole)
    changed[-1] ^= 1
    path.write_bytes(changed)
    assert refusal(RunError, done, loaded, key) == "LF5207"
    for broken in (b"", whole[:50], b"\xff" + whole[1:], whole + b"\0"):
        path.write_bytes(broken)
        assert refusal(RunError, done, loaded, key) == "LF5203"
    path.unlink()
    assert refusal(RunError, done, loaded, key) == "LF5202"


def test_the_model_of_another_run_is_not_exported(load, key):
    loaded = load()
    done, other = simulate(loaded), simulate(load("seed=8"))
    shutil.copy(other.folder.path / "model.safetensors", done.folder.path)
    assert refusal(RunError, done, loaded, key) == "LF5207"
    wider = simulate(load(model=MLP))
    shutil.copy(wider.folder.path / "model.safetensors", done.folder.path)
    assert refusal(RunError, done, loaded, key) == "LF5203"


def test_a_summary_that_was_changed_is_not_exported(load, key):
    loaded = load()
    done = simulate(loaded)
    path = done.folder.path / "summary.json"
    path.write_text(path.read_text().replace(done.summary.model, "0" * 64))
    assert refusal(RunError, done, loaded, key) == "LF5207"
    path.write_text("{")
    assert refusal(RunError, done, loaded, key) == "LF5204"


def test_a_conf_of_another_task_is_not_exported(load, key):
    done = simulate(load())
    code = refusal(TaskError, done, load("task.training.learning_rate=0.2"), key)
    assert code == "LF3213"


def test_a_model_with_tensors_of_its_sites_is_not_exported(load, key):
    loaded = load("task.model.local=['1.bias']")
    done = simulate(loaded)
    assert refusal(TaskError, done, loaded, key) == "LF3402"


@pytest.mark.parametrize("content", ["{", "[]", '{"a": 0}', '{"a": -5}', '{"a": "2"}', None])
def test_versions_that_cannot_be_read_stop_an_export_before_anything_is_written(
    load, key, tmp_path, content
):
    loaded = load()
    done = simulate(loaded)
    versions = done.folder.path.parent / "versions.json"
    if content is None:
        versions.mkdir()
    else:
        versions.write_text(content)
    for version in (None, 5):
        with pytest.raises(RunError):
            export_run(done.folder, loaded.conf, key=key, target=tmp_path / "out", version=version)
    assert not (tmp_path / "out").exists()


def test_versions_count_wherever_the_bundles_went(load, key, tmp_path):
    loaded = load()
    done = simulate(loaded)
    found = [
        export_run(done.folder, loaded.conf, key=key, target=tmp_path / name, version=version)
        for name, version in (("a", None), ("b", None), ("c", 7), ("d", 2), ("e", None))
    ]
    assert [report.bundle.manifest.version for report in found] == [1, 2, 7, 2, 8]
