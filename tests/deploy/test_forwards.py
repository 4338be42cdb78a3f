"""Ordinary forward methods: what people write before, between and after the layers is lowered."""

from __future__ import annotations

import copy
import json
import math
import warnings
from collections import namedtuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn

import qsnn_ext
from qsnn_ext import deploy
from qsnn_ext import layers as own
from qsnn_ext.deploy import DeployedModel, compare, lower
from qsnn_ext.errors import FormatError, InputError, LoweringError
from qsnn_ext.snntorch import QLeaky
from qsnn_ext.spikingjelly import QuantIFNode, QuantLIFNode
from tests.deploy.networks import make_dyadic, reset

HALVES = torch.tensor([0.5, 0.25])
Named = namedtuple("Named", ["logits", "spikes"])


def grid(*shape, seed=0):
    """Inputs that are multiples of 1/16."""
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 17, shape, generator=g) / 16


class Net(nn.Module):
    """Two spiking layers and a head; ``forward`` is a function of the parts and the input."""

    def __init__(self, forward, step_mode="m", channels=2, **parts):
        super().__init__()
        self.stem = nn.Sequential(
            own_conv(channels, 8, step_mode), QuantLIFNode(step_mode=step_mode)
        )
        self.mid = nn.Sequential(own_binary(8, 8, step_mode), QuantLIFNode(step_mode=step_mode))
        self.head = nn.Sequential(layer.Flatten(step_mode=step_mode), own.QuantLinear(8 * 6 * 6, 5))
        for name, part in parts.items():
            setattr(self, name, part)
        self.how = forward

    def forward(self, *args, **kwargs):
        return self.how(self, *args, **kwargs)


def own_conv(i, o, step_mode):
    conv = layer.Conv2d(i, o, 3, padding=1, step_mode=step_mode)
    return _converted(conv, 8)


def own_binary(i, o, step_mode):
    return _converted(layer.Conv2d(i, o, 3, padding=1, step_mode=step_mode), 1)


def _converted(module, bits):
    kept = nn.Sequential(module)
    qsnn_ext.quantize_(kept, qsnn_ext.QuantConfig(weight=bits, first=bits, last=bits))
    return kept[0]


def answers_alike(net, x, program=None, **options):
    """The program answers as the model does, and every spike of every layer agrees."""
    net = make_dyadic(net, seed=3)
    program = lower(net, x, **options)
    reset(net)
    with torch.no_grad():
        expected = net(x)
    reset(net)
    got = DeployedModel(program)(x)
    same(got, expected)
    report = compare(net, program, [x])
    assert all(a.agreement == 1.0 for a in report.layers), str(report)
    emitting = [n.name for n in program.neurons if not n.name.endswith(".syn")]
    assert [a.name for a in report.layers] == emitting
    rates = [a.rate_model for a in report.layers]
    assert not rates or max(rates) > 0.02
    return program


def same(got, expected):
    if isinstance(expected, dict):
        assert got.keys() == expected.keys()
        for key in expected:
            same(got[key], expected[key])
    elif isinstance(expected, (tuple, list)):
        assert len(got) == len(expected)
        if hasattr(expected, "_fields"):
            assert got._fields == expected._fields
        for a, b in zip(got, expected, strict=True):
            same(a, b)
    elif isinstance(expected, torch.Tensor):
        assert np.shape(got) == tuple(expected.shape)
        np.testing.assert_allclose(got, expected.numpy(), atol=2e-4)
    else:
        assert got == expected


def body(net, x):
    return net.mid(net.stem(x))


def loop(net, x, steps=4):
    return [net.head(net.mid(net.stem(x))) for _ in range(steps)]


def counted(net, x):
    out = 0
    for step in loop(net, x):
        out = out + step
    return out / 4


def in_place(net, x):
    out = torch.zeros(len(x), 5)
    for step in loop(net, x):
        out += step
    return out / 4


def filled(net, x):
    out = torch.zeros(4, len(x), 5)
    for t, step in enumerate(loop(net, x)):
        out[t] = step
    return out.mean(0)


def filled_behind(net, x):
    out = x.new_zeros(len(x), 4, 5)
    for t, step in enumerate(loop(net, x)):
        out[:, t] = step
    return out.mean(1)


def concatenated(net, x):
    return torch.cat([step.unsqueeze(0) for step in loop(net, x)], 0).sum(0)


def optional(net, x, mask=None, hook=None, *, scale=None):
    y = net.head(body(net, x if mask is None else x * mask)).mean(0)
    if hook is not None:
        hook["y"] = y
    return y if scale is None else y * scale


def handed_down(net, x, hook=None):
    y = body(net, x)
    if hook is not None:
        hook["y"] = y.detach()
    return net.head(y).mean(0), hook


def unsqueezed(net, x):
    x = x.clone()
    x.unsqueeze_(0)
    return net.head(body(net, x.repeat(4, 1, 1, 1, 1))).mean(0)


