"""NeuroBench's own harness on the same model before and after quantization.

Equal must be what quantization does not touch: parameters, dense operations, and, as long as no
weight rounds to zero, which connections there are. NeuroBench's metrics alone, without a word of
this package, must see that too.
"""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from qsnn_ext import IntWeight, quantize_
from qsnn_ext.layers import BinaryConv2d, BinaryLinear, QuantLinear

snn = pytest.importorskip("snntorch")
Benchmark = pytest.importorskip("neurobench.benchmarks").Benchmark
static = pytest.importorskip("neurobench.metrics.static")
workload = pytest.importorskip("neurobench.metrics.workload")
models = pytest.importorskip("neurobench.models")
ours = pytest.importorskip("qsnn_ext.neurobench")

STATIC = [static.ParameterCount, static.Footprint, static.ConnectionSparsity]
WORKLOAD = [
    workload.SynapticOperations,
    workload.ActivationSparsity,
    workload.MembraneUpdates,
    workload.ClassificationAccuracy,
]


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        snn.Leaky(beta=0.9, init_hidden=True),
        nn.Conv2d(4, 8, 3, stride=2, padding=1, bias=False),
        snn.Leaky(beta=0.9, init_hidden=True),
        nn.Flatten(),
        nn.Linear(8 * 16, 10),
        snn.Leaky(beta=0.9, init_hidden=True, output=True),
    )


def run(model, metrics=(STATIC, WORKLOAD), wrapper=models.SNNTorchModel):
    generator = torch.Generator().manual_seed(0)
    frames = 3 * torch.rand(8, 5, 1, 8, 8, generator=generator)  # [N, T, ...]
    data = TensorDataset(frames, torch.arange(8))

    def counts(spikes):
        return spikes.sum(1).argmax(1)

    benchmark = Benchmark(
        wrapper(model), DataLoader(data, batch_size=4), [], [counts], [list(m) for m in metrics]
    )
    return benchmark.run(quiet=True)


def test_what_must_be_equal():
    before = run(network())
    model = network()
    quantize_(model, "1w-4u")
    after = run(model)
    assert before["ConnectionSparsity"] is not None
    for name in ("ParameterCount", "ConnectionSparsity"):
        assert after[name] == before[name], name
    old, new = before["SynapticOperations"], after["SynapticOperations"]
    assert new["Dense"] == old["Dense"] > 0
    # The first layer's input is the same, and none of its 36 weights rounds to zero.
    assert new["Effective_MACs"] == old["Effective_MACs"] > 0
    # Behind it other spikes flow.
    assert 0 < new["Effective_ACs"] <= new["Dense"]
    assert after["MembraneUpdates"] > 0
    # Metrics put nothing into the model: the same network answers as before.
    fresh = network()
    quantize_(fresh, "1w-4u")
    x = torch.rand(2, 1, 8, 8)
    for m in (model, fresh):
        snn.utils.reset(m)
    torch.testing.assert_close(model.eval()(x)[0], fresh.eval()(x)[0])


def test_effective_operations_are_those_of_the_stock_layer_with_quantized_weights():
    """The independent count: NeuroBench on a float network that holds the same values."""
    quantized = nn.Sequential(
        BinaryConv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(),
        QuantLinear(4 * 64, 10, quantizer=IntWeight(2)),
    )  # fmt: skip
    plain = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10)
    )
    plain.load_state_dict(quantized.state_dict())
    with torch.no_grad():
        for i in (0, 3):
            codes, scale = quantized[i].codes()
            plain[i].weight.copy_(codes * scale)
    assert (plain[3].weight == 0).any()

    data = TensorDataset(torch.rand(8, 1, 8, 8), torch.arange(8))
    found = [
        Benchmark(
            models.TorchModel(model), DataLoader(data, batch_size=4), [], [],
            [[ours.ConnectionSparsity], [workload.SynapticOperations]],
        ).run(quiet=True)
        for model in (plain, quantized)
    ]  # fmt: skip
    assert found[0] == found[1]
    assert 0 < found[0]["ConnectionSparsity"] < 1


def test_without_quantizers_our_numbers_are_theirs():
    metrics = (ours.STATIC, ours.WORKLOAD)
    theirs, found = run(network()), run(network(), metrics)
    for name in ("ParameterCount", "Footprint", "ConnectionSparsity", "SynapticOperations"):
        assert found[name] == theirs[name], name
    kinds = found["OperationsByKind"]
    assert kinds["mac"] == theirs["SynapticOperations"]["Effective_MACs"]
    assert kinds["ac"] == theirs["SynapticOperations"]["Effective_ACs"]


def test_what_the_quantizers_know():
    model = network()
    floats = sum(8 * p.numel() for p in model.parameters())
    quantize_(model, "1w-4u")
    found = run(model, (ours.STATIC, ours.WORKLOAD))
    weights = {0: 8, 2: 1, 5: 8}
    by_hand = sum(model[i].weight.numel() * bits / 8 for i, bits in weights.items())
    by_hand += 4 * (1 + 8 + 1)  # scales: one of an 8-bit layer, one a channel of a 1-bit layer
    by_hand += 4 * (4 + 10)  # biases
    for neuron in (model[1], model[3], model[6]):
        by_hand += 4 + sum(
            b.numel() * (0.5 if name == "mem" else b.element_size())
            for name, b in network()[1].named_buffers()
        )
        assert neuron.bits == 4
    assert found["Footprint"] == by_hand < floats / 4
    kinds = found["OperationsByKind"]
    assert {"mac8", "and_ac", "ac8"} <= kinds.keys()
    total = found["SynapticOperations"]
    assert kinds["mac8"] == total["Effective_MACs"]
    assert kinds["and_ac"] + kinds["ac8"] == total["Effective_ACs"]


def test_layers_are_leaves_that_move_with_their_quantizer():
    layer = BinaryLinear(4, 3)
    assert list(layer.children()) == []
    assert layer.quantizer in list(layer.modules())
    layer.eval()
    assert not layer.quantizer.training
    layer.to(torch.float64)
    assert layer.quantizer.temperature.dtype == torch.float64
    layer.to("meta")
    assert layer.quantizer.temperature.device.type == "meta"
    seen = []
    nn.Sequential(layer).apply(seen.append)
    assert layer.quantizer in seen
