"""A network of SpikingJelly's model zoo: quantized, trained, reported, deployed.

The model is the zoo's ``sew_resnet18``, built as its documentation builds it; nothing in it knows
of quantization. The data are scikit-learn's handwritten digits, far too little for a network of
eleven million weights: what is shown is the way, not an accuracy. Run with

    python docs/examples/zoo_spikingjelly.py

"""

from __future__ import annotations

from pathlib import Path

import torch
from spikingjelly.activation_based import functional, neuron, surrogate
from spikingjelly.activation_based.model.sew_resnet import sew_resnet18
from torch import Tensor
from torch.nn import functional as F

from qsnn_ext import WSDRRegularizer, calibrate, deploy, quantize_, summarize
from recipes.data import datasets

T = 2


def digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Training and test digits, each as images ``[N, 3, 32, 32]`` and labels."""
    parts = []
    for part in datasets("digits", "data", augment=False, size=32):
        pairs = [part[i] for i in range(len(part))]
        images = torch.stack([x for x, _ in pairs]).expand(-1, 3, -1, -1)
        parts.append((images, torch.tensor([y for _, y in pairs])))
    return parts[0], parts[1]


def build() -> torch.nn.Module:
    """The zoo's network in multi-step mode, with ten classes."""
    model: torch.nn.Module = sew_resnet18(
        num_classes=10,
        cnf="ADD",
        spiking_neuron=neuron.LIFNode,
        surrogate_function=surrogate.ATan(),
        detach_reset=True,
        decay_input=False,
    )
    functional.set_step_mode(model, "m")
    return model


def over_time(images: Tensor) -> Tensor:
    """The images shown at each of T steps: ``[T, N, 3, 32, 32]``."""
    return images.expand(T, *images.shape)


def train(model: torch.nn.Module, x: Tensor, y: Tensor, steps: int, batch: int = 16) -> None:
    """A few optimizer steps of an ordinary training loop, with the spike term added to the loss."""
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    model.train()
    with WSDRRegularizer(model, strength=1e-3) as wsdr:
        for step in range(steps):
            chosen = torch.randint(len(x), (batch,))
            functional.reset_net(model)
            logits = model(over_time(x[chosen])).mean(0)
            loss = F.cross_entropy(logits, y[chosen]) + wsdr()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % 5 == 0:
                print(f"step {step:3d}  loss {loss.item():.3f}")


@torch.no_grad()
def predict(model: torch.nn.Module, x: Tensor) -> Tensor:
    """The most likely class of each image."""
    model.eval()
    functional.reset_net(model)
    return model(over_time(x)).mean(0).argmax(1)


def main(folder: Path = Path("."), steps: int = 40) -> dict[str, float]:
    """Run the whole way; the files go to ``folder``."""
    torch.manual_seed(0)
    (x, y), (x_test, y_test) = digits()
    x_test, y_test = x_test[:100], y_test[:100]

    model = build()
    sample = over_time(x_test[:8])
    print(quantize_(model, "1w-2u", sample=sample))
    train(model, x, y, steps)

    # From here on a digit's result does not depend on the digits beside it.
    calibrate(model, [over_time(x[i : i + 64]) for i in range(0, 128, 64)])
    predicted = predict(model, x_test)

    report = summarize(model, sample)
    print(report)
    report.to_csv(folder / "zoo_spikingjelly.csv")

    program = deploy.save(model, folder / "zoo_spikingjelly.qsnn", sample)
    # The program rounds its input. Given the same input, does it do what the model does?
    comparison = deploy.compare(model, program, [over_time(x_test[:16])], quantize_input=True)
    print(comparison)
    deployed = deploy.load(folder / "zoo_spikingjelly.qsnn")
    answers = torch.from_numpy(deployed(over_time(x_test).numpy())).mean(0).argmax(1)

    result = {
        "trained": (predicted == y_test).float().mean().item(),
        "deployed": (answers == y_test).float().mean().item(),
        "agreement": comparison.predictions,
        "bytes": (folder / "zoo_spikingjelly.qsnn").stat().st_size,
        "float_bytes": 4 * sum(p.numel() for p in model.parameters()),
    }
    print(result)
    return result


if __name__ == "__main__":
    main()