MULTI = {  # [T, N, C, H, W]
    "mean": lambda net, x: net.head(body(net, x)).mean(0),
    "rate": lambda net, x: (lambda y: y.sum(0) / len(y))(net.head(body(net, x))),
    "sum": lambda net, x: net.head(body(net, x)).sum(0),
    "last": lambda net, x: net.head(body(net, x))[-1],
    "first": lambda net, x: net.head(body(net, x))[0],
    "select": lambda net, x: net.head(body(net, x)).select(0, 2),
    "later": lambda net, x: net.head(body(net, x))[1:].mean(0),
    "every other": lambda net, x: net.head(body(net, x))[::2],
    "all": lambda net, x: net.head(body(net, x)),
    "batch first answer": lambda net, x: net.head(body(net, x)).transpose(0, 1),
    "permuted answer": lambda net, x: body(net, x).permute(1, 2, 3, 4, 0),
    "tokens": lambda net, x: body(net, x).flatten(3).transpose(2, 3).mean(0),
    "head after mean": lambda net, x: net.head[1](body(net, x).mean(0).flatten(1)),
    "head after sum": lambda net, x: net.head[1](body(net, x).sum(0).flatten(1)),
    "head after mean of some": lambda net, x: net.head[1](body(net, x)[1:3].mean(0).flatten(1)),
    "affine after mean": lambda net, x: net.bn(body(net, x).mean(0)).flatten(1),
    "softmax": lambda net, x: net.head(body(net, x)).mean(0).softmax(-1),
    "log softmax": lambda net, x: F.log_softmax(net.head(body(net, x)).mean(0), dim=1),
    "argmax": lambda net, x: net.head(body(net, x)).mean(0).argmax(1),
    "argmax of all": lambda net, x: net.head(body(net, x)).argmax(-1),
    "max": lambda net, x: net.head(body(net, x)).mean(0).max(1)[0],
    "sigmoid": lambda net, x: torch.sigmoid(net.head(body(net, x)).mean(0)),
    "scaled": lambda net, x: net.head(body(net, x)).mean(0) * 3.0,
    "shifted": lambda net, x: 1.0 - 0.5 * net.head(body(net, x)).mean(0),
    "negative": lambda net, x: -net.head(body(net, x)).mean(0),
    "temperature": lambda net, x: (net.head(body(net, x)).mean(0) / 0.5).softmax(-1) * 100 + 1,
    "per class": lambda net, x: net.head(body(net, x)).mean(0) * torch.arange(1.0, 6.0),
    "dictionary": lambda net, x: (
        lambda s: {"logits": net.head(s).mean(0), "spikes": s.mean((3, 4)), "n": 3}
    )(body(net, x)),
    "named": lambda net, x: (lambda s: Named(net.head(s).mean(0), s))(body(net, x)),
    "nested": lambda net, x: (lambda s: (net.head(s).mean(0), {"s": s, "none": None}))(
        body(net, x)
    ),
    "list": lambda net, x: (lambda s: (net.head(s)[-1], net.head(s).mean(0), s.sum(0)))(
        body(net, x)
    ),
    "optional": optional,
    "handed down": handed_down,
    "input affine": lambda net, x: net.head(body(net, (x - 0.5) / 0.25)).mean(0),
    "input per channel": lambda net, x: net.head(
        body(net, (x - HALVES.view(2, 1, 1)) / HALVES.flip(0).view(1, 2, 1, 1))
    ).mean(0),
    "upsampled": lambda net, x: net.head(
        F.interpolate(F.max_pool2d(body(net, x).flatten(0, 1), 2), scale_factor=2).view(
            *x.shape[:2], 8, 6, 6
        )
    ).mean(0),
    "pixel mean": lambda net, x: body(net, x).mean((-2, -1)).mean(0),
    "kept pixel mean": lambda net, x: body(net, x).mean((-2, -1), keepdim=True).flatten(2)[-1],
    "channel mean": lambda net, x: body(net, x).mean(2).mean(0),
    "groups of channels": lambda net, x: body(net, x).unflatten(2, (2, 4)).sum(3).mean(0),
    "every fourth channel": lambda net, x: body(net, x).unflatten(2, (2, 4)).sum(2).mean(0),
    "masked by spikes": lambda net, x: net.head(
        net.stem(x) * net.mid(net.stem_again(net.stem[0](x)))
    ).mean(0),
    "learned scale": lambda net, x: net.head(
        net.spike(net.mid[0](net.stem(x)) * net.gamma + net.offset)
    ).mean(0),
    "no neuron between": lambda net, x: net.head(
        net.spike(net.pointwise(net.depthwise(net.stem(x))))
    ).mean(0),
    "channel cat": lambda net, x: (
        lambda s: net.head(net.spike(net.both(torch.cat([s, net.mid(s) + s], dim=2)))).mean(0)
    )(net.stem(x)),
    "pixel cat": lambda net, x: (
        lambda s: torch.cat([s[..., :3], s[..., 3:].flip(-1)], dim=-1).flatten(2)[:, :, ::7]
    )(body(net, x)),
    "reflect": lambda net, x: padded(net, x, "reflect"),
    "circular": lambda net, x: padded(net, x, "circular"),
    "replicate": lambda net, x: padded(net, x, "replicate"),
    "zeros": lambda net, x: padded(net, x, "constant"),
    "pixel shuffle": lambda net, x: net.tail(F.pixel_shuffle(body(net, x).flatten(0, 1), 2)).view(
        4, 3, -1
    ),
    "pixel unshuffle": lambda net, x: F.pixel_unshuffle(body(net, x).flatten(0, 1), 2).view(
        4, 3, -1
    ),
    "channel shuffle": lambda net, x: net.head(
        net.mid(F.channel_shuffle(net.stem(x).flatten(0, 1), 4).view(4, 3, 8, 6, 6))
    ).mean(0),
    "chunks": lambda net, x: (lambda a, b: net.head(torch.cat([b, a * b], 2)).mean(0))(
        *body(net, x).chunk(2, dim=2)
    ),
    "crop": lambda net, x: body(net, x)[:, :, 2:7:2, 1:-1, ::2].flatten(2),
    "roll": lambda net, x: net.head(torch.roll(body(net, x), (1, -2), (-1, -2))).mean(0),
    "down": lambda net, x: F.interpolate(body(net, x).flatten(0, 1), size=3).view(4, 3, -1),
    "rotated": lambda net, x: net.head(body(net, x).transpose(-1, -2).flip(-1)).mean(0),
    "channels last": lambda net, x: net.fc(body(net, x).permute(0, 1, 3, 4, 2)).mean((2, 3)),
    "blank": lambda net, x: net.head(body(net, x + 0 * x)).mean(0),
    "pooled by three": lambda net, x: F.max_pool3d(body(net, x), (1, 2, 2)).flatten(2),
    "averaged by three": lambda net, x: F.avg_pool3d(
        body(net, x).flatten(0, 1), (1, 3, 3), (1, 3, 3)
    ).view(4, 3, -1),
    "adaptive by three": lambda net, x: F.adaptive_avg_pool3d(
        body(net, x), (None, 1, 1)
    ).flatten(2),
    "uneven": lambda net, x: F.interpolate(body(net, x).flatten(0, 1), size=(7, 11)).view(
        4, 3, -1
    ),
    "uneven by a factor": lambda net, x: F.interpolate(
        body(net, x).flatten(0, 1), scale_factor=1.55
    ).view(4, 3, -1),
    "shifted by a factor": lambda net, x: F.interpolate(
        body(net, x).flatten(0, 1), scale_factor=(1.1, 2.3)
    ).view(4, 3, -1),
    "uneven, down": lambda net, x: F.interpolate(
        body(net, x).flatten(0, 1), size=(4, 5), mode="nearest-exact"
    ).view(4, 3, -1),
    "border": lambda net, x: net.head(net.mid[1](bordered(net.mid[0](net.stem(x))))).mean(0),
    "blank border": lambda net, x: net.head(blanked(body(net, x))).mean(0),
    "cat of currents": lambda net, x: (
        lambda s: net.head(net.spike(net.both(torch.cat([net.mid[0](s) * 3, s], dim=2)))).mean(0)
    )(net.stem(x)),
    "cat of means": lambda net, x: (
        lambda s: torch.cat([s.mean(0).flatten(2), s.mean(0)[:, :, ::2].flatten(2)], 2)
    )(body(net, x)),
}  # fmt: skip


