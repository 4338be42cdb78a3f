"""Calibration of membrane scales and folding of batch norm."""

import pytest
import snntorch as snn
import torch
from spikingjelly.activation_based import functional, layer, neuron
from spikingjelly.activation_based.functional import conv_bn_fusion
from torch import nn

from qsnn_ext import MembraneConfig, QuantConfig, calibrate, fold_batchnorm_, quantize_
from qsnn_ext.errors import ConfigError, InputError, InputTypeError, StateError
from qsnn_ext.folding import FoldedNorm
from qsnn_ext.models import resnet19, vggsnn


def one_neuron(**options):
    node = neuron.LIFNode(tau=2.0, decay_input=False, v_threshold=1.0, step_mode="m")
    quantize_(node, QuantConfig(membrane=MembraneConfig(4, **options)))
    return node


# Charges by hand, v' = Q(reset(v/2 + x)): the largest carried potential of each step is known.
QUIET = torch.tensor([[[0.5, 0.0]], [[0.5, 0.0]]])  # carried maxima 0.5, 0.75
LOUD = torch.tensor([[[0.9, 0.0]], [[0.0, 0.0]]])  # carried maxima 0.9, 0.45


@pytest.mark.parametrize(
    ("statistic", "expected"), [("mean", (0.5 + 0.75 + 0.9 + 0.45) / 4), ("max", 0.9)]
)
def test_statistics_over_batches_and_steps(statistic, expected):
    node = one_neuron()
    scales = calibrate(node, [QUIET, LOUD], statistic=statistic)
    assert scales == {"(model)": pytest.approx(expected)}
    assert node.membrane.mode == "frozen"
    assert node.membrane.alpha.item() == pytest.approx(expected)


def test_percentiles_are_of_the_potentials():
    x = torch.linspace(0.01, 0.99, 99).view(1, 1, 99)
    node = one_neuron()
    assert calibrate(node, [x], "percentile", 50)["(model)"] == pytest.approx(0.50)
    assert calibrate(node, [x], "percentile", 100)["(model)"] == pytest.approx(0.99)
    absolute = one_neuron(scale="absmax")
    assert calibrate(absolute, [-x], "percentile", 50)["(model)"] == pytest.approx(0.50)


def test_potentials_below_zero_give_a_zero_scale():
    assert calibrate(one_neuron(), [-QUIET])["(model)"] == 0.0


def test_a_calibrated_sample_does_not_depend_on_its_batch():
    torch.manual_seed(1)
    net = resnet19(width=0.1, bits="1w-2u")
    net.double()(torch.rand(8, 3, 16, 16).double())  # gives batch norm statistics
    net.eval()
    x = torch.rand(6, 3, 16, 16).double()
    x[3] *= 100
    assert not torch.allclose(net(x)[:, :1], net(x[:1]))
    calibrate(net, [torch.rand(4, 3, 16, 16).double()])
    assert torch.allclose(net(x)[:, :1], net(x[:1]), rtol=0, atol=1e-10)


def test_everything_else_is_left_as_it_was():
    net = resnet19(width=0.1, bits="1w-2u").train()
    net.features[0].bn.eval()
    state = {k: v.clone() for k, v in net.state_dict().items()}
    modes = [m.training for m in net.modules()]
    batch = torch.rand(2, 3, 16, 16)
    generator = torch.get_rng_state()
    scales = calibrate(net, [batch])
    assert [m.training for m in net.modules()] == modes
    assert torch.equal(torch.get_rng_state(), generator)
    after = net.state_dict()
    assert all(torch.equal(after[k], v) for k, v in state.items())
    assert set(after) - set(state) == {f"{name}.membrane.alpha" for name in scales}
    assert all(m.membrane.observer is None for m in net.modules() if hasattr(m, "membrane"))


def test_data_loader_pairs_and_own_forward():
    node = one_neuron()
    expected = calibrate(node, [QUIET, LOUD])
    assert calibrate(one_neuron(), [(QUIET, 0), [LOUD, 1]]) == expected

    single = one_neuron()
    single.step_mode = "s"
    scales = calibrate(single, [QUIET, LOUD], forward=lambda m, x: [m(step) for step in x])
    assert scales == expected


