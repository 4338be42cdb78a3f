"""The short way: save, load, call, compare; and what happens without a compiler."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

import qsnn_ext
import qsnn_ext.deploy as deploy
from qsnn_ext import models
from qsnn_ext.deploy import engine
from qsnn_ext.deploy.reference import ReferenceSession
from qsnn_ext.errors import InputError, InputTypeError, LoweringError, StateError
from tests.deploy.networks import ExplicitMembranes, PLIFNet, calibrate, make_dyadic, quantize


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    torch.manual_seed(0)
    x = torch.randint(0, 17, (5, 2, 8, 8)) / 16
    model = make_dyadic(quantize(PLIFNet()))
    path = tmp_path_factory.mktemp("net") / "net.qsnn"
    deploy.save(model, path, x)
    return model, path, x


def test_save_load_call(case):
    model, path, x = case
    with torch.no_grad():
        expected = model(x).numpy()
    net = deploy.load(path)
    np.testing.assert_allclose(net(x), expected, atol=1e-5)
    np.testing.assert_array_equal(net(x), net(x.numpy()))
    np.testing.assert_array_equal(net(x), net(net.codes(x)[:, :, :, :]))


@pytest.mark.parametrize("backend", engine.backends())
def test_backends_agree(case, backend):
    _, path, x = case
    want = deploy.load(path, backend="numpy")(x)
    for threads in (1, 2):
        np.testing.assert_array_equal(deploy.load(path, backend, threads)(x), want)


def test_calls_use_the_memory_of_earlier_ones(case):
    """Every call begins at rest, whatever ran before it, at the same time, or was interrupted."""
    _, path, x = case
    net = deploy.load(path)
    inputs = [x, x.flip(0), x[:2], 1 - x, x[:1]]
    wanted = [deploy.load(path)(v) for v in inputs]
    for _ in range(2):
        for v, want in zip(inputs, wanted, strict=True):
            np.testing.assert_array_equal(net(v), want)
    assert 1 <= len(net._idle) <= 2
    with ThreadPoolExecutor(4) as pool:
        for got, want in zip(pool.map(net, inputs * 8), wanted * 8, strict=True):
            np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(copy.deepcopy(net)(x), wanted[0])


def test_several_outputs_come_back_as_a_tuple():
    x = torch.randint(0, 17, (3, 64)) / 16
    model = make_dyadic(quantize(ExplicitMembranes()))
    with torch.no_grad():
        expected = model(x)
    answer = deploy.DeployedModel(deploy.lower(model, x))(x)
    assert isinstance(answer, tuple)
    for got, want in zip(answer, expected, strict=True):
        np.testing.assert_allclose(got, want.numpy(), atol=1e-4)


def test_without_the_engine_numpy_answers_with_a_warning(case, monkeypatch):
    _, path, x = case
    want = deploy.load(path)(x)
    monkeypatch.setattr(engine, "library", lambda: None)
    assert engine.backends() == ["numpy"]
    with pytest.warns(RuntimeWarning, match="NumPy reference"):
        net = deploy.load(path)
    np.testing.assert_array_equal(net(x), want)


def test_sessions_are_the_whole_run_step_by_step(case):
    _model, path, x = case
    net = deploy.load(path)
    whole = net.integers(x)[0]
    session = net.session(len(x))
    for t in range(net.program.timesteps):
        np.testing.assert_array_equal(session.step(net.codes(x))[0], whole[t])


def test_wrong_inputs(case):
    _, path, x = case
    net = deploy.load(path)
    for bad in (x[:, :1], torch.full_like(x, float("nan")), x[:0], x[None, None]):
        with pytest.raises(InputError):
            net(bad)
    with pytest.raises(InputTypeError):
        net(x > 0)


def test_save_needs_a_sample(tmp_path):
    with pytest.raises(LoweringError, match=r"unknown; pass .*save\(model, path, sample\)"):
        deploy.save(PLIFNet(), tmp_path / "x.qsnn")


@pytest.mark.parametrize("frames", [False, True])
def test_save_knows_what_the_model_was_calibrated_with(tmp_path, frames):
    x = torch.rand(20, 2, 16, 16)
    x = x.round().unsqueeze(0).repeat(3, 1, 1, 1, 1) if frames else x
    model = models.vggsnn(width=0.1, T=3, bits="1w-2u").eval()
    qsnn_ext.calibrate(model, [(x, None), (3 * x, None)])
    known = deploy.save(model, tmp_path / "known.qsnn")
    assert known.input_bits == (8 if frames else 16)
    said = deploy.save(model, tmp_path / "said.qsnn", x[:, :16] if frames else x[:16])
    assert (tmp_path / "known.qsnn").read_bytes() == (tmp_path / "said.qsnn").read_bytes()
    assert known.input_scale == said.input_scale
    deploy.save(copy.deepcopy(model), tmp_path / "copy.qsnn")  # copies know it too
    assert (tmp_path / "known.qsnn").read_bytes() == (tmp_path / "copy.qsnn").read_bytes()
    model.calibrated_input = None
    with pytest.raises(LoweringError, match="unknown"):
        deploy.save(model, tmp_path / "unknown.qsnn")
    model.example_input_array = torch.zeros(1, 2, 16, 16)
    with pytest.raises(InputError, match="all zero"):
        deploy.save(model, tmp_path / "lightning.qsnn")


def test_save_knows_what_a_model_was_called_with_in_other_ways(tmp_path):
    x = torch.rand(4, 2, 16, 16)
    model = models.vggsnn(width=0.1, T=3, bits="1w-2u").eval()
    qsnn_ext.calibrate(model, [{"image": x}], forward=lambda m, batch: m(batch["image"]))
    known = deploy.save(model, tmp_path / "known.qsnn")
    assert known.input_scale == deploy.lower(model, x).input_scale
    qsnn_ext.calibrate(model, [x], forward=lambda m, batch: m.forward(batch))
    with pytest.raises(LoweringError, match="unknown"):  # the model itself was never called
        deploy.save(model, tmp_path / "x.qsnn")


def test_compare_needs_batches_and_counts_labels(case):
    model, path, x = case
    program = deploy.load_program(path)
    with pytest.raises(StateError):
        deploy.compare(model, program, [])
    with torch.no_grad():
        labels = model(x).argmax(1)
    report = deploy.compare(model, program, [(x, labels)])
    figure = report.plot()
    assert [bar.get_height() for bar in figure.axes[0].containers[0]] == [
        100 * layer.agreement for layer in report.layers
    ]
    assert len(figure.axes[1].containers) == 2
    assert report.accuracy_model == report.accuracy_program == report.predictions == 1.0
    assert "predictions agree on 100" in str(report)


def test_compare_notices_a_wrong_program(case):
    model, path, x = case
    program = deploy.load_program(path)
    program.neurons[0].threshold = program.neurons[0].threshold // 2
    report = deploy.compare(model, program, [x])
    assert report.layers[0].agreement < 1


def test_a_trained_looking_network_agrees():
    torch.manual_seed(0)
    x = torch.rand(6, 3, 16, 16)
    model = calibrate(models.vggsnn(width=0.25, bits="1w-4u", T=3, in_channels=3), x)
    program = deploy.lower(model, x)
    session = ReferenceSession(program, 6)
    net = deploy.DeployedModel(program)
    codes = net.codes(x)
    expected = np.stack([session.step(codes)[0] for _ in range(3)])
    np.testing.assert_array_equal(net.integers(x)[0], expected)