def bordered(y):
    y = y.clone()
    border = (torch.arange(8.0) - 3).view(1, 8, 1, 1) / 4
    y[:, :, :, :1] = border
    y[:, :, :, -1] = border[..., 0]
    y[..., :2] = border
    return y


def blanked(s):
    s = s.clone()
    s[:, :, :, -2:, :] = 0
    s[:, :, 3] = 0.0
    return s


def padded(net, x, mode):
    s = F.pad(net.stem(x).flatten(0, 1), (1, 1, 1, 1), mode=mode).view(4, 3, 8, 8, 8)
    return net.head(net.spike(net.inner(s))).mean(0)


def inner():
    kept = nn.Sequential(layer.Conv2d(8, 8, 3, step_mode="m"))
    qsnn_ext.quantize_(kept, qsnn_ext.QuantConfig(weight=1, first=1, last=1))
    return kept[0]


def parts(how):
    if how in ("reflect", "circular", "replicate", "zeros"):
        return {"spike": QuantLIFNode(step_mode="m"), "inner": inner()}
    found = {
        "cat of currents": {
            "spike": QuantLIFNode(step_mode="m"),
            "both": _converted(layer.Conv2d(16, 8, 1, step_mode="m"), 1),
        },
        "channel cat": {
            "spike": QuantLIFNode(step_mode="m"),
            "both": _converted(layer.Conv2d(16, 8, 1, step_mode="m"), 1),
        },
        "pixel shuffle": {"tail": _converted(nn.Conv2d(2, 3, 3), 1)},
        "channels last": {"fc": own.QuantLinear(8, 5)},
        "masked by spikes": {"stem_again": QuantLIFNode(step_mode="m")},
        "affine after mean": {"bn": nn.BatchNorm2d(8)},
        "learned scale": {
            "spike": QuantLIFNode(step_mode="m"),
            "gamma": nn.Parameter(torch.arange(1.0, 9.0).view(8, 1, 1) / 8),
            "offset": nn.Parameter(torch.arange(8.0).view(1, 1, 8, 1, 1) / 16),
        },
        "no neuron between": {
            "spike": QuantLIFNode(step_mode="m"),
            "depthwise": _converted(
                layer.Conv2d(8, 8, 3, padding=1, groups=8, step_mode="m"), 1
            ),
            "pointwise": _converted(layer.Conv2d(8, 8, 1, step_mode="m"), 1),
        },
    }  # fmt: skip
    return found.get(how, {})


