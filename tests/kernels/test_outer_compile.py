"""The operations inside a model that the user compiles as a whole."""

import pytest
import torch

from qsnn_ext.models import resnet19

pytest.importorskip("spikingjelly")


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
