"""Lowering: models of both hosts become programs that do what the simulation does."""

from __future__ import annotations

import ast
import copy
import inspect
from pathlib import Path

import numpy as np
import pytest
import snntorch as snn
import torch
import torch.nn.functional as F
from spikingjelly.activation_based import functional, layer, neuron
from spikingjelly.activation_based.model import sew_resnet, spiking_resnet, spiking_vgg
from torch import nn

from qsnn_ext import layers as own_layers
from qsnn_ext import models
from qsnn_ext.deploy import (
    DeployedModel,
    compare,
    lower,
    lowering,
    nir,
    saving,
)
from qsnn_ext.deploy.lowering.input_codes import input_code
from qsnn_ext.deploy.program import Affine
from qsnn_ext.errors import InputError, LoweringError
from qsnn_ext.folding import fold_batchnorm_
from qsnn_ext.quantizers import MembraneQuantizer
from qsnn_ext.snntorch import QLeaky
from qsnn_ext.spikingjelly import QuantLIFNode
from tests.deploy.networks import (
    ExplicitMembranes,
    FramesLoop,
    PLIFNet,
    SingleStepNet,
    calibrate,
    make_dyadic,
    quantize,
    reset,
)
from tests.pairwise import pairwise

ZOO = {
    "spiking_neuron": neuron.LIFNode, "tau": 2.0, "decay_input": False, "num_classes": 10,
}  # fmt: skip


def multi_step(net: nn.Module) -> nn.Module:
    functional.set_step_mode(net, "m")
    return net


class Function(nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def small_vgg() -> nn.Module:
    """The zoo's VGG11 without the width of its classifier, which is 90 % of its weights."""
    net = spiking_vgg.spiking_vgg11_bn(**ZOO)
    net.classifier = nn.Sequential(
        layer.Linear(512 * 49, 64), neuron.LIFNode(), layer.Dropout(), layer.Linear(64, 10)
    )
    return multi_step(net)


def small_resnet(model: type[nn.Module] = sew_resnet.SEWResNet, **options) -> nn.Module:
    """The zoo's ResNet18 with one block of each width, not two: with and without a projection."""
    block = (sew_resnet if model is sew_resnet.SEWResNet else spiking_resnet).BasicBlock
    return multi_step(model(block, [1, 1, 1, 1], **options, **ZOO))


def grid(*shape: int, seed: int = 0) -> torch.Tensor:
    """Inputs that are multiples of 1/16."""
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 17, shape, generator=g) / 16


NETWORKS = {
    "plif": lambda: (PLIFNet(), grid(3, 2, 8, 8)),
    "single-step": lambda: (SingleStepNet(), grid(3, 1, 8, 8)),
    "explicit-subtract": lambda: (ExplicitMembranes(), grid(3, 64)),
    "explicit-zero": lambda: (ExplicitMembranes(mechanism="zero"), grid(3, 64)),
    "explicit-immediate": lambda: (ExplicitMembranes(mechanism="zero", delay=False), grid(3, 64)),
    "frames": lambda: (FramesLoop(), grid(4, 3, 2, 16, 16)),
    "spiking_resnet": lambda: (small_resnet(spiking_resnet.SpikingResNet), grid(2, 2, 3, 16, 16)),
    "sew_add": lambda: (small_resnet(cnf="ADD"), grid(2, 2, 3, 16, 16)),
    "sew_and": lambda: (small_resnet(cnf="AND"), grid(2, 2, 3, 16, 16)),
    "sew_iand": lambda: (small_resnet(cnf="IAND"), grid(2, 2, 3, 16, 16)),
    "vgg11": lambda: (
        small_vgg(), grid(2, 2, 3, 32, 32)),
    "resnet19": lambda: (models.resnet19(width=0.125, bits="1w-32u"), grid(2, 3, 16, 16)),
    "resnet19-snntorch": lambda: (
        models.resnet19(width=0.1, bits="1w-32u", host="snntorch"), grid(2, 3, 16, 16)),
    "vgg16": lambda: (models.vgg16(width=0.125, bits="1w-32u", T=2), grid(2, 3, 32, 32)),
    "vggsnn": lambda: (models.vggsnn(width=0.125, bits="1w-32u", T=3), grid(2, 2, 16, 16)),
}  # fmt: skip

LARGE = ("spiking_resnet", "sew_add", "sew_and", "sew_iand", "vgg11", "vgg16")