@pytest.mark.parametrize("how", MULTI)
def test_multi_step_models(how):
    torch.manual_seed(0)
    answers_alike(Net(MULTI[how], **parts(how)), grid(4, 3, 2, 6, 6))


LOOPS = {  # [N, C, H, W], shown at every step
    "counted": counted,
    "in place": in_place,
    "filled": filled,
    "filled behind the batch": filled_behind,
    "concatenated": concatenated,
    "stacked behind": lambda net, x: torch.stack(loop(net, x), dim=1).mean(1),
    "a sum of some": lambda net, x: sum(loop(net, x)[1:]),
}  # fmt: skip


@pytest.mark.parametrize("how", LOOPS)
def test_loops_over_time(how):
    torch.manual_seed(0)
    answers_alike(Net(LOOPS[how], step_mode="s"), grid(3, 2, 6, 6))


def test_input_that_is_normalised_at_every_step():
    def forward(net, x):
        return sum(net.head(net.mid(net.stem(step * 2 - 1))) for step in x) / len(x)

    program = answers_alike(Net(forward, step_mode="s"), grid(4, 3, 2, 6, 6))
    assert program.metadata["input_gain"] == "2.0"


def test_time_that_a_model_adds_in_place():
    answers_alike(Net(unsqueezed), grid(3, 2, 6, 6))


BATCH_FIRST = {  # [N, T, C, H, W]
    "transposed": lambda net, x: net.head(body(net, x.transpose(0, 1))).mean(0),
    "permuted": lambda net, x: net.head(body(net, x.permute(1, 0, 2, 3, 4))).mean(0),
    "and back": lambda net, x: net.head(body(net, x.transpose(0, 1))).transpose(0, 1),
    "contiguous": lambda net, x: net.head(body(net, x.transpose(0, 1).contiguous())).mean(0),
}  # fmt: skip


@pytest.mark.parametrize("how", BATCH_FIRST)
def test_batch_first_models(how):
    program = answers_alike(Net(BATCH_FIRST[how]), grid(3, 4, 2, 6, 6))
    assert program.metadata["time"] == "batch_first"


def test_batch_first_by_index():
    net = Net(
        lambda net, x: sum(net.head(net.mid(net.stem(x[:, t]))) for t in range(x.shape[1])),
        step_mode="s",
    )
    program = answers_alike(net, grid(3, 4, 2, 6, 6))
    assert program.metadata["time"] == "batch_first"
    session = DeployedModel(program).session(3)
    codes = DeployedModel(program).codes(grid(3, 4, 2, 6, 6))
    assert codes.shape == (4, 3, 2, 6, 6)
    session.step(codes[0])


class TestTimeAxis:
    """Where time is, is what layers, step modes and loops say, and an argument overrides it."""

    def conv1d(self, step_mode):
        return make_dyadic(
            nn.Sequential(
                _converted(layer.Conv1d(2, 8, 3, padding=1, step_mode=step_mode), 8),
                QuantLIFNode(step_mode=step_mode),
                layer.Flatten(step_mode=step_mode),
                own.QuantLinear(8 * 12, 5),
            )
        )

    def test_multi_step_convolutions_of_one_dimension(self):
        net, x = self.conv1d("m"), grid(4, 3, 2, 12)
        program = lower(net, x)
        assert program.metadata["time"] == "sequence"
        assert program.timesteps == 4
        assert lower(net, x, time_first=True).metadata == program.metadata
        with torch.no_grad():
            np.testing.assert_allclose(DeployedModel(program)(x), net(x).numpy(), atol=1e-4)

    def test_single_step_convolutions_of_one_dimension(self):
        net, x = self.conv1d("s"), grid(3, 2, 12)
        program = lower(net, x)
        assert program.metadata["time"] == "step"
        assert compare(net, program, [x]).predictions == 1.0

    def test_a_single_step_neuron_given_all_steps_at_once(self):
        """To the neuron they are one step: the program must not run over them."""
        net = make_dyadic(nn.Sequential(own.QuantLinear(6, 8), QuantLIFNode(step_mode="s")))
        with pytest.raises(LoweringError, match=r"^1: it takes all time steps for one.*step mode"):
            lower(net, grid(4, 3, 6), time_first=True)

    def test_no_axis_is_time_for_a_multi_step_neuron(self):
        net = make_dyadic(nn.Sequential(own.QuantLinear(6, 8), QuantLIFNode(step_mode="m")))
        with pytest.raises(LoweringError, match=r"^1: .*not time here.*time_first="):
            lower(net, grid(3, 6))


