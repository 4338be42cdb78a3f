"""Whole programs as people write them: every answer is the simulation's.

What a network returns is compared with what its program returns, in form and number, and the
spikes of every layer; the engine is compared with the reference bit by bit.
"""

from __future__ import annotations

import zlib
from collections import namedtuple

import numpy as np
import pytest
import snntorch as snn
import torch
import torch.nn.functional as F
from snntorch import utils
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn

from qsnn_ext import calibrate, quantize_
from qsnn_ext.deploy import DeployedModel, compare, lower
from qsnn_ext.errors import LoweringError

PROGRAMS = {}


def program(build):
    """Register a function that makes a network and its input."""
    PROGRAMS[build.__name__] = build
    return build


def lif(**options):
    return neuron.LIFNode(tau=2.0, detach_reset=True, **options)


Out = namedtuple("Out", "logits feats")


@program
def sj_view_keep():  # view(T, N, -1) and functional multi-step in single layers, named tuple
    class N(nn.Module):
        def __init__(self):
            super().__init__()
            self.c, self.b, self.n = layer.Conv2d(1, 8, 3, padding=1), layer.BatchNorm2d(8), lif()
            self.p = layer.AvgPool2d(2)
            self.f, self.n2, self.o = layer.Linear(8 * 16, 32), lif(), layer.Linear(32, 5)
            functional.set_step_mode(self, "m")

        def forward(self, x):
            T, B = x.shape[:2]
            y = self.p(self.n(self.b(self.c(x)))).view(T, B, -1)
            z = self.n2(self.f(y))
            return Out(self.o(z).mean(0), z.sum(0))

    return N(), torch.rand(4, 3, 1, 8, 8)


@program
def sj_residual_cat_chunk():
    class N(nn.Module):
        def __init__(self):
            super().__init__()
            self.c1, self.b1, self.n1 = (
                layer.Conv2d(2, 8, 3, padding=1, bias=False),
                layer.BatchNorm2d(8),
                lif(),
            )
            self.a, self.ba, self.na = (
                layer.Conv2d(4, 4, 3, padding=1, bias=False),
                layer.BatchNorm2d(4),
                lif(),
            )
            self.b, self.bb, self.nb = (
                layer.Conv2d(4, 4, 1, bias=False),
                layer.BatchNorm2d(4),
                lif(),
            )
            self.o = layer.Linear(8, 3)
            functional.set_step_mode(self, "m")

        def forward(self, x):
            y = self.n1(self.b1(self.c1(x)))
            a, b = torch.chunk(y, 2, dim=2)
            y = torch.cat((self.na(self.ba(self.a(a))) + a, self.nb(self.bb(self.b(b)))), dim=-3)
            return self.o(y.mean(dim=[-1, -2])).mean(dim=0)

    return N(), (torch.rand(3, 2, 2, 6, 6) < 0.4).float()


@program
def snn_loop_dict():
    class N(nn.Module):
        def __init__(self):
            super().__init__()
            self.f1, self.l1 = nn.Linear(12, 24), snn.Leaky(0.9)
            self.f2, self.l2 = nn.Linear(24, 4), snn.Leaky(0.8, reset_mechanism="none")

        def forward(self, x, num_steps=5):
            m1, m2 = self.l1.reset_mem(), self.l2.reset_mem()
            rec = {"spk": [], "mem": []}
            for _t in range(num_steps):
                sp, m1 = self.l1(self.f1(x), m1)
                _s2, m2 = self.l2(self.f2(sp), m2)
                rec["spk"].append(sp)
                rec["mem"].append(m2)
            return {k: torch.stack(v) for k, v in rec.items()}

    return N(), torch.rand(3, 12)


@program
def snn_permute_in():
    class N(nn.Module):
        def __init__(self):
            super().__init__()
            self.c, self.p, self.l = (
                nn.Conv2d(2, 6, 3),
                nn.MaxPool2d(2),
                snn.Leaky(0.7, init_hidden=True),
            )
            self.f, self.l2 = nn.Linear(54, 4), snn.Leaky(0.7, init_hidden=True, output=True)

        def forward(self, x):
            x = x.permute(1, 0, 2, 3, 4)
            utils.reset(self)
            spk = 0
            mems = []
            for i in range(x.size(0)):
                a, m = self.l2(self.f(torch.flatten(self.l(self.p(self.c(x[i]))), 1)))
                spk = spk + a
                mems.append(m)
            return spk / x.size(0), mems[-1]

    return N(), (torch.rand(3, 4, 2, 8, 8) < 0.4).float()