def spikes_agree(model, program, x):
    """Every spike of every layer and every output is the same."""
    report = compare(model, program, [x])
    assert report.layers
    assert len(report.layers) == len(program.neurons)
    rates = [a.rate_model for a in report.layers]
    assert max(rates) > 0.02, "the network is silent: the comparison would say nothing"
    for a in report.layers:
        assert a.agreement == 1.0, str(report)
    assert report.output_error < 1e-4
    assert report.predictions == 1.0


def quantize_models(net: nn.Module, bits, order):
    """Networks of qsnn_ext.models are quantized but for their neurons; zoo networks not at all."""
    if not isinstance(net, models.SpikingNet):
        return quantize(net, bits, order=order)
    for m in net.modules():
        if isinstance(m, QuantLIFNode | QLeaky):
            m.membrane = MembraneQuantizer(bits) if bits else None
            m.order = order
    return net


SETTINGS = [  # a float membrane is not quantized, so that it has no order
    (2, "fire_first"), (2, "quantize_first"), (4, "fire_first"), (4, "quantize_first"),
    (None, "fire_first"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "bits", "order"),
    [(n, *s) for n in NETWORKS for s in (SETTINGS[:1] if n in LARGE else SETTINGS)],
)
def test_exact_arithmetic_gives_equal_spikes(name, bits, order):
    torch.manual_seed(0)
    net, x = NETWORKS[name]()
    # A 2-bit charge exceeds snnTorch's threshold only if its one level lies above it.
    strict = any(isinstance(m, snn.Leaky) for m in net.modules())
    low, high = (1, 1) if (bits, order, strict) == (2, "quantize_first", True) else (-2, 0)
    net = make_dyadic(quantize_models(net, bits, order), seed=3, low=low, high=high)
    spikes_agree(net, lower(net, x), x)


@pytest.mark.parametrize(
    "forward",
    [
        lambda y: torch.flatten(input=y, start_dim=2),
        lambda y: torch.add(y, other=y),
        lambda y: y.mean(0) + y.mean(0),
    ],
)
def test_functions_answer_as_the_model_does(forward):
    net = make_dyadic(
        nn.Sequential(
            layer.SeqToANNContainer(own_layers.QuantConv2d(2, 4, 3)),
            QuantLIFNode(step_mode="m"),
            Function(forward),
        )
    )
    x = grid(3, 2, 2, 9, 9)
    answer = DeployedModel(lower(net, x))(x)
    with torch.no_grad():
        np.testing.assert_allclose(answer, net(x).numpy(), atol=1e-4)


@pytest.mark.parametrize("bits", [3, 8])
@pytest.mark.parametrize("mechanism", ["subtract", "zero", "none"])
@pytest.mark.parametrize("delay", [True, False])
def test_every_leaky_reset(mechanism, delay, bits):
    torch.manual_seed(1)
    net = FramesLoop()
    net.net[2] = QLeaky(
        beta=0.5, bits=bits, reset_mechanism=mechanism, reset_delay=delay, init_hidden=True
    )
    net = make_dyadic(quantize(net, bits), seed=bits)
    x = grid(6, 2, 2, 16, 16)
    spikes_agree(net, lower(net, x), x)


@pytest.mark.parametrize(
    ("make", "host", "preset"),
    pairwise(
        [models.resnet19, models.vgg16, models.vggsnn],
        ["spikingjelly", "snntorch"],
        ["paper", "official"],
    ),
)
def test_networks_of_the_paper_with_real_scales(make, host, preset):
    torch.manual_seed(0)
    side = 32 if make is models.vgg16 else 16
    x = grid(2, 3, side, side)
    net = calibrate(
        make(width=0.125, T=2, bits="1w-2u", preset=preset, host=host, in_channels=3), x
    )
    program = lower(net, x)
    # Batch norms are in the layers, and a sum has the unit of its neuron already.
    assert not any(isinstance(op, Affine) for op in program.ops)
    report = compare(net, program, [x])
    # Float32 and fixed point both round; a spike in a thousand may differ, and then spreads.
    assert report.layers[0].agreement > 0.9999
    assert np.mean([a.agreement for a in report.layers]) > 0.97, str(report)