def test_a_batch_that_the_model_fixes():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.lif1 = own.QuantConv2d(1, 4, 3), QLeaky(beta=0.5)
            self.fc, self.lif2 = own.QuantLinear(4 * 36, 10), QLeaky(beta=0.5)

        def forward(self, x):
            m1, m2 = self.lif1.init_leaky(), torch.zeros_like(x[:, 0, 0, 0:1].expand(4, 10))
            s, m1 = self.lif1(self.conv(x), m1)
            s, m2 = self.lif2(self.fc(s.view(4, -1)), m2)
            return s

    net = make_dyadic(Fixed())
    x = grid(4, 1, 8, 8)
    program = lower(net, x)
    assert DeployedModel(program)(grid(2, 1, 8, 8)).shape == (2, 10)
    with torch.no_grad():
        np.testing.assert_allclose(DeployedModel(program)(x), net(x).numpy(), atol=1e-4)
    with pytest.raises(LoweringError, match=r"it fails on the sample .*check that model\(sample\)"):
        lower(net, grid(3, 1, 8, 8))


@pytest.mark.parametrize(
    "start",
    [
        lambda x: torch.zeros_like(x),
        lambda x: torch.full_like(x, 0.0),
        lambda x: x.new_zeros(x.shape),
        lambda x: torch.zeros(x.shape),
        lambda x: x * 0,
    ],
    ids=["zeros_like", "full_like", "new_zeros", "zeros", "times 0"],
)
def test_initial_states(start):
    class Explicit(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.lif = own.QuantLinear(6, 8), QLeaky(beta=0.5)

        def forward(self, x):
            out, mem = [], None
            for step in x:
                current = self.fc(step)
                mem = start(current) if mem is None else mem
                spk, mem = self.lif(current, mem)
                out.append(spk)
            return torch.stack(out), mem

    answers_alike(Explicit(), grid(4, 3, 6))


@pytest.mark.parametrize("bits", [None, 4])
def test_readouts_through_the_membrane_potential(bits):
    def forward(net, x):
        for _ in range(4):
            net.out(net.head(net.mid(net.stem(x))))
        return net.out.v

    out = QuantIFNode(v_threshold=math.inf, bits=bits) if bits else neuron.IFNode(
        v_threshold=math.inf
    )  # fmt: skip
    net = make_dyadic(Net(forward, step_mode="s", out=out))
    x = grid(3, 2, 6, 6)
    program = lower(net, x)
    with torch.no_grad():
        np.testing.assert_allclose(DeployedModel(program)(x), net(x).numpy(), atol=1e-3)


def test_a_multi_step_readout():
    out = neuron.IFNode(v_threshold=math.inf, step_mode="m")
    net = Net(lambda net, x: (net.out(net.head(body(net, x))), net.out.v)[1], out=out)
    net = make_dyadic(net)
    x = grid(4, 3, 2, 6, 6)
    program = lower(net, x)
    with torch.no_grad():
        np.testing.assert_allclose(DeployedModel(program)(x), net(x).numpy(), atol=1e-3)


def test_every_step_of_the_membrane_potential():
    lif = QuantLIFNode(step_mode="m", store_v_seq=True)
    net = Net(lambda net, x: (net.spike(net.stem[0](x)), net.spike.v_seq), spike=lif)
    answers_alike(net, grid(4, 3, 2, 6, 6))


# --------------------------------------------------------------------------- around the model


def per_step():
    return nn.Sequential(
        own.QuantConv2d(2, 4, 3), QLeaky(beta=0.5, init_hidden=True), nn.Flatten(),
        own.QuantLinear(64, 10), QLeaky(beta=0.5, init_hidden=True, output=True),
    )  # fmt: skip


@pytest.mark.parametrize("mode", ["reflect", "circular", "replicate"])
def test_convolutions_that_pad_with_what_is_there(mode):
    torch.manual_seed(0)
    conv = layer.Conv2d(8, 8, (3, 5), padding=(1, 2), padding_mode=mode, step_mode="m")
    net = Net(lambda net, x: net.head(net.spike(net.conv(net.stem(x)))).mean(0),
              conv=_converted(conv, 1), spike=QuantLIFNode(step_mode="m"))  # fmt: skip
    answers_alike(net, grid(4, 3, 2, 6, 6))
    one = nn.Sequential(
        _converted(layer.Conv1d(2, 8, 3, padding=1, padding_mode=mode, step_mode="m"), 8),
        QuantLIFNode(step_mode="m"),
    )
    answers_alike(one, grid(4, 3, 2, 9))


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 2, "stride": 2},
        {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1},
        {"kernel_size": (3, 4), "stride": (1, 3), "padding": (2, 0), "groups": 2},
        {"kernel_size": 3, "stride": 2, "dilation": 2},
    ],
    ids=["2x2", "3x3", "uneven", "dilated"],
)
def test_transposed_convolutions(options):
    torch.manual_seed(0)
    up = _converted(layer.ConvTranspose2d(8, 4, step_mode="m", **options), 1)
    net = Net(lambda net, x: net.spike(net.up(net.stem(x))), up=up,
              spike=QuantLIFNode(step_mode="m"))  # fmt: skip
    answers_alike(net, grid(3, 2, 2, 6, 6))


