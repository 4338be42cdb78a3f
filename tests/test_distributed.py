"""Two processes on one CPU train what one does: DDP and FSDP2, compiled and not.

Every process sees its half of the batch. Scales are the maximum over both (`sync_scale`), frozen
ones follow it, and the gradients are averaged, so weights, scales and the terms of WS-DR must be
those of one process with the whole batch.
"""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from qsnn_ext import MembraneConfig, QuantConfig, WSDRRegularizer, quantize_
from tests.processes import two_processes

pytest.importorskip("spikingjelly")
from spikingjelly.activation_based import functional, layer, neuron

STEPS, BATCH = 3, 8
# Compiled with one mode each: compiling takes longest. Of the two, only frozen scales write to
# their module inside the graph, and only FSDP's parameters come and go.
CASES = [
    ("ddp", "dynamic"), ("ddp", "frozen"), ("ddp compiled", "frozen"),
    ("fsdp", "dynamic"), ("fsdp", "frozen"), ("fsdp compiled", "dynamic"),
]  # fmt: skip


def network(mode, sync):
    torch.manual_seed(0)
    net = nn.Sequential(
        layer.Conv2d(2, 6, 3, padding=1, bias=False),
        neuron.LIFNode(detach_reset=True),
        layer.Conv2d(6, 6, 3, padding=1, bias=False),
        neuron.LIFNode(detach_reset=True),
        layer.Flatten(),
        layer.Linear(6 * 6 * 6, 6, bias=False),
        neuron.LIFNode(detach_reset=True),
        layer.Linear(6, 3),
    )
    functional.set_step_mode(net, "m")
    membrane = MembraneConfig(bits=4, mode=mode, sync_scale=sync)
    quantize_(net.double(), QuantConfig(weight=1, membrane=membrane))
    return net


def batches():
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(3, STEPS, BATCH, 2, 6, 6, generator=rng, dtype=torch.float64) * 2
    return list(zip(x, torch.randint(3, (3, BATCH), generator=rng), strict=True))


def train(net, regularizer, call, share, accumulate=2):
    """Three steps of ``accumulate`` micro-batches each; the loss terms of every step."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.2, momentum=0.9)
    terms = []
    for x, y in batches():
        optimizer.zero_grad()
        for _ in range(accumulate):
            functional.reset_net(net)
            logits = call(x[:, share]).mean(0)
            term = regularizer()
            loss = nn.functional.cross_entropy(logits, y[share]) + term
            (loss / accumulate).backward()
            terms.append(term.detach())
        optimizer.step()
    return torch.stack(terms)


class TermOfHalves:
    """What two processes' WS-DR terms are on average, written out from the hidden layer's spikes.

    The mean of two squares: no more than 1/4 of the squared difference of the rates away from the
    square of the whole batch's.
    """

    def __init__(self, net):
        net[3].register_forward_hook(self._keep)

    def _keep(self, module, inputs, spikes):
        self._spikes = spikes

    def __call__(self):
        halves = self._spikes.split(BATCH // 2, dim=1)
        return sum((half.mean() - 0.5).square() for half in halves) / 2


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def result(net, terms):
    state = {name: whole(t.detach()).clone() for name, t in net.state_dict().items()}
    functional.reset_net(net)
    return {**state, "terms": terms}


def work(rank, folder, results):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        torch.set_num_threads(1)
        for way, mode in CASES:
            torch.compiler.reset()
            results[rank, way, mode] = train_half(rank, way, mode)
    finally:
        dist.destroy_process_group()


def train_half(rank, way, mode):
    net = network(mode, sync=True)
    regularizer = WSDRRegularizer(net, strength=1.0)
    call = net
    if way.startswith("ddp"):
        call = DistributedDataParallel(net)
    else:
        mesh = dist.init_device_mesh("cpu", (2,))
        for part in (net[0], net[2], net[5], net):
            fully_shard(part, mesh=mesh)
    if way.endswith("compiled"):
        call = torch.compile(call, backend="aot_eager")
    half = BATCH // 2
    terms = train(net, regularizer, call, slice(rank * half, (rank + 1) * half))
    dist.all_reduce(terms)
    return result(net, terms / 2)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What each process has after each way, by rank, way and mode: started once for all."""
    return two_processes(work, tmp_path_factory.mktemp("store"))


@pytest.mark.slow
@pytest.mark.parametrize(("way", "mode"), CASES)
def test_two_processes_train_what_one_does(way, mode, trained):
    net = network(mode, sync=False)
    expected = result(net, train(net, TermOfHalves(net), net, slice(None)))
    first, second = trained[0, way, mode], trained[1, way, mode]
    assert first.keys() == expected.keys()
    if mode == "frozen":
        assert any(name.endswith("membrane.alpha") for name in expected)
    for name, value in expected.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], value, rtol=1e-9, atol=1e-10, msg=name)