@pytest.mark.parametrize("v_reset", [None, 0.0, 0.25], ids=["soft", "hard", "hard-0.25"])
@pytest.mark.parametrize("decay_input", [True, False])
@pytest.mark.parametrize("order", ["fire_first", "quantize_first"])
def test_spikingjelly_neuron_options(v_reset, decay_input, order):
    net = nn.Sequential(
        own_layers.QuantLinear(16, 40),
        QuantLIFNode(tau=2.0, v_reset=v_reset, decay_input=decay_input, bits=4, order=order,
                     step_mode="m"),
        own_layers.QuantLinear(40, 5),
    )  # fmt: skip
    net = make_dyadic(net)
    x = grid(6, 8, 16)
    spikes_agree(net, lower(net, x), x)


def test_odd_convolutions():
    torch.manual_seed(0)
    net = nn.Sequential(
        own_layers.QuantConv2d(3, 12, (3, 1), stride=(1, 2), padding=(2, 1), bias=True),
        QuantLIFNode(decay_input=False, step_mode="m"),
        own_layers.BinaryConv2d(12, 24, 3, padding=2, dilation=2, groups=4),
        QuantLIFNode(decay_input=False, step_mode="m"),
        own_layers.BinaryConv2d(24, 24, 3, padding="same", groups=24),
        QuantLIFNode(decay_input=False, step_mode="m"),
        layer.AdaptiveAvgPool2d(1, step_mode="m"),
        layer.Flatten(step_mode="m"),
        own_layers.QuantLinear(24, 7),
    )
    net = make_dyadic(net, seed=1)
    x = grid(3, 2, 3, 11, 9)
    spikes_agree(net, lower(net, x), x)


def test_one_dimensional_convolutions():
    net = nn.Sequential(
        own_layers.QuantConv1d(2, 8, 3, padding=1),
        QuantLIFNode(decay_input=False),
        nn.MaxPool1d(2),
        own_layers.BinaryConv1d(8, 16, 3),
        QuantLIFNode(decay_input=False),
        nn.Flatten(),
        own_layers.QuantLinear(16 * 6, 4),
    )
    net = make_dyadic(net)
    x = grid(3, 2, 16)
    program = lower(net, x, time_first=False)
    assert program.metadata["time"] == "step"
    answer = DeployedModel(program)(x)
    with torch.no_grad():
        np.testing.assert_allclose(answer, net(x).numpy(), atol=1e-4)
    reset(net)


def test_per_channel_leak_and_threshold():
    lif = QLeaky(
        beta=torch.tensor([0.5, 0.25, 0.75, 1.0]), threshold=torch.tensor([1.0, 2.0, 0.5, 1.5]),
        bits=2, init_hidden=True, output=True,
    )  # fmt: skip
    lif.membrane.freeze(0.5)

    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = own_layers.QuantLinear(8, 4)
            self.lif = lif

        def forward(self, x):
            return torch.stack([self.lif(self.fc(x[t]))[0] for t in range(len(x))])

    net = Loop()
    weight = torch.randint(-127, 128, (4, 8)) / 64
    weight[0, 0] = 127 / 64
    net.fc.weight.data.copy_(weight)
    net.fc.bias.data.fill_(0.5)
    x = grid(8, 3, 8)
    spikes_agree(net.eval(), lower(net, x), x)


def test_tracing_leaves_the_model_alone():
    torch.manual_seed(0)
    x = grid(3, 2, 8, 8)
    net = calibrate(quantize(PLIFNet()), x)
    net.train()
    before = copy.deepcopy(net.state_dict())
    lower(net, x)
    assert net.training
    for k, v in net.state_dict().items():
        torch.testing.assert_close(v, before[k], rtol=0, atol=0)


def test_comparing_leaves_the_mode_of_every_module():
    net = make_dyadic(
        nn.Sequential(
            own_layers.QuantConv2d(2, 4, 3),
            layer.BatchNorm2d(4, step_mode="m"),
            QuantLIFNode(step_mode="m"),
        )
    )
    x = grid(2, 1, 2, 9, 9)
    program = lower(net, x)
    net.train()
    net[1].eval()  # a frozen batch norm
    before = [m.training for m in net.modules()]
    compare(net, program, [x])
    assert [m.training for m in net.modules()] == before