def test_transposed_convolutions_of_one_dimension():
    torch.manual_seed(0)
    up = layer.ConvTranspose1d(8, 4, 4, stride=2, padding=1, step_mode="m")
    net = nn.Sequential(
        _converted(layer.Conv1d(2, 8, 3, padding=1, step_mode="m"), 8),
        QuantLIFNode(step_mode="m"), _converted(up, 1), QuantLIFNode(step_mode="m"),
    )  # fmt: skip
    answers_alike(net, grid(4, 3, 2, 9))


@pytest.mark.parametrize("decode", [None, "last_mem", "mean-mem"])
@pytest.mark.parametrize("kind", ["if", "lif"])
def test_readouts_that_never_fire(kind, decode):
    out = neuron.NonSpikingIFNode(decode) if kind == "if" else neuron.NonSpikingLIFNode(2.0, decode)
    net = make_dyadic(Net(lambda net, x: net.out(net.head(body(net, x))), out=out))
    x = grid(4, 3, 2, 6, 6)
    program = lower(net, x)
    with torch.no_grad():
        same(DeployedModel(program)(x), tuple(net(x)) if decode is None else net(x))


def test_norms_with_fixed_statistics():
    norm = nn.InstanceNorm2d(8, affine=True, track_running_stats=True)
    norm.running_mean.copy_(torch.arange(8.0) / 8)
    norm.weight.data.copy_(torch.arange(1.0, 9.0) / 8)
    norm.eps = 0.0
    net = Net(
        lambda net, x: net.head(
            net.spike(net.norm(net.mid[0](net.stem(x)).flatten(0, 1)).view(4, 3, 8, 6, 6))
        ).mean(0),
        norm=norm, spike=QuantLIFNode(step_mode="m"),
    )  # fmt: skip
    answers_alike(net, grid(4, 3, 2, 6, 6))
    own_statistics = Net(
        lambda net, x: net.norm(body(net, x).flatten(0, 1)), norm=nn.GroupNorm(2, 8)
    )
    with pytest.raises(LoweringError, match=r"'group_norm' takes its statistics from the sample"):
        lower(make_dyadic(own_statistics), grid(4, 3, 2, 6, 6))


def test_a_batch_of_one():
    """Its axis could be any; the program is that of a larger batch."""
    for how, x in (("mean", grid(4, 3, 2, 6, 6)), ("tokens", grid(4, 3, 2, 6, 6))):
        net = make_dyadic(Net(MULTI[how]))
        assert lower(net, x[:, :1]).metadata == lower(net, x).metadata
    net = make_dyadic(Net(lambda net, x: counted(net, x), step_mode="s"))
    assert lower(net, grid(1, 2, 6, 6)).timesteps == 4
    repeat = make_dyadic(
        Net(lambda net, x: net.head(body(net, x.unsqueeze(0).repeat(4, 1, 1, 1, 1))).mean(0))
    )
    assert lower(repeat, grid(1, 2, 6, 6)).metadata["time"] == "repeat"


def test_several_inputs():
    with pytest.raises(InputError, match="models of several inputs cannot be lowered"):
        lower(make_dyadic(Net(MULTI["mean"])), (grid(4, 3, 2, 6, 6), grid(4, 3, 2, 6, 6)))