def test_snntorch_models_with_hidden_and_explicit_membranes():
    hidden = snn.Leaky(beta=0.5, init_hidden=True, threshold=10.0)
    explicit = snn.Leaky(beta=0.5, threshold=10.0)

    def loop(net, x):
        mem = net.reset_mem()
        for step in x:
            _, mem = net(step, mem)

    results = []
    for net, forward in ((hidden, lambda m, x: [m(s) for s in x]), (explicit, loop)):
        quantize_(net, "1w-8u")
        results.append(calibrate(net, [QUIET, LOUD], forward=forward)["(model)"])
        assert net.membrane.mode == "frozen"
    assert results[0] == results[1] == pytest.approx((0.5 + 0.75 + 0.9 + 0.45) / 4)


def test_frozen_scales_can_be_calibrated_anew():
    node = one_neuron()
    calibrate(node, [LOUD])
    first = node.membrane.alpha.item()
    calibrate(node, [QUIET])
    assert node.membrane.alpha.item() == pytest.approx(0.625) != first


def test_neurons_that_did_not_run_are_named():
    net = nn.ModuleList([one_neuron(), one_neuron()])
    with pytest.warns(UserWarning, match="did not run: 1"):
        scales = calibrate(net, [QUIET], forward=lambda m, x: m[0](x))
    assert list(scales) == ["0"]
    assert net[1].membrane.mode == "dynamic"


def test_wrong_calls_say_what_is_wrong():
    with pytest.raises(InputTypeError, match="needs a module"):
        calibrate("net", [QUIET])
    with pytest.raises(InputTypeError, match=r"pass \[x\]"):
        calibrate(one_neuron(), QUIET)
    with pytest.raises(StateError, match="quantize_ first"):
        calibrate(neuron.LIFNode(), [QUIET])
    with pytest.raises(ConfigError, match="statistic"):
        calibrate(one_neuron(), [QUIET], statistic="median")
    with pytest.raises(ConfigError, match="percentile"):
        calibrate(one_neuron(), [QUIET], "percentile", 0)
    with pytest.raises(InputError, match="no batch"):
        calibrate(one_neuron(), [])
    node = one_neuron()
    with pytest.raises(InputError, match="NaN or infinite"):
        calibrate(node, [QUIET * float("nan")])
    with pytest.raises(InputError, match="NaN or infinite"):  # one in two, beyond the percentile
        calibrate(node, [QUIET[:1] * torch.tensor([1.0, float("nan")])], "percentile", 50)
    assert node.membrane.mode == "dynamic"


def test_what_quantize_left_is_said():
    readout = snn.Leaky(0.9, init_hidden=True, reset_mechanism="none")
    net = nn.Sequential(nn.Linear(8, 8), readout, nn.Linear(8, 2))
    quantize_(net, "1w-2u")
    with pytest.raises(StateError, match=r"quantize_ ran and left 1 \(Leaky\): read-out"):
        calibrate(net, [torch.rand(4, 8)])


def test_what_the_inputs_were_is_kept_and_no_sample():
    node = one_neuron()
    calibrate(node, [QUIET, LOUD])
    assert node.calibrated_input.shape == QUIET.shape
    assert node.calibrated_input.values.tolist() == pytest.approx([0.0, 0.5, 0.9])
    assert node.calibrated_input.largest == pytest.approx(0.9)
    big = torch.rand(1, 300, 300)
    calibrate(node, [big])
    seen = node.calibrated_input.values
    assert seen.numel() <= 4096
    assert (seen[0], seen[-1]) == (big.min().double(), big.max().double())
    calibrate(node, [QUIET], forward=lambda m, x: m.forward(x))  # no call of the model itself
    assert node.calibrated_input is None


def test_under_inference_mode():
    torch.manual_seed(0)
    net = resnet19(width=0.1, bits="1w-2u").eval()
    x = torch.rand(2, 3, 16, 16)
    with torch.inference_mode():
        calibrate(net, [x])
    net.train()(x).sum().backward()
    calibrate(net, [x])


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda m: torch.compile(m, backend="eager")])
def test_wrapped_models(wrap):
    net = resnet19(width=0.1, bits="1w-2u").eval()
    scales = calibrate(wrap(net), [torch.rand(2, 3, 16, 16)])
    assert all(not name.startswith(("module", "_orig_mod")) for name in scales)
    assert net.calibrated_input.shape == (2, 3, 16, 16)


