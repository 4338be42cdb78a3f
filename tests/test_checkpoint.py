"""Checkpoints: everything comes back from the float constructor; damage and mismatch are told."""

import json

import pytest
import safetensors.torch
import snntorch as snn
import torch
from safetensors import safe_open
from snntorch import utils
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn

from qsnn_ext import (
    MembraneConfig,
    MembraneQuantizer,
    QuantConfig,
    QuantLIFNode,
    Rule,
    calibrate,
    conversion_report,
    fold_batchnorm_,
    load_checkpoint,
    quantize_,
    save_checkpoint,
)
from qsnn_ext.errors import CheckpointError, InputTypeError


def float_net(width=4):
    net = nn.Sequential(
        layer.Conv2d(1, width, 3, bias=False),
        layer.BatchNorm2d(width),
        neuron.LIFNode(),
        layer.Flatten(),
        layer.Linear(width * 36, 8),
        neuron.ParametricLIFNode(),
        layer.Linear(8, 3),
    )
    functional.set_step_mode(net, "m")
    return net


def frames():
    return torch.rand(3, 2, 1, 8, 8) * 3


def run(net, x):
    functional.reset_net(net)
    return net(x)


def trained(config):
    net, x = float_net(), frames()
    quantize_(net, config)
    run(net, x).sum().backward()
    torch.optim.SGD(net.parameters(), lr=0.1).step()
    return net.eval()


@pytest.mark.parametrize(
    "config",
    [
        "1w-2u",
        "official",
        "4w-32u",
        "32w-4u",
        QuantConfig(rules=(Rule.keep("4"), Rule(name="2", membrane=8))),
        QuantConfig(membrane=MembraneConfig(2, mode="frozen", order="quantize_first")),
    ],
    ids=["1w-2u", "official", "4w-32u", "32w-4u", "rules", "frozen"],
)
def test_the_float_constructor_is_enough_to_rebuild(config, tmp_path):
    net = trained(config)
    save_checkpoint(net, tmp_path / "net.safetensors")
    loaded = load_checkpoint(tmp_path / "net.safetensors", float_net).eval()
    assert [type(m) for m in loaded.modules()] == [type(m) for m in net.modules()]
    x = frames()
    assert torch.equal(run(loaded, x), run(net, x))
    report = conversion_report(loaded)
    assert report == conversion_report(net)
    assert report.config == QuantConfig.parse(config)


def test_frozen_scales_and_step_order_are_inside(tmp_path):
    net = trained(QuantConfig(membrane=MembraneConfig(2, order="quantize_first")))
    scales = calibrate(net, [frames()])
    save_checkpoint(net, tmp_path / "net.st")
    loaded = load_checkpoint(tmp_path / "net.st", float_net).eval()
    assert loaded[2].membrane.mode == "frozen"
    assert loaded[2].membrane.alpha.item() == pytest.approx(scales["2"])
    assert loaded[2].order == "quantize_first"
    x = frames()
    assert torch.equal(run(loaded, x), run(net, x))


def test_folded_models_come_back_folded(tmp_path):
    net, x = trained("1w-2u"), frames()
    assert fold_batchnorm_(net).folded == (("0", "1"),)
    save_checkpoint(net, tmp_path / "net.st")
    loaded = load_checkpoint(tmp_path / "net.st", float_net).eval()
    assert torch.equal(loaded[0].output_scale, net[0].output_scale)
    assert torch.equal(run(loaded, x), run(net, x))


def test_folded_float_models_come_back_folded(tmp_path):
    net, x = float_net().eval(), frames()
    fold_batchnorm_(net)
    save_checkpoint(net, tmp_path / "net.st")
    loaded = load_checkpoint(tmp_path / "net.st", float_net).eval()
    assert torch.equal(run(loaded, x), run(net, x))


def test_hand_built_models_and_existing_models_work_too(tmp_path):
    net = float_net()
    net[2] = QuantLIFNode(bits=4, step_mode="m")
    save_checkpoint(net, tmp_path / "net.st")
    target = float_net()
    assert load_checkpoint(tmp_path / "net.st", target) is target
    assert target[2].bits == 4
    assert type(target[5]) is neuron.ParametricLIFNode
    # The other way round: what is quantized too much becomes float again.
    save_checkpoint(float_net(), tmp_path / "float.st")
    load_checkpoint(tmp_path / "float.st", target)
    assert type(target[2]) is neuron.LIFNode


