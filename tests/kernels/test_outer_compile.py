"""Compilation of whole models: by the user as one graph, and of the cores that layers share."""

import pytest
import torch

from qsnn_ext import kernels, quantize_
from qsnn_ext.models import resnet19

pytest.importorskip("spikingjelly")
from qsnn_ext.spikingjelly import QuantLIFNode


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["paper", "official"])
def test_resnet19_compiles_as_one_graph(preset):
    """Traced and differentiated as one graph; run by the operations' own kernels."""
    torch.manual_seed(0)
    model = resnet19(width=0.125, T=2, bits="1w-2u", preset=preset)
    x = torch.randn(2, 3, 8, 8)
    expected = model(x)
    expected.sum().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    got = compiled(x)
    got.sum().backward()
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    for p, grad in zip(model.parameters(), grads, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-3, atol=1e-4)


def sew_resnet34():
    """A network of 36 neurons from the host's zoo."""
    from spikingjelly.activation_based import functional, neuron, surrogate
    from spikingjelly.activation_based.model import sew_resnet

    model = sew_resnet.sew_resnet34(
        cnf="ADD", spiking_neuron=neuron.LIFNode, surrogate_function=surrogate.ATan(),
        detach_reset=True, num_classes=10,
    )  # fmt: skip
    functional.set_step_mode(model, "m")
    quantize_(model, "1w-2u")
    assert sum(isinstance(m, QuantLIFNode) for m in model.modules()) > 30

    def run(x):
        functional.reset_net(model)
        return model(x)

    return model, run, torch.randn(2, 2, 3, 64, 64)


def paper_resnet19():
    model = resnet19(width=0.25, T=2, bits="1w-4u")
    # Layers with channels = height = width = batch, so that sizes coincide.
    return model, model, torch.randn(32, 3, 32, 32)


@pytest.mark.slow
@pytest.mark.parametrize("build", [paper_resnet19, sew_resnet34])
def test_layers_share_their_compiled_cores(build, caplog):
    """One compilation for all layers and batch sizes: neither recompiled nor specialised."""
    torch.manual_seed(0)
    kernels.backend.clear()
    model, run, x = build()
    # Raised, and so seen: a size that the compiler fixed, and any second compilation of a core.
    with (
        torch._dynamo.config.patch(error_on_recompile=True),
        kernels.use_backend("compiled"),
        caplog.at_level("WARNING", logger="torch"),
    ):
        for batch in (x, x, x[..., : x.shape[-1] // 2, :]):
            run(batch).sum().backward()
    cores = kernels.backend._cores.values()
    assert sum(core._compiled is not None for core in cores) >= 4
    assert not [r for r in caplog.records if "recompile" in r.message or "Constraint" in r.message]
    for parameter in model.parameters():
        assert parameter.grad is None or torch.isfinite(parameter.grad).all()
