"""Membrane scales that are learnt: values, gradients, and what becomes of them afterwards."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from qsnn_ext import (
    LearnedMembraneQuantizer,
    MembraneConfig,
    MembraneQuantizer,
    QuantConfig,
    calibrate,
    deploy,
    load_checkpoint,
    models,
    quantize_,
    save_checkpoint,
    spikingjelly,
)
from qsnn_ext import functional as F
from qsnn_ext.errors import ConfigError, QSNNError


def straight_through(x, alpha, bits, at):
    """The function whose slope LSQ takes: rounding errors stay as they are ``at`` that scale."""
    n = 2 ** (bits - 1) - 1
    ratio = np.clip(x / at, -1, 1)
    error = np.round(ratio * n) / n - ratio
    return alpha * (np.clip(x / alpha, -1, 1) + error)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("alpha", [0.3, 1.7])
def test_gradients_are_those_of_lsq(rng, bits, alpha):
    x = rng.normal(0.2, 1.0, size=(5, 3, 4))
    weight = rng.normal(size=x.shape)
    xt = torch.tensor(x, requires_grad=True)
    scale = torch.tensor(alpha, dtype=torch.float64, requires_grad=True)
    value = F.quantize_learned(xt, scale, bits)
    np.testing.assert_allclose(
        value.detach().numpy(), straight_through(x, alpha, bits, alpha), atol=1e-12
    )
    (value * torch.tensor(weight)).sum().backward()

    def slope(make, h=1e-6):
        return (make(h) - make(-h)) / (2 * h)

    n, features = 2 ** (bits - 1) - 1, 12
    wanted = slope(lambda h: (weight * straight_through(x, alpha + h, bits, alpha)).sum())
    assert scale.grad.item() == pytest.approx(wanted / np.sqrt(features * n), rel=1e-5)
    inside = np.abs(x) <= alpha
    np.testing.assert_array_equal(xt.grad.numpy(), weight * inside)
    assert inside.any()
    assert not inside.all()


def test_a_scale_of_nothing_gives_no_gradient_but_its_own():
    x = torch.ones(2, 3, requires_grad=True)
    alpha = torch.tensor(0.0, requires_grad=True)
    F.quantize_learned(x, alpha, 2).sum().backward()
    assert not x.grad.any()
    assert torch.isfinite(alpha.grad)


def test_it_begins_with_the_maximum_and_follows_the_optimizer():
    quantizer = LearnedMembraneQuantizer(2)
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=0.1)
    u = torch.tensor([[0.2, 0.8], [-3.0, 0.1]])
    first = quantizer(u)
    assert quantizer.alpha.item() == pytest.approx(0.8)
    (first - u).square().sum().backward()
    before = quantizer.alpha.item()
    optimizer.step()
    # Clipped potentials at -3 ask for a larger scale.
    assert quantizer.alpha.item() > before
    later = quantizer.alpha.item()
    quantizer(torch.tensor([[9.0, 9.0]]))
    assert quantizer.alpha.item() == later
    with torch.no_grad():
        quantizer.alpha.fill_(-0.5)
    quantizer(u)
    assert quantizer.alpha.item() == pytest.approx(0.8)


def test_codes_are_the_value_and_evaluation_needs_one():
    quantizer = LearnedMembraneQuantizer(4).eval()
    with pytest.raises(QSNNError, match="learnt membrane scale is used before"):
        quantizer(torch.ones(3))
    quantizer.freeze(1.5)
    u = torch.randn(4, 7)
    codes, scale = quantizer.codes(u)
    assert torch.equal(codes * scale, quantizer(u))
    alone = quantizer(u[:1])
    assert torch.equal(quantizer(torch.cat([u[:1], 99 * u]))[:1], alone)
    again = type(quantizer)(**quantizer.options())
    assert again.options() == quantizer.options()
    copied = copy.deepcopy(quantizer)
    assert copied.alpha is not quantizer.alpha
    assert torch.equal(copied(u), quantizer(u))


def net():
    """A small network with learnt scales, converted from float neurons."""
    torch.manual_seed(0)
    from spikingjelly.activation_based import layer, neuron

    made = nn.Sequential(
        layer.Conv2d(1, 4, 3, padding=1, bias=False), layer.BatchNorm2d(4),
        neuron.LIFNode(step_mode="m", v_threshold=0.5),
        layer.Conv2d(4, 4, 3, padding=1, bias=False), layer.BatchNorm2d(4),
        neuron.LIFNode(step_mode="m", v_threshold=0.5),
        layer.Flatten(), layer.Linear(4 * 36, 3),
    )  # fmt: skip
    for module in made.modules():
        if hasattr(module, "step_mode"):
            module.step_mode = "m"
    quantize_(made, QuantConfig(weight=1, membrane=MembraneConfig(bits=2, mode="learned")))
    return made


def scales(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, MembraneQuantizer)}


def test_a_network_learns_its_scales_is_saved_and_deployed(tmp_path):
    from spikingjelly.activation_based import functional

    model, x = net(), torch.rand(3, 8, 1, 6, 6)
    found = scales(model)
    assert len(found) == 2
    assert all(type(m) is LearnedMembraneQuantizer for m in found.values())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    values = []
    for _ in range(3):
        optimizer.zero_grad()
        functional.reset_net(model)
        model(x).square().mean().backward()
        values.append({n: m.alpha.item() for n, m in found.items()})
        optimizer.step()
    # The last time step's state is read by nobody, so what moves a scale are those before it.
    assert all(m.alpha.grad is not None for m in found.values())
    assert any(values[0][n] != m.alpha.item() for n, m in found.items())

    model.eval()
    functional.reset_net(model)
    wanted = model(x).detach()
    save_checkpoint(model, tmp_path / "x.safetensors")
    again = load_checkpoint(tmp_path / "x.safetensors", net()).eval()
    functional.reset_net(again)
    assert torch.equal(again(x), wanted)
    functional.reset_net(model)
    agreement = deploy.compare(model, deploy.lower(model, x), [x], quantize_input=True)
    assert min(layer.agreement for layer in agreement.layers) > 0.98


def test_calibration_sets_a_learnt_scale_and_leaves_it_learnable():
    model, x = net(), torch.rand(3, 8, 1, 6, 6)
    calibrate(model, [x])
    found = scales(model)
    assert all(m.alpha.item() > 0 for m in found.values())
    before = {n: m.alpha.item() for n, m in found.items()}
    model.train()
    model(x).sum().backward()
    assert before == {n: m.alpha.item() for n, m in found.items()}
    assert all(m.alpha.requires_grad for m in found.values())


def test_by_name_and_by_hand():
    node = spikingjelly.QuantLIFNode(bits=4, mode="learned")
    assert type(node.membrane) is LearnedMembraneQuantizer
    model = models.resnet19(width=1 / 32, bits="1w-2u", neuron={"mode": "learned"})
    assert {type(m) for m in scales(model).values()} == {LearnedMembraneQuantizer}
    with pytest.raises(ConfigError):
        LearnedMembraneQuantizer(1)
    config = QuantConfig(weight=1, membrane=MembraneConfig(bits=4, mode="learned"))
    assert QuantConfig.from_dict(config.to_dict()) == config