# --------------------------------------------------------------------------- batch norm


def with_statistics(net, *shape):
    """Make batch norms of a model worth folding: odd statistics, scales and shifts."""
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            with torch.no_grad():
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 3)
                module.weight.normal_()
                module.bias.normal_()
    return net.eval()


@pytest.mark.parametrize("bits", ["1w-2u", "4w-2u", "32w-2u"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["1d", "2d", "3d"])
@pytest.mark.parametrize("host", [nn, layer])
def test_one_pair_agrees_to_1e_5_and_leaves_codes_alone(bits, bias, kind, host):
    conv = getattr(host, f"Conv{kind}")(3, 5, 3, bias=bias)
    net = nn.Sequential(conv, getattr(host, f"BatchNorm{kind}")(5))
    quantize_(net, QuantConfig.from_bits(bits), sample=None)
    with_statistics(net)
    x = torch.rand(4, 3, *[6] * int(kind[0]))
    expected = net(x)
    latent = net[0].weight.detach().clone()
    codes = net[0].quantizer.codes(net[0].weight)[0] if bits != "32w-2u" else None
    assert fold_batchnorm_(net).folded == (("0", "1"),)
    assert isinstance(net[1], FoldedNorm)
    assert (net(x) - expected).abs().max() < 1e-5
    if codes is not None:
        assert torch.equal(net[0].weight, latent)
        assert torch.equal(net[0].quantizer.codes(net[0].weight)[0], codes)
        assert net[0].output_scale.shape == (5,)


@pytest.mark.parametrize("sample", [True, False], ids=["traced", "by structure"])
@pytest.mark.parametrize("make", [resnet19, vggsnn])
def test_whole_networks_agree(make, sample):
    """In float64, so that no potential is rounded to the other side of the threshold."""
    net = with_statistics(make(width=0.05, in_channels=2, bits="1w-2u")).double()
    x = torch.rand(2, 2, 16, 16).double()
    expected = net(x)
    assert expected.abs().max() > 0
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in net.modules())
    report = fold_batchnorm_(net, x if sample else None)
    assert len(report.folded) == norms
    assert not any(isinstance(m, nn.BatchNorm2d) for m in net.modules())
    assert (net(x) - expected).abs().max() < 1e-5


def test_multi_step_layers_of_spikingjelly_fold():
    net = nn.Sequential(layer.Linear(4, 6), layer.BatchNorm1d(6), neuron.LIFNode())
    functional.set_step_mode(net, "m")
    with_statistics(net)
    quantize_(net, "1w-2u")
    x = torch.rand(3, 5, 4)
    expected = net[1](net[0](x))
    assert fold_batchnorm_(net).left == {
        "1": "behind a linear layer the shapes tell which dimension it normalises; pass a sample"
    }
    assert fold_batchnorm_(net, x).folded == (("0", "1"),)
    assert (net[1](net[0](x)) - expected).abs().max() < 1e-5