class TestRefusals:
    """Whatever has no integer form is named, with the reason and a remedy."""

    def net(self, *middle: nn.Module) -> nn.Module:
        return make_dyadic(
            nn.Sequential(
                own_layers.QuantConv2d(2, 4, 3),
                QuantLIFNode(step_mode="m"),
                *middle,
            )
        )

    x = grid(2, 1, 2, 9, 9)

    def refuse(self, model, match, **kwargs):
        with pytest.raises(LoweringError, match=match):
            lower(model, kwargs.pop("x", self.x), **kwargs)

    def test_scale_not_frozen(self):
        net = nn.Sequential(own_layers.QuantConv2d(2, 4, 3), QuantLIFNode(step_mode="m"))
        self.refuse(net, r"^1: .*calibrate")

    def test_float_weights(self):
        self.refuse(self.net(layer.Conv2d(4, 4, 3, step_mode="m")), r"^2: its weights are floating")

    def test_unknown_neuron(self):
        self.refuse(self.net(neuron.QIFNode(step_mode="m")), r"^2: a QIFNode has no integer form")

    def test_unknown_function(self):
        class Odd(nn.Module):
            def forward(self, x):
                return torch.erf(x)

        self.refuse(
            self.net(Odd()), r"^2: the operation 'erf' .* \(at test_lowering.py:\d+: return"
        )

    def test_value_dependent_branch(self):
        class Branch(nn.Module):
            def forward(self, x):
                return x if x.sum() > 0 else x + 1

        self.refuse(self.net(Branch()), "branches on the values")

    def test_conv3d(self):
        net = nn.Sequential(own_layers.QuantConv3d(2, 4, 1))
        self.refuse(net, "^0: three-dimensional", x=torch.rand(1, 2, 3, 3, 3), time_first=False)
        self.refuse(net, "is not .* images", x=torch.rand(1, 2, 3, 3, 3, 3))

    def test_double_reset(self):
        lif = snn.Leaky(beta=0.5, reset_delay=False, init_hidden=True)
        net = nn.Sequential(own_layers.QuantLinear(4, 4), lif)
        self.refuse(net, "^1: .*reset_delay=True", x=grid(2, 4))

    def test_inhibition(self):
        lif = snn.Leaky(beta=0.5, inhibition=True, init_hidden=True)
        net = nn.Sequential(own_layers.QuantLinear(4, 4), lif)
        self.refuse(net, "^1: inhibition", x=grid(2, 4))

    def test_shared_state(self):
        lif = QuantLIFNode(step_mode="m")
        lif.membrane.freeze(1.0)
        net = nn.Sequential(
            own_layers.QuantLinear(4, 4), lif, own_layers.BinaryLinear(4, 4), lif
        )  # fmt: skip
        self.refuse(net, "two places", x=grid(3, 2, 4))

    @pytest.mark.parametrize("field", ["running_mean", "running_var", "weight", "bias"])
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_batch_norm_that_is_not_finite(self, field, value):
        net = self.net(own_layers.BinaryConv2d(4, 4, 3), layer.BatchNorm2d(4, step_mode="m"),
                       QuantLIFNode(step_mode="m"))  # fmt: skip
        make_dyadic(net)
        getattr(net[3], field).data[1] = value
        self.refuse(net, rf"^3: its {field} contains NaN or infinity; .*checkpoint")

    def test_batch_norm_without_statistics(self):
        net = self.net(own_layers.BinaryConv2d(4, 4, 3))
        net.append(layer.BatchNorm2d(4, step_mode="m", track_running_stats=False))
        self.refuse(net, r"^3: a batch norm without running statistics.*track_running_stats=True")

    def test_vanished_variance(self):
        net = self.net(own_layers.BinaryConv2d(4, 4, 3), layer.BatchNorm2d(4, step_mode="m"))
        net[3].running_var[0] = -1.0
        self.refuse(net, r"^3: its running_var is not positive; ")

    def test_an_exploded_scale_names_its_batch_norm(self):
        net = self.net(own_layers.BinaryConv2d(4, 4, 3), layer.BatchNorm2d(4, step_mode="m"),
                       nn.Identity(), QuantLIFNode(step_mode="m"))  # fmt: skip
        make_dyadic(net)
        net[3].weight.data[0] = 1e30
        self.refuse(net, r"^3: its scale, up to .* exceeds the fixed-point range; look for")

    def test_weights_that_are_not_finite(self):
        net = self.net()
        net[0].weight.data.view(-1)[0] = float("nan")
        self.refuse(net, r"^0: its weights contain NaN or infinity; ")

    def test_a_sample_the_model_does_not_take(self):
        self.refuse(self.net(), r"^0: it fails on the sample \(RuntimeError: .*; check that",
                    x=grid(2, 1, 3, 9, 9))  # fmt: skip

    def test_python_that_cannot_be_traced(self):
        class Numpy(nn.Module):
            def forward(self, x):
                return torch.from_numpy(x.numpy())

        self.refuse(self.net(Numpy()), r"its forward cannot be traced|2: ")

    def test_every_refusal_has_a_reason_and_a_remedy(self):
        """Read from the source: two texts, and none of them empty."""
        folder = Path(lowering.__file__).parent
        source = "".join(path.read_text() for path in sorted(folder.glob("*.py")))
        calls = [
            node
            for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "fail"
        ]
        assert len(calls) > 50
        assert all(len(call.args) == 2 for call in calls)
        source += "".join(inspect.getsource(m) for m in (nir, saving))
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "LoweringError":
                text = ast.unparse(node.args[0])
                assert ": " in text, text
                assert "; " in text, text

    @pytest.mark.parametrize(
        ("forward", "match"),
        [
            (lambda y: F.max_pool2d(y.sum(0), 2), "follows a sum over time"),
            (lambda y: (y[0] + y[1]) * 0.5 + y[2], "combines different time steps"),
            (lambda y: y.sum(0) * y.sum(0), "only spikes can be multiplied"),
            (lambda y: y.mean(0) + y.sum(0), "adds a sum over time to something else"),
            (lambda y: y[[2, 1, 0], None], "only be lowered over time steps"),
            (lambda y: (1 - y).mean(0), "1 - spikes is possible within a product only"),
            (lambda y: (1 - y)[0], "1 - spikes is possible within a product only"),
            (lambda y: (1 - y) + y, "this sum cannot be lowered"),
            (lambda y: y / 0, "divide by a number"),
        ],
    )
    def test_what_would_answer_otherwise_or_fail_in_passing(self, forward, match):
        self.refuse(self.net(Function(forward)), match, x=grid(3, 2, 2, 9, 9))

    def test_adaptive_pooling_over_features(self):
        net = make_dyadic(
            nn.Sequential(
                own_layers.QuantLinear(8, 8), QuantLIFNode(step_mode="m"), nn.AdaptiveAvgPool1d(4)
            )
        )
        self.refuse(net, r"^2: adaptive pooling over features", x=grid(3, 2, 8))

    def test_a_convolution_times_spikes(self):
        class Gated(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv = own_layers.BinaryConv2d(4, 4, 1)

            def forward(self, x):
                return self.conv(x) * x

        net = nn.Sequential(own_layers.QuantConv2d(2, 4, 3), QuantLIFNode(), Gated())
        self.refuse(make_dyadic(net), r"^2: only spikes can be multiplied", x=grid(2, 2, 9, 9))

    def test_bad_samples(self):
        for sample in (torch.zeros(2, 3, dtype=torch.int), torch.tensor([[float("nan")]]), "x"):
            with pytest.raises(InputError):
                lower(self.net(), sample)


class TestInputCodes:
    """What is exact in 8 bits stays there; anything else takes 16."""

    def test_counts_are_their_own_codes(self):
        counts = np.array([0.0, 2.0, 4.0])  # all even, and yet a later 1 must not be lost
        assert input_code(counts) == (1.0, (0, 255))
        assert input_code(-counts) == (1.0, (-127, 127))
        assert input_code(np.zeros(3)) == (1.0, (0, 255))

    def test_grey_levels_are_their_own_codes(self):
        assert input_code(np.arange(256) / 255) == (1 / 255, (0, 255))
        assert input_code(np.float32([0, 1 / 255, 2 / 255])) == (1 / 255, (0, 255))

    def test_small_real_numbers_are_not_counts_of_zero(self):
        x = np.array([0.0, 1e-5, 3e-5, 2.5e-5])
        scale, limits = input_code(x)
        assert limits == (-32767, 32767)
        assert scale * 32767 == pytest.approx(6e-5, rel=1)
        assert np.rint(x / input_code(x, 8)[0]).max() >= 6

    def test_a_forced_width_holds_the_largest_count(self):
        scale, limits = input_code(np.arange(1000.0), 8)
        assert 999 / scale <= limits[1] + 0.5

    def test_more_counts_than_8_bits_hold(self):
        scale, limits = input_code(np.arange(1000.0))
        assert limits == (-32767, 32767)
        assert (1 / scale).is_integer()

    def test_real_numbers(self, rng):
        x = rng.standard_normal(1000)
        scale, limits = input_code(x)
        assert limits == (-32767, 32767)
        assert scale * 32767 == pytest.approx(2 * np.abs(x).max())

    def test_a_grid_through_zero(self):
        scale, limits = input_code(np.array([0.0, 1.0, 0.5]))
        assert limits == (-32767, 32767)
        assert 0.5 / scale in (2.0**12, 2.0**13)

    @pytest.mark.parametrize(("mean", "std"), [(0.3053, 0.3723), (0.1307, 0.3081), (0.5, 0.25)])
    def test_normalised_grey_levels_fall_on_codes(self, mean, std):
        x = (np.arange(256, dtype=np.float32) / 255 - np.float32(mean)) / np.float32(std)
        scale, limits = input_code(x)
        assert limits == (-32767, 32767)
        assert np.abs(x).max() / scale < 32767 / 1.9
        miss = np.abs(x / scale - np.rint(x / scale)).max()
        assert miss < 0.02  # a unit taken at random misses by half a code

    def test_forced_widths(self):
        assert input_code(np.array([0.0, 1.0, 0.5]), 8) == (0.5, (0, 255))
        scale, limits = input_code(np.array([-1.0, 0.3, 0.7123]), 8)
        assert limits == (-127, 127)
        assert scale == pytest.approx(1 / 127)
        assert input_code(np.array([0.3, 0.7123, 1.0]), 16)[1] == (-32767, 32767)

    @pytest.mark.parametrize("bits", [None, 2, 5, 8, 9, 12, 16])
    def test_every_width_gives_a_valid_program(self, bits):
        net = make_dyadic(nn.Sequential(own_layers.QuantLinear(8, 4)))
        for x in (torch.rand(3, 8), torch.randn(3, 8), grid(3, 8)):
            program = lower(net, x, input_bits=bits)
            assert program.input_bits == (16 if bits is None else bits)
            error = np.abs(DeployedModel(program)(x) - net(x).detach().numpy()).max()
            assert error < 8 * 2 * 3 * 2.0 ** (2 - program.input_bits)

    def test_a_first_layer_too_large_for_16_bits_takes_fewer(self):
        net = nn.Sequential(own_layers.QuantLinear(2000, 3))
        net[0].weight.data.fill_(1.0)  # codes of 127: the worst case
        x = torch.rand(2, 2000)
        program = lower(net, x)
        assert program.input_bits == 14
        assert 2000 * 127 * (2**13 - 1) < 2**31 <= 2000 * 127 * (2**14 - 1)
        with pytest.raises(LoweringError, match=r"^0: .*overflow.*input_bits=14 or less"):
            lower(net, x, input_bits=16)

    def test_an_all_zero_sample_shows_no_range(self):
        net = nn.Sequential(own_layers.QuantLinear(8, 4))
        with pytest.raises(InputError, match=r"all zero.*input_scale"):
            lower(net, torch.zeros(2, 8))
        program = lower(net, torch.zeros(2, 8), input_scale=0.25)
        assert (program.input_scale, program.input_range) == (0.25, (0, 255))


class TestFolding:
    """``fold_batchnorm_`` moves batch norms into layers; the program stays what it is."""

    @pytest.mark.parametrize("name", ["plif", "spiking_resnet", "resnet19", "vggsnn"])
    def test_exact_arithmetic(self, name):
        net, x = NETWORKS[name]()
        net = make_dyadic(quantize_models(net, 2, "fire_first"), seed=3)
        before = lower(net, x)
        assert fold_batchnorm_(net, x).folded
        after = lower(net, x)
        for a, b in zip(answers(before, x), answers(after, x), strict=True):
            np.testing.assert_array_equal(a, b)
        spikes_agree(net, after, x)

    @pytest.mark.parametrize("make", [models.resnet19, models.vggsnn])
    def test_real_scales(self, make):
        x = torch.rand(6, 3, 16, 16)
        net = calibrate(make(width=0.125, T=2, bits="1w-2u", in_channels=3), x)
        before = lower(net, x)
        assert fold_batchnorm_(net).folded
        after = lower(net, x)
        assert not any(isinstance(m, nn.BatchNorm2d) for m in net.modules())
        for a, b in zip(answers(before, x), answers(after, x), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4)


def answers(program, x):
    result = DeployedModel(program)(x)
    return result if isinstance(result, tuple) else (result,)