@program
def sj_tokens_einsum():
    class N(nn.Module):
        def __init__(self):
            super().__init__()
            self.e, self.n = layer.Linear(6, 16), lif()
            self.q, self.nq, self.k, self.nk, self.na = (
                layer.Linear(16, 16),
                lif(),
                layer.Linear(16, 16),
                lif(),
                lif(v_threshold=0.5),
            )
            self.o = layer.Linear(16, 3)
            functional.set_step_mode(self, "m")

        def forward(self, x):
            x = self.n(self.e(x))
            q, k = self.nq(self.q(x)), self.nk(self.k(x))
            T, B, tokens, D = x.shape
            q, k, v = (t.reshape(T, B, tokens, 2, D // 2).permute(0, 1, 3, 2, 4) for t in (q, k, x))
            a = torch.einsum("tbhid,tbhjd->tbhij", q, k) / 4
            y = self.na((a @ v).transpose(2, 3).flatten(3))
            return self.o((y + x).mean(2))

    return N(), torch.rand(3, 2, 5, 6)


@program
def sj_single_step_t_loop_counter():
    class N(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(
                nn.Flatten(), nn.Linear(64, 30, bias=False), lif(), nn.Linear(30, 10), lif()
            )

        def forward(self, img):
            fr = 0.0
            for _t in range(6):
                fr += self.net(img)
            return fr / 6

    return N(), torch.rand(3, 1, 8, 8)


@program
def sj_squeeze_excite_like():  # gate of spikes from pooled currents
    class N(nn.Module):
        def __init__(self):
            super().__init__()
            self.c, self.n, self.g, self.ng, self.o = (
                layer.Conv2d(1, 8, 3),
                lif(),
                layer.Linear(8, 8),
                lif(),
                layer.Linear(8, 3),
            )
            functional.set_step_mode(self, "m")

        def forward(self, x):
            y = self.n(self.c(x))
            g = self.ng(self.g(y.mean((3, 4))))
            y = y * g[..., None, None]
            return self.o(y.flatten(3).sum(-1) / 36)

    return N(), torch.rand(3, 2, 1, 8, 8)


@program
def sj_swap_hw_unfold_views():
    class N(nn.Module):
        def __init__(self):
            super().__init__()
            self.c, self.n, self.c2, self.n2, self.f = (
                layer.Conv2d(1, 4, 3, padding=1),
                lif(),
                layer.Conv2d(4, 4, (3, 1), padding=(1, 0)),
                lif(),
                layer.Linear(4 * 8, 5),
            )
            functional.set_step_mode(self, "m")

        def forward(self, x):
            y = self.n(self.c(x)).swapaxes(-1, -2).contiguous()
            y = self.n2(self.c2(y))
            return self.f(y.movedim(-1, 2).mean(2).flatten(2)).transpose(0, 1)

    return N(), torch.rand(3, 2, 1, 6, 8)


@program
def snn_multi_heads_list():
    class N(nn.Module):
        def __init__(self):
            super().__init__()
            self.f, self.l = nn.Linear(10, 20), snn.Leaky(0.9, init_hidden=True)
            self.h = nn.ModuleList([nn.Linear(20, k) for k in (2, 3)])
            self.hl = nn.ModuleList([snn.Leaky(0.9, init_hidden=True) for _ in range(2)])

        def forward(self, x):
            utils.reset(self)
            outs = [[], []]
            for t in range(x.shape[0]):
                z = self.l(self.f(x[t]))
                for i, (h, fire) in enumerate(zip(self.h, self.hl, strict=True)):
                    outs[i].append(fire(h(z)))
            return [torch.stack(o, dim=1) for o in outs]

    return N(), torch.rand(4, 3, 10)


@program
def sj_time_slices():
    class N(nn.Module):
        def __init__(self):
            super().__init__()
            self.f, self.n, self.g, self.m, self.o = (
                layer.Linear(6, 16),
                lif(),
                layer.Linear(16, 16),
                lif(),
                layer.Linear(16, 3),
            )
            functional.set_step_mode(self, "m")

        def forward(self, x):
            y = self.m(self.g(self.n(self.f(x))))
            return self.o(y[-2:]).mean(0), self.o(y)[::2], y[:, :, :4].sum(0)

    return N(), torch.rand(5, 3, 6)


@program
def sj_conv1d_frames():
    class N(nn.Module):
        def __init__(self):
            super().__init__()
            self.c, self.b, self.n, self.p, self.c2, self.n2, self.f = (
                layer.Conv1d(1, 6, 5, padding=2),
                layer.BatchNorm1d(6),
                lif(),
                layer.MaxPool1d(2),
                layer.Conv1d(6, 8, 3),
                lif(),
                layer.Linear(8 * 6, 4),
            )
            functional.set_step_mode(self, "m")

        def forward(self, x):
            return self.f(self.n2(self.c2(self.p(self.n(self.b(self.c(x)))))).flatten(2)).mean(0)

    return N(), torch.rand(4, 2, 1, 16)


@program
def snn_threshold_learned_subtract():
    class N(nn.Module):
        def __init__(self):
            super().__init__()
            self.f, self.l, self.g, self.k = (
                nn.Linear(8, 16),
                snn.Leaky(beta=torch.rand(16), threshold=0.7, learn_threshold=True),
                nn.Linear(16, 4),
                snn.Leaky(0.95),
            )

        def forward(self, x):
            m, k = self.l.init_leaky(), self.k.init_leaky()
            o = torch.zeros(x.shape[0], x.shape[1], 4)
            for t in range(x.shape[0]):
                a, m = self.l(self.f(x[t]), m)
                b, k = self.k(self.g(a), k)
                o[t] = b
            return o.sum(0), m

    return N(), torch.rand(5, 3, 8)


@program
def sj_densenet_block():
    class N(nn.Module):
        def __init__(self):
            super().__init__()
            self.c = nn.ModuleList(
                [layer.Conv2d(i, 4, 3, padding=1, bias=False) for i in (2, 6, 10)]
            )
            self.b = nn.ModuleList([layer.BatchNorm2d(4) for _ in range(3)])
            self.n = nn.ModuleList([lif() for _ in range(3)])
            self.o = layer.Linear(14, 3)
            functional.set_step_mode(self, "m")

        def forward(self, x):
            f = x
            for c, b, n in zip(self.c, self.b, self.n, strict=False):
                f = torch.cat([f, n(b(c(f)))], 2)
            return self.o(f.mean((3, 4))).mean(0)

    return N(), (torch.rand(3, 2, 2, 6, 6) < 0.4).float()


class TwoLayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.c, self.n = layer.Conv2d(1, 6, 3, padding=1), lif()
        self.d, self.m = layer.Conv2d(6, 6, 3, padding=1), lif()
        self.o = layer.Linear(6, 3)
        functional.set_step_mode(self, "m")

    def spikes(self, x):
        y = self.n(self.c(x))
        return y, self.m(self.d(y))


@program
def sj_iand_and_max():
    class N(TwoLayers):
        def forward(self, x):
            y, z = self.spikes(x)
            u = z * (1 - y) + y * z
            return self.o(
                F.adaptive_avg_pool2d(u.flatten(0, 1), 1).view(x.shape[0], x.shape[1], -1)
            ).mean(0)

    return N(), torch.rand(3, 2, 1, 6, 6)


@program
def sj_maximum_of_spikes():
    class N(TwoLayers):
        def forward(self, x):
            y, z = self.spikes(x)
            return self.o(torch.maximum(y, z).mean((3, 4))).mean(0), torch.logical_or(
                y.bool(), z.bool()
            ).float().sum(0)

    return N(), torch.rand(3, 2, 1, 6, 6)


@program
def sj_where_clamp():
    class N(TwoLayers):
        def forward(self, x):
            y, z = self.spikes(x)
            return self.o((y + z).clamp(0, 1).mean((3, 4))).mean(0), torch.where(
                y > 0, z, torch.zeros_like(z)
            ).sum(0)

    return N(), torch.rand(3, 2, 1, 6, 6)


@program
def sj_stacked_views_group():
    class N(nn.Module):
        def __init__(self):
            super().__init__()
            self.c, self.n, self.d, self.m, self.o = (
                layer.Conv2d(2, 8, 3, padding=1),
                lif(),
                layer.Conv2d(8, 8, 3, padding=1, groups=2, stride=2),
                lif(),
                layer.Linear(8 * 9, 3),
            )
            functional.set_step_mode(self, "m")

        def forward(self, x):
            y = self.n(self.c(x))
            T, B, C, H, W = y.shape
            y = y.view(T, B, 2, C // 2, H, W).transpose(2, 3).reshape(T, B, C, H, W)
            return self.o(self.m(self.d(y)).reshape(T, B, -1)).unbind(0)[-1]

    return N(), torch.rand(3, 2, 2, 6, 6)


@program
def snn_image_repeat_stack_dim():
    class N(nn.Module):
        def __init__(self):
            super().__init__()
            self.n = nn.Sequential(
                nn.Conv2d(1, 4, 3),
                snn.Leaky(0.8, init_hidden=True),
                nn.MaxPool2d(2),
                nn.Flatten(),
                nn.Linear(36, 5),
                snn.Leaky(0.8, init_hidden=True, output=True),
            )

        def forward(self, x, T=4):
            utils.reset(self.n)
            sp, mm = zip(*[self.n(x) for _ in range(T)], strict=False)
            return torch.stack(sp, -1).sum(-1), torch.stack(mm, 0)

    return N(), torch.rand(2, 1, 8, 8)


@program
def sj_softmax_time_mean_dict():
    class N(nn.Module):
        def __init__(self):
            super().__init__()
            self.b = nn.Sequential(
                layer.Conv2d(3, 6, 3),
                layer.BatchNorm2d(6),
                lif(),
                layer.AdaptiveAvgPool2d(1),
                layer.Flatten(),
            )
            self.o = layer.Linear(6, 4)
            functional.set_step_mode(self, "m")

        def forward(self, x):
            x = (x - 0.5) / 0.25
            x = x[None].repeat(3, 1, 1, 1, 1)
            z = self.b(x)
            y = self.o(z)
            return {
                "p": y.mean(0).softmax(1),
                "cls": y.mean(0).argmax(1),
                "per": y,
                "n": z.sum((0, 2)),
            }

    return N(), torch.rand(2, 3, 6, 6)


REFUSED = {
    "sj_maximum_of_spikes": "'maximum' has no integer form",
    "sj_where_clamp": "'clamp' has no integer form",
}


def arrays(answer):
    """All numbers of an answer, in order."""
    if isinstance(answer, dict):
        answer = list(answer.values())
    if isinstance(answer, (list, tuple)):
        return [a for part in answer for a in arrays(part)]
    return [np.asarray(answer, np.float64)]


def prepared(net, x):
    """Quantized, as if it had been trained: every layer fires, norms have statistics."""
    quantize_(net, "1w-2u", sample=x)
    g = torch.Generator().manual_seed(1)
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for name, low, high in (
                ("weight", 1, 3), ("bias", -0.5, 1), ("running_var", 0.5, 2),
                ("running_mean", -0.5, 0.5),
            ):  # fmt: skip
                getattr(module, name).data.uniform_(low, high, generator=g)
        if hasattr(module, "quantizer") and hasattr(module, "weight"):
            module.weight.data += 0.6 * module.weight.data.abs()
            module.weight.data *= 2
    net.eval()
    functional.reset_net(net)
    events = bool(((x == 0) | (x == 1)).all())
    other = torch.rand(x.shape, generator=g)
    calibrate(net, [(other < 0.4).float() if events else other])
    functional.reset_net(net)
    return net


@pytest.mark.parametrize("name", PROGRAMS)
def test_answers_as_the_simulation(name):
    torch.manual_seed(zlib.crc32(name.encode()) % 1000)
    net, x = PROGRAMS[name]()
    net = prepared(net, x)
    if name in REFUSED:
        with pytest.raises(LoweringError, match=REFUSED[name]):
            lower(net, x)
        return
    found = lower(net, x)
    engine, reference = DeployedModel(found), DeployedModel(found, "numpy")
    for a, b in zip(engine.integers(x), reference.integers(x), strict=True):
        np.testing.assert_array_equal(a, b)
    shown = torch.from_numpy(engine.inputs(engine.codes(x))).float()
    with torch.no_grad():
        expected = net(shown)
    functional.reset_net(net)
    got = engine(x)
    if not isinstance(expected, (torch.Tensor, list)):
        assert type(got).__name__ == type(expected).__name__
    for a, b in zip(arrays(got), arrays(expected), strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, atol=1e-3 * max(1.0, np.abs(b).max()))
    report = compare(net, found, [x], quantize_input=True)
    assert all(a.agreement == 1.0 for a in report.layers), str(report)
    assert max(a.rate_model for a in report.layers) > 0.02