class Branching(nn.Module):
    """The convolution's output is used with and without batch norm."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3)
        self.twice, self.bn1, self.bn2 = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.loose = nn.BatchNorm2d(3)
        self.idle = nn.BatchNorm2d(3)
        self.good, self.bn3 = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        y = self.conv(x)
        y = self.bn(y) + y
        z = self.twice(y)
        z = self.loose(torch.relu(self.bn1(z) + self.bn2(z)))
        return self.bn3(self.good(z))


def test_only_what_a_trace_proves_is_folded():
    net = with_statistics(Branching())
    x = torch.rand(2, 2, 4, 4)
    expected = net(x)
    report = fold_batchnorm_(net, x)
    assert report.folded == (("good", "bn3"),)
    assert set(report.left) == {"bn", "bn1", "bn2", "loose", "idle"}
    assert "used elsewhere" in report.left["bn"]
    assert "used elsewhere" in report.left["bn1"]
    assert "not the output of one layer" in report.left["loose"]
    assert "did not run" in report.left["idle"]
    assert (net(x) - expected).abs().max() < 1e-5
    assert "good" in str(report)


class NormPerStep(nn.Module):
    """One convolution, a batch norm of its own at every time step (BNTT)."""

    def __init__(self, norms):
        super().__init__()
        self.conv, self.head = nn.Conv2d(2, 3, 1), nn.Conv2d(3, 3, 1)
        self.norms, self.last = nn.ModuleList(norms), nn.BatchNorm2d(3)

    def forward(self, x):
        pairs = zip(self.norms, x, strict=False)
        return sum(self.last(self.head(norm(self.conv(step)))) for norm, step in pairs)


@pytest.mark.parametrize(
    "norms", [snn.BatchNormTT2d(3, 4), [nn.BatchNorm2d(3) for _ in range(4)]], ids=["BNTT", "own"]
)
@pytest.mark.parametrize("steps", [1, 4])
def test_batch_norms_of_steps_that_the_sample_does_not_reach(norms, steps):
    net = NormPerStep(norms)
    for norm in [*net.norms, net.last]:
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 3)
    net.eval()
    x = torch.rand(4, 5, 2, 3, 3)
    expected = net(x)
    report = fold_batchnorm_(net, x[:steps])
    assert report.folded == (("head", "last"),)
    if steps == 1:
        assert "norms.1" in report.left["norms.0"]
        assert "did not run" in report.left["norms.1"]
    assert (net(x) - expected).abs().max() < 1e-5


def test_a_linear_layer_whose_other_dimension_is_normalised_is_left():
    net = with_statistics(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
    x = torch.rand(2, 4, 4)  # here batch norm takes dimension 1, not the features
    expected = net(x)
    assert "another dimension" in fold_batchnorm_(net, x).left["1"]
    assert torch.equal(net(x), expected)


@pytest.mark.parametrize(
    ("conv", "norm", "reason"),
    [
        (layer.WSConv2d(2, 2, 1), layer.BatchNorm2d(2), "in its own way"),
        (nn.Conv2d(2, 2, 1), nn.SyncBatchNorm(2), "more than a batch norm"),
        (nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2, track_running_stats=False), "no running"),
    ],
)
def test_what_is_not_plain_is_left(conv, norm, reason):
    net = nn.Sequential(conv, norm).eval()
    assert reason in fold_batchnorm_(net).left["1"]


def test_a_layer_used_in_two_places_is_left():
    conv = nn.Conv2d(2, 2, 1)
    net = with_statistics(nn.Sequential(conv, nn.BatchNorm2d(2), conv, nn.BatchNorm2d(2)))
    x = torch.rand(1, 2, 3, 3)
    expected = net(x)
    assert fold_batchnorm_(net).folded == ()
    assert fold_batchnorm_(net, x).folded == ()
    assert torch.equal(net(x), expected)


def test_folding_needs_evaluation_mode_and_a_module():
    with pytest.raises(StateError, match=r"'1' is in training mode"):
        fold_batchnorm_(nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1)))
    with pytest.raises(InputTypeError):
        fold_batchnorm_("net")


def test_a_folded_layer_refuses_other_quantizers():
    net = nn.Sequential(nn.Conv2d(2, 2, 3), nn.BatchNorm2d(2))
    quantize_(net, "1w-2u")
    fold_batchnorm_(net.eval())
    assert not quantize_(net, "1w-2u").changed
    with pytest.raises(Exception, match="fold and scale last"):
        quantize_(net, QuantConfig(first=4))


def test_spikingjellys_own_fusion_is_right_for_binary_layers():
    net = nn.Sequential(
        layer.Conv2d(2, 4, 3), layer.BatchNorm2d(4), neuron.LIFNode(),
        layer.Conv2d(4, 4, 3), layer.BatchNorm2d(4), neuron.LIFNode(),
        layer.Conv2d(4, 4, 3), layer.BatchNorm2d(4),
    )  # fmt: skip
    functional.set_step_mode(net, "m")
    quantize_(net, QuantConfig(first=32))
    with_statistics(net.double())
    x = torch.rand(2, 3, 2, 12, 12).double()
    expected = net(x)
    functional.reset_net(net)
    fused = conv_bn_fusion.fuse_conv_bn_eval_modules(net)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fused.modules())
    assert (fused(x) - expected).abs().max() < 1e-5