def test_models_called_once_per_step():
    net, x = make_dyadic(per_step()), grid(5, 3, 2, 6, 6)

    def forward(model, batch):
        return [model(step) for step in batch]

    program = lower(net, x[0])
    report = compare(net, program, [(x, torch.zeros(3))], forward=forward)
    assert report.samples == 3
    assert [a.agreement for a in report.layers] == [1.0, 1.0]
    assert report.output_error < 1e-4
    assert compare(net, program, [x]).output_error < 1e-4  # one step at a time, by itself
    other = make_dyadic(Net(MULTI["mean"]))
    mean = lower(other, grid(4, 3, 2, 6, 6))
    other.how = MULTI["all"]
    with pytest.raises(InputError, match="forward="):
        compare(other, mean, [grid(4, 3, 2, 6, 6)])
    whole = lower(net, x, forward=lambda m, b: torch.stack([m(step)[0] for step in b]).mean(0))
    assert whole.metadata["time"] == "sequence"
    reset(net)
    with torch.no_grad():
        expected = torch.stack([step[0] for step in forward(net, x)]).mean(0)
    np.testing.assert_allclose(DeployedModel(whole)(x), expected.numpy(), atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_models_of_other_dtypes(dtype):
    torch.manual_seed(0)
    net = make_dyadic(Net(MULTI["mean"])).to(dtype)
    x = grid(4, 3, 2, 6, 6)
    program = lower(net, x.to(dtype))
    assert program.metadata == lower(net.float(), x).metadata
    np.testing.assert_allclose(DeployedModel(program)(x), net(x).detach().numpy(), atol=2e-2)


class Recording(nn.Module):
    """Keeps what it computes, as for plots or a loss."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            own.QuantLinear(6, 8), QuantLIFNode(step_mode="m"), own.QuantLinear(8, 3)
        )
        self.record, self.last = [], None

    def forward(self, x):
        y = self.net(x)
        self.record.append(y)
        self.last = {"y": [y]}
        return y.mean(0)


def test_models_that_keep_tensors_of_a_live_graph():
    net, x = make_dyadic(Recording()), grid(4, 3, 6)
    net(x).sum().backward()
    functional.reset_net(net)
    record, last = list(net.record), net.last
    lower(net, x)
    assert len(net.record) == len(record)
    assert net.record[0] is record[0]
    assert net.last is last


@pytest.mark.parametrize(
    "wrap",
    [
        lambda m: torch.compile(m, backend="eager"),
        nn.DataParallel,
        torch.optim.swa_utils.AveragedModel,
        lambda m: torch.compile(nn.DataParallel(m), backend="eager"),
    ],
    ids=["compile", "DataParallel", "AveragedModel", "both"],
)
def test_wrapped_models(wrap, tmp_path):
    x = grid(4, 3, 6)
    net = make_dyadic(Recording())
    plain = lower(net, x)
    wrapped = wrap(net)
    program = deploy.save(wrapped, tmp_path / "w.qsnn", x)
    assert [n.name for n in program.neurons] == [n.name for n in plain.neurons]
    assert program.metadata == plain.metadata
    assert compare(wrapped, program, [x]).predictions == 1.0


def test_a_part_that_is_compiled():
    net = make_dyadic(Recording())
    x = grid(4, 3, 6)
    net.net = torch.compile(net.net, backend="eager")
    report = compare(net, lower(net, x), [x])
    assert report.predictions == 1.0


def test_hooks_of_the_model_are_part_of_it():
    net, x = make_dyadic(Net(MULTI["mean"])), grid(4, 3, 2, 6, 6)
    net.head[1].register_forward_hook(lambda module, args, output: output * 2)
    net.mid[1].register_forward_hook(lambda module, args, output: None)
    program = lower(net, x)
    with torch.no_grad():
        np.testing.assert_allclose(DeployedModel(program)(x), net(x).numpy(), atol=1e-4)


def test_what_is_only_logged_need_not_be_lowered():
    def forward(net, x):
        y = body(net, x)
        net.log = torch.erf(y).std()
        return net.head(y).mean(0)

    answers_alike(Net(forward), grid(4, 3, 2, 6, 6))


def test_under_inference_mode():
    net, x = make_dyadic(Net(MULTI["mean"])), grid(4, 3, 2, 6, 6)
    with torch.inference_mode():
        program = lower(net, x)
    assert program.metadata == lower(net, x).metadata
    net.train()(x).sum().backward()


def test_lowering_compiles_nothing_and_breaks_nothing():
    from qsnn_ext import kernels
    from qsnn_ext.kernels import backend

    net, x = make_dyadic(Net(MULTI["mean"])), torch.rand(4, 4, 2, 6, 6)
    with kernels.use_backend("auto"):
        with torch.no_grad():
            net(x.repeat(1, 64, 1, 1, 1))  # large enough to be compiled
        reset(net)
        lower(net, x.repeat(1, 64, 1, 1, 1))
    assert backend._broken is None
    assert nn.Module.__call__.__name__ == "_wrapped_call_impl"


# --------------------------------------------------------------------------- refusals


class Surrogate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return (x > 0).float()

    @staticmethod
    def backward(ctx, g):
        return g


class TestRefusals:
    """The line, the reason and the remedy; never that the model might not run when it does."""

    @pytest.mark.parametrize(
        ("forward", "match"),
        [
            (lambda net, x: net.head(Surrogate.apply(net.stem(x))), "'gt' has no integer form"),
            (lambda net, x: net.head(torch.tanh(net.stem(x))), "'tanh' has no integer form"),
            (lambda net, x: net.head(net.stem(x).softmax(2)), "'softmax', which has no integer"),
            (lambda net, x: net.stem(x) * net.stem(x).mean().item(), r"takes them out .*item"),
            (lambda net, x: net.stem(x) if x.sum() > 0 else x, "branches on the values"),
            (lambda net, x: net.head(net.stem(x))[:, 0], "picks samples of the batch"),
            (lambda net, x: net.head(net.stem(x)).mean(1), "mean over the batch"),
            (lambda net, x: net.stem(x).flatten(1).mean(0), "batch or time axis is not in front"),
            (lambda net, x: net.stem(x / x.abs().max()), "by a tensor|'max'"),
            (lambda net, x: F.dropout(net.stem(x)), "at random.*training=self.training"),
            (lambda net, x: net.stem(x + torch.randn_like(x)), "random numbers.*randn_like"),
            (lambda net, x: F.max_pool3d(net.stem(x), 2), "window over three axes.*height and"),
            (lambda net, x: F.scaled_dot_product_attention(*[net.stem(x)] * 3), "softmax.*product"),
            (lambda net, x: net.mid[1](net.stem(x).transpose(0, 3)), "layers before it run"),
            (lambda net, x: net.stem((x - 1) / 2) + net.mid[0](net.stem[0](x)), "normali"),
        ],
    )  # fmt: skip
    def test_reason_and_line(self, forward, match):
        net = make_dyadic(Net(forward))
        with pytest.raises(LoweringError, match=match) as caught:
            lower(net, grid(4, 3, 2, 6, 6))
        assert "(at test_forwards.py:" in str(caught.value)
        assert "check that" not in str(caught.value)

    def test_a_view_that_was_written_into(self):
        def forward(net, x):
            y = net.stem(x)
            z = y[0]
            z += 1
            return net.head(y).mean(0)

        with pytest.raises(LoweringError, match="written into through another view"):
            lower(make_dyadic(Net(forward)), grid(4, 3, 2, 6, 6))

    def test_layers_that_quantize_left(self):
        net = nn.Sequential(
            nn.Linear(8, 16), neuron.LIFNode(step_mode="m"),
            nn.utils.parametrizations.weight_norm(nn.Linear(16, 16)),
            neuron.LIFNode(step_mode="m"), nn.Linear(16, 4),
        ).eval()  # fmt: skip
        report = qsnn_ext.quantize_(net, "1w-2u", sample=torch.rand(3, 2, 8))
        qsnn_ext.calibrate(net, [torch.rand(3, 2, 8)])
        with pytest.raises(LoweringError, match=r"^2: its weights are floating point") as caught:
            lower(net, torch.rand(3, 2, 8))
        assert report["2"].reason in str(caught.value)


# --------------------------------------------------------------------------- the input's range


def ranged():
    torch.manual_seed(0)
    net = nn.Sequential(
        layer.Conv2d(2, 8, 3, padding=1), layer.BatchNorm2d(8), neuron.LIFNode(),
        layer.Flatten(), layer.Linear(8 * 36, 5),
    )  # fmt: skip
    functional.set_step_mode(net, "m")
    large = torch.rand(4, 8, 2, 6, 6) * 5
    qsnn_ext.quantize_(net, "1w-2u", sample=large)
    for _ in range(3):
        net(large)
        functional.reset_net(net)
    return net.eval(), large


class TestInputRange:
    def test_it_is_that_of_the_calibration(self):
        net, large = ranged()
        qsnn_ext.calibrate(net, [large[:, :4], large[:, 4:]])
        assert net.calibrated_input.shape == (4, 4, 2, 6, 6)
        program = lower(net, large[:, :2] * 0.3)
        assert program.input_scale * program.input_range[1] == pytest.approx(10, rel=0.01)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            report = compare(net, program, [large])
        assert report.predictions == 1.0
        assert report.at_the_ends == 0

    def test_a_sample_far_below_it_is_refused(self):
        net, large = ranged()
        qsnn_ext.calibrate(net, [large])
        with pytest.raises(InputError, match=r"far below the range .* calibrated"):
            lower(net, large * 0.02)
        lower(net, large * 0.02, input_scale=0.01)

    def test_without_calibration_what_is_clipped_is_counted(self):
        net, large = ranged()
        qsnn_ext.calibrate(net, [large])
        net.calibrated_input = None
        program = lower(net, large * 0.02)
        with pytest.warns(UserWarning, match=r"of 2304 input values \(0\.9.* clipped"):
            DeployedModel(program)(large)

    def test_no_sample_is_kept_and_copies_know_it_too(self, tmp_path):
        net, large = ranged()
        qsnn_ext.calibrate(net, [large])
        assert net.calibrated_input.values.numel() <= 4096
        copied = copy.deepcopy(net)
        deploy.save(copied, tmp_path / "a.qsnn")
        deploy.save(net, tmp_path / "b.qsnn")
        assert (tmp_path / "a.qsnn").read_bytes() == (tmp_path / "b.qsnn").read_bytes()


# --------------------------------------------------------------------------- hostile metadata


@pytest.mark.parametrize(
    "answer",
    [
        "[]", "{}", "nonsense", '{"steps": [], "form": 0}', '{"steps": [[]], "form": 7}',
        '{"steps": [[["os.system", "x"]]], "form": 0}', '{"steps": [[[]]], "form": 0}',
        '{"steps": [[]], "form": {"named": ["__class__", {"x": 0}]}}',
        '{"steps": [[]], "form": {"named": ["A", {"import": 0}]}}',
        '{"steps": [[]], "form": {"eval": 0}}',
        '{"steps": [[]], "form": ' + "[" * 5000 + "]" * 5000 + "}",
    ],
)  # fmt: skip
def test_descriptions_of_the_answer_are_checked(answer):
    program = lower(make_dyadic(Net(MULTI["mean"])), grid(4, 3, 2, 6, 6))
    program.metadata["answer"] = answer
    with pytest.raises(FormatError):
        DeployedModel(program)


@pytest.mark.parametrize(
    "steps",
    [[["softmax", 9]], [["permute", [0, 0]]], [["index", [[1, 2, 0]]]], [["shape", 0, [7]]]],
)
def test_steps_that_do_not_fit_are_refused(steps):
    program = lower(make_dyadic(Net(MULTI["mean"])), grid(4, 3, 2, 6, 6))
    program.metadata["answer"] = json.dumps({"steps": [steps], "form": 0})
    with pytest.raises(FormatError, match="does not fit"):
        DeployedModel(program)(grid(4, 3, 2, 6, 6))


@pytest.mark.parametrize("gain", ["", "x", "1,2,3", "nan", "1e999"])
def test_gains_of_the_input_are_checked(gain):
    program = lower(make_dyadic(Net(MULTI["input affine"])), grid(4, 3, 2, 6, 6))
    program.metadata["input_gain"] = gain
    with pytest.raises(FormatError, match="input_gain"):
        DeployedModel(program)
