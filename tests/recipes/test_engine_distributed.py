"""Two processes on one CPU, started from the command line as a user does."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from qsnn_ext import WSDRRegularizer
from recipes import cifar10_resnet19
from recipes import data as datasets
from recipes.engine import checkpoints, networks, processes
from recipes.engine.cli import parse
from recipes.engine.loading import EpochSampler
from recipes.engine.run import train
from tests.processes import two_processes

ROOT = Path(__file__).resolve().parents[2]
COMMON_LINE = (
    "--data digits --size 8 --width 0.03125 --accelerator cpu --workers 0 --no-augment "
    "--no-progress --precision 64-true --epochs 1"
)
COMMON = COMMON_LINE.split()


def run(out, *options):
    """A run from the command line."""
    command = [sys.executable, "-m", "recipes.cifar10_resnet19", *COMMON, *options]
    done = subprocess.run([*command, "--out", str(out)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((out / "result.json").read_text())


def run_here(out, *options):
    """The same in this process."""
    return train(parse(cifar10_resnet19.config, [*COMMON, *options, "--out", str(out)]))


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    """2 x 8 samples train what 1 x 16 do, scales, batch statistics and rates included."""
    common = ("--membrane-mode", "frozen", "--strength", "0", "--limit-batches", "3")
    one = run_here(tmp_path / "one", "--batch", "16", *common)
    two = run(tmp_path / "two", "--batch", "8", "--devices", "2", *common)
    states = [
        checkpoints.read(tmp_path / name / "epoch-0001.ckpt")["state_dict"]
        for name in ("one", "two")
    ]
    assert states[0].keys() == states[1].keys()
    assert any(name.endswith("membrane.alpha") for name in states[0])
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-6, atol=1e-8, msg=name)
    ours, theirs = two["history"][0], one["history"][0]
    assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-6)
    assert ours["train_accuracy"] == theirs["train_accuracy"]
    assert ours["layer_rates"] == pytest.approx(theirs["layer_rates"], rel=1e-6)
    assert two["layer_entropies"] == pytest.approx(one["layer_entropies"], rel=1e-6)


@pytest.mark.slow
def test_the_loss_term_is_the_mean_over_processes(tmp_path):
    line = "--bits 32w-32u --spike-regulation true --strength 1 --no-sync-batchnorm"
    options = line.split()
    options += ["--batch", "8", "--limit-batches", "1"]
    two = run(tmp_path / "run", "--devices", "2", *options)
    config = parse(cifar10_resnet19.config, [*COMMON, *options])
    torch.manual_seed(config.seed)
    model = networks.build(config, datasets.spec("digits", size=8)).double()
    regularizer = WSDRRegularizer(model, strength=1.0)
    train = datasets.datasets("digits", size=8, augment=False)[0]
    terms = []
    for rank in (0, 1):
        draws = list(EpochSampler(len(train), config.seed, True, rank, 2))[:8]
        model(torch.stack([train[d.index][0] for d in draws]).double())
        terms.append(regularizer().item())
    assert terms[0] != terms[1]
    assert two["history"][0]["regularization"] == pytest.approx(sum(terms) / 2, rel=1e-9)


def _synced(rank, folder, share, results):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.set_num_threads(1)
    norm = nn.BatchNorm2d(3).double()
    norm = processes.sync_batchnorm(nn.Sequential(norm), torch.device("cpu"))
    x = share[rank].clone().requires_grad_()
    y = norm(x)
    y.pow(3).sum().backward()
    grads = [p.grad.clone() for p in norm.parameters()]
    for grad in grads:
        dist.all_reduce(grad)
    results[rank] = [y.detach(), x.grad, *grads, norm[0].running_mean, norm[0].running_var]
    dist.destroy_process_group()


@pytest.mark.slow
def test_cpu_batch_norm_over_processes_equals_that_of_the_whole_batch(tmp_path):
    torch.manual_seed(0)
    whole = torch.randn(7, 3, 2, 2, dtype=torch.float64) * 3 + 1
    shares = [whole[:4], whole[4:]]  # unequal on purpose
    results = two_processes(_synced, tmp_path, shares)
    first, second = results[0], results[1]
    norm = nn.BatchNorm2d(3).double()
    x = whole.clone().requires_grad_()
    y = norm(x)
    y.pow(3).sum().backward()
    torch.testing.assert_close(torch.cat([first[0], second[0]]), y)
    torch.testing.assert_close(torch.cat([first[1], second[1]]), x.grad)
    expected = [norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var]
    for values in (first, second):
        for value, whole_value in zip(values[2:], expected, strict=True):
            torch.testing.assert_close(value, whole_value)