def test_snntorch_models(tmp_path):
    def build():
        return nn.Sequential(
            nn.Linear(3, 4), snn.Leaky(beta=0.5, init_hidden=True), nn.Linear(4, 2)
        )

    net = build()
    quantize_(net, "1w-2u")
    save_checkpoint(net, tmp_path / "net.st")
    loaded = load_checkpoint(tmp_path / "net.st", build)
    x = torch.rand(2, 3)
    assert torch.equal(loaded(x), net(x))


def test_calibrated_scales_of_second_states_are_inside(tmp_path):
    def network():
        return nn.Sequential(
            nn.Linear(4, 6), snn.Synaptic(0.9, 0.8, init_hidden=True), nn.Linear(6, 2),
            snn.Synaptic(0.9, 0.8, init_hidden=True),
        )  # fmt: skip

    net, batches = network(), [torch.rand(3, 4) * 4 for _ in range(3)]
    quantize_(net, "1w-4u")
    calibrate(net, batches)
    save_checkpoint(net, tmp_path / "net.safetensors")
    again = load_checkpoint(tmp_path / "net.safetensors", network)
    for name in (1, 3):
        for ours, theirs in zip(
            again[name].carried.values(), net[name].carried.values(), strict=True
        ):
            assert ours.alpha.item() == theirs.alpha.item() > 0
            assert ours.mode == "frozen"


def test_tied_weights_are_stored_once_and_stay_tied(tmp_path):
    def build():
        net = nn.Sequential(*(nn.Linear(50, 50, bias=False) for _ in range(4)))
        net[2].weight = net[1].weight
        return net

    net = build()
    quantize_(net, "1w-2u")
    save_checkpoint(net, tmp_path / "net.st")
    assert (tmp_path / "net.st").stat().st_size < 3.5 * 50 * 50 * 4
    loaded = load_checkpoint(tmp_path / "net.st", build)
    assert loaded[2].weight is loaded[1].weight
    assert torch.equal(loaded[1].weight, net[1].weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_are_kept(tmp_path, dtype):
    net = nn.Linear(3, 3).to(dtype)
    quantize_(net, "1w-2u")
    save_checkpoint(net, tmp_path / "net.st")
    loaded = load_checkpoint(tmp_path / "net.st", lambda: nn.Linear(3, 3).to(dtype))
    assert torch.equal(loaded.weight, net.weight)


# --------------------------------------------------------------------------- damage and mismatch


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "net.st"
    save_checkpoint(trained("1w-2u"), path)
    return path


def test_damage_anywhere_in_the_file_is_found(saved):
    whole = saved.read_bytes()
    for position in [*range(0, len(whole), max(1, len(whole) // 60)), len(whole) - 1]:
        damaged = bytearray(whole)
        damaged[position] ^= 0x10
        saved.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"net\.st"):
            load_checkpoint(saved, float_net)


@pytest.mark.parametrize("length", [0, 3, 8, 100, -1])
def test_cut_off_files_are_found(saved, length):
    saved.write_bytes(saved.read_bytes()[:length])
    with pytest.raises(CheckpointError, match="damaged"):
        load_checkpoint(saved, float_net)


def test_other_architectures_are_told_and_the_model_given_is_untouched(saved):
    target = float_net(width=5)
    before = target[4].weight.clone()
    with pytest.raises(CheckpointError, match=r"'0\.weight' has shape \(5, 1, 3, 3\)"):
        load_checkpoint(saved, target)
    assert type(target[0]) is layer.Conv2d
    assert torch.equal(target[4].weight, before)
    with pytest.raises(CheckpointError, match="the model has no module '6'"):
        load_checkpoint(saved, lambda: float_net()[:6])
    with pytest.raises(CheckpointError, match=r"the file has no '7\.weight'"):
        load_checkpoint(saved, lambda: float_net().append(nn.Linear(3, 3)))

    def other_neuron():
        net = float_net()
        net[2] = neuron.IFNode(step_mode="m")
        return net

    with pytest.raises(CheckpointError, match=r"IFNode and not a .*LIFNode"):
        load_checkpoint(saved, other_neuron)


def test_other_files_are_told(tmp_path):
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        load_checkpoint(tmp_path / "none.st", float_net)
    safetensors.torch.save_file({"a": torch.ones(2)}, tmp_path / "plain.st")
    with pytest.raises(CheckpointError, match=r"not written by qsnn_ext\.save_checkpoint"):
        load_checkpoint(tmp_path / "plain.st", float_net)
    with pytest.raises(CheckpointError, match="damaged or no safetensors"):
        load_checkpoint(tmp_path, float_net)


def test_files_of_a_newer_version_are_told(saved, monkeypatch):
    monkeypatch.setattr("qsnn_ext.checkpoint.SCHEMA", 0)
    with pytest.raises(CheckpointError, match="schema 1"):
        load_checkpoint(saved, float_net)


def test_the_header_is_readable_without_this_package(saved):
    with safe_open(saved, "pt") as file:
        header = json.loads(file.metadata()["qsnn_ext"])
    assert header["quantized"]["2"]["options"]["bits"] == 2
    assert header["report"]["config"]["weight"]["bits"] == 1


def test_a_failed_save_leaves_the_old_file_and_no_scrap(saved, monkeypatch):
    whole = saved.read_bytes()

    def fail(descriptor):
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(CheckpointError, match="disk full"):
        save_checkpoint(float_net(), saved)
    assert saved.read_bytes() == whole
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]


def test_state_that_is_no_tensor_is_refused(tmp_path):
    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"a": 1}

    with pytest.raises(CheckpointError, match="_extra_state"):
        save_checkpoint(Extra(2, 2), tmp_path / "net.st")
    with torch.device("meta"):
        net = nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match="meta device"):
        save_checkpoint(net, tmp_path / "net.st")


