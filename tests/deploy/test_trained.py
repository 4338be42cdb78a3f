"""A network of the recipes, trained on the digits, does the same as an integer program."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qsnn_ext import calibrate
from qsnn_ext.deploy import DeployedModel, backends, compare, lower
from qsnn_ext.deploy.reference import ReferenceSession

pytest.importorskip("lightning")
pytest.importorskip("sklearn")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """The narrow ResNet19 of the demo after some epochs, its program, and the test batches."""
    from benchmarks.agreement import trained
    from recipes import cifar10_resnet19
    from recipes.engine.run import train

    torch.manual_seed(0)
    config = cifar10_resnet19.config(data="digits").but(
        epochs=3, accelerator="cpu", progress=False, out=tmp_path_factory.mktemp("run")
    )
    result = train(config)
    assert result["last_accuracy"] > 60  # of a network that has learned nothing, little is shown
    model, batches, test = trained(config.folder)
    calibrate(model, [x for x, _ in batches])
    return model, lower(model, batches[0][0]), test


def test_predictions_agree(case):
    model, program, batches = case
    report = compare(model, program, batches)
    assert report.samples == 450
    assert report.accuracy_model > 0.6
    assert report.predictions >= 0.995, str(report)
    assert abs(report.accuracy_model - report.accuracy_program) <= 0.003, str(report)
    assert report.layers[0].agreement > 0.99999, str(report)
    assert min(a.agreement for a in report.layers) > 0.995, str(report)


def test_input_of_8_bits_is_where_the_rest_comes_from(case):
    model, _, batches = case
    program = lower(model, batches[0][0], input_bits=8)
    coarse = compare(model, program, batches[:2])
    given = compare(model, program, batches[:2], quantize_input=True)
    worst = min(a.agreement for a in given.layers)
    assert min(a.agreement for a in coarse.layers) < 0.99 < worst, f"{coarse}\n{given}"


def test_engine_and_reference_give_the_same_bits(case):
    _, program, batches = case
    codes = DeployedModel(program, "numpy").codes(batches[0][0][:48])
    session = ReferenceSession(program, 48)
    expected = [session.step(codes)[0] for _ in range(program.timesteps)]
    for backend in backends():
        engine = DeployedModel(program, backend).session(48)
        for want in expected:
            np.testing.assert_array_equal(engine.step(codes)[0], want)
        for name, state in session.state().items():
            np.testing.assert_array_equal(engine.state()[name], state)
