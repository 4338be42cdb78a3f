"""A network in the style of snnTorch's tutorials: quantized, trained, reported, deployed.

The class is what a newcomer writes after the fifth tutorial: two linear layers, two ``Leaky``
neurons, membrane potentials passed by hand in a loop over time, a loss of ``snntorch.functional``.
The data are scikit-learn's handwritten digits. Run with

    python docs/examples/tutorial_snntorch.py

"""

from __future__ import annotations

from pathlib import Path

import snntorch as snn
import snntorch.functional as SF
import torch
from torch import Tensor, nn

from qsnn_ext import WSDRRegularizer, calibrate, deploy, quantize_, summarize
from recipes.data import datasets

NUM_STEPS = 10


class Net(nn.Module):
    """784 inputs, 256 hidden and 10 output neurons."""

    def __init__(self, beta: float = 0.9) -> None:
        super().__init__()
        self.fc1 = nn.Linear(784, 256)
        self.lif1 = snn.Leaky(beta=beta)
        self.fc2 = nn.Linear(256, 10)
        self.lif2 = snn.Leaky(beta=beta)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Spikes and membrane potentials of the output neurons, both ``[T, N, 10]``."""
        mem1 = self.lif1.init_leaky()
        mem2 = self.lif2.init_leaky()
        spikes, potentials = [], []
        for _ in range(NUM_STEPS):
            spk1, mem1 = self.lif1(self.fc1(x), mem1)
            spk2, mem2 = self.lif2(self.fc2(spk1), mem2)
            spikes.append(spk2)
            potentials.append(mem2)
        return torch.stack(spikes), torch.stack(potentials)


def digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Training and test digits, each as vectors ``[N, 784]`` and labels."""
    parts = []
    for part in datasets("digits", "data", augment=False, size=28):
        pairs = [part[i] for i in range(len(part))]
        images = torch.stack([x for x, _ in pairs]).flatten(1)
        parts.append((images, torch.tensor([y for _, y in pairs])))
    return parts[0], parts[1]


def train(net: Net, x: Tensor, y: Tensor, steps: int, batch: int = 64) -> None:
    """A few optimizer steps of the tutorials' loop, with the spike term added to the loss."""
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    loss_fn = SF.ce_rate_loss()
    net.train()
    # Two spiking layers are the first and the last one; the paper leaves both out, this does not.
    with WSDRRegularizer(net, strength=1e-3, exclude=["lif2"]) as wsdr:
        for step in range(steps):
            chosen = torch.randint(len(x), (batch,))
            spikes, _ = net(x[chosen])
            loss = loss_fn(spikes, y[chosen]) + wsdr()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % 50 == 0:
                print(f"step {step:3d}  loss {loss.item():.3f}")


@torch.no_grad()
def predict(net: Net, x: Tensor) -> Tensor:
    """The class whose neuron fired most, of each image."""
    net.eval()
    spikes, _ = net(x)
    return spikes.sum(0).argmax(1)


def main(folder: Path = Path("."), steps: int = 200) -> dict[str, float]:
    """Run the whole way; the files go to ``folder``."""
    torch.manual_seed(0)
    (x, y), (x_test, y_test) = digits()

    net = Net()
    sample = x_test[:8]
    print(quantize_(net, "1w-4u", sample=sample))
    train(net, x, y, steps)

    calibrate(net, [x[i : i + 64] for i in range(0, 512, 64)])
    predicted = predict(net, x_test)

    report = summarize(net, sample)
    print(report)
    report.to_csv(folder / "tutorial_snntorch.csv")

    program = deploy.save(net, folder / "tutorial_snntorch.qsnn", sample)
    # The program rounds its input. Given the same input, does it do what the model does?
    comparison = deploy.compare(net, program, [x_test], quantize_input=True)
    print(comparison)
    deployed = deploy.load(folder / "tutorial_snntorch.qsnn")
    spikes, _ = deployed(x_test.numpy())
    answers = torch.from_numpy(spikes).sum(0).argmax(1)

    result = {
        "trained": (predicted == y_test).float().mean().item(),
        "deployed": (answers == y_test).float().mean().item(),
        "agreement": comparison.predictions,
        "bytes": (folder / "tutorial_snntorch.qsnn").stat().st_size,
        "float_bytes": 4 * sum(p.numel() for p in net.parameters()),
    }
    print(result)
    return result


if __name__ == "__main__":
    main()