def test_neurons_it_could_not_rebuild_are_refused(tmp_path):
    class Derived(QuantLIFNode):
        pass

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.membrane = MembraneQuantizer(2)

    for neuron_type in (Derived, Own):
        with pytest.raises(CheckpointError, match=f"'1' .* rebuild a {neuron_type.__name__}"):
            save_checkpoint(nn.Sequential(nn.Identity(), neuron_type()), tmp_path / "net.st")
    assert not list(tmp_path.iterdir())


def test_only_modules_are_saved_and_loaded(saved):
    with pytest.raises(InputTypeError):
        save_checkpoint("net", saved)
    with pytest.raises(InputTypeError):
        load_checkpoint(saved, "net")
    with pytest.raises(InputTypeError):
        load_checkpoint(saved, lambda: 3)


FURTHER_STATES = {
    "Synaptic": (lambda: snn.Synaptic(0.9, 0.8, init_hidden=True), "syn"),
    "SLSTM": (lambda: snn.SLSTM(8, 8, init_hidden=True), "syn"),
    "CUBALIFNode": (lambda: neuron.CUBALIFNode(), "c"),
}


@pytest.mark.parametrize("kind", FURTHER_STATES)
@pytest.mark.parametrize("quantized_before", [False, True])
def test_frozen_scales_of_further_states_come_back(tmp_path, kind, quantized_before):
    make, state = FURTHER_STATES[kind]

    def build():
        net = nn.Sequential(nn.Linear(4, 8), make(), nn.Linear(8, 2)).eval()
        if quantized_before:
            quantize_(net, "8w-4u")
        return net

    def steps(net, x):
        functional.reset_net(net)
        utils.reset(net)
        return torch.stack([net(step) for step in x])

    net, x = build(), torch.rand(4, 2, 4) * 5
    quantize_(net, "8w-4u")
    scales = calibrate(net, [x], forward=steps)
    assert set(scales) == {"1", f"1.carried.{state}"}
    save_checkpoint(net, tmp_path / "net.safetensors")
    restored = load_checkpoint(tmp_path / "net.safetensors", build).eval()
    assert restored[1].carried[state].alpha == net[1].carried[state].alpha
    assert torch.equal(steps(restored, x), steps(net, x))
