"""What a newcomer does wrong is answered by what is wrong and what to do, before work starts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn

from qsnn_ext import (
    WSDRRegularizer,
    calibrate,
    deploy,
    load_checkpoint,
    quantize_,
    save_checkpoint,
    summarize,
)
from qsnn_ext.errors import (
    CheckpointError,
    ConfigError,
    FormatError,
    InputError,
    InputTypeError,
)

X = torch.rand(4, 2, 1, 8, 8, generator=torch.Generator().manual_seed(0))  # [T, N, C, H, W]


def network(mode: str = "m") -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        layer.Conv2d(1, 4, 3, padding=1, bias=False), neuron.LIFNode(),
        layer.Conv2d(4, 4, 3, padding=1, bias=False), neuron.LIFNode(),
        layer.Flatten(), layer.Linear(4 * 64, 10),
    )  # fmt: skip
    functional.set_step_mode(model, mode)
    quantize_(model, "1w-2u")
    return model.eval()


@pytest.fixture(scope="module")
def model() -> nn.Module:
    made = network()
    calibrate(made, [3 * X])
    return made


@pytest.fixture(scope="module")
def program(model):
    return deploy.lower(model, X)


@pytest.fixture
def file(program, tmp_path):
    deploy.save(program, tmp_path / "net.qsnn")
    return tmp_path / "net.qsnn"


def test_what_is_no_program_is_named_with_the_way_to_one(model, program, file, tmp_path):
    deployed = deploy.load(file)
    for wrong, remedy in (
        (str(file), r"got str; deploy\.load_program\(path\)"),
        (model, r"got Sequential; deploy\.lower\(model, sample\)"),
        (deployed, r"got DeployedModel; pass its \.program"),
        (3, "got int"),
    ):
        for call in (
            lambda p: deploy.export_c(p, tmp_path / "c", verbose=False),
            lambda p: deploy.compare(model, p, [X]),
            lambda p: deploy.pixel_table(p, 0.5, 0.5),
            lambda p: deploy.save_program(p, tmp_path / "again.qsnn"),
            deploy.resident_size,
            deploy.to_nir,
        ):
            with pytest.raises(InputTypeError, match=f"needs a program, {remedy}"):
                call(wrong)
        with pytest.raises(InputTypeError, match=f"DeployedModel needs a program, {remedy}"):
            deploy.DeployedModel(wrong)
    assert not (tmp_path / "c").exists()
    assert not (tmp_path / "again.qsnn").exists()


def test_what_is_no_path_is_named(model, program, file, tmp_path):
    with pytest.raises(InputTypeError, match=r"needs a path, got Program; .*DeployedModel"):
        deploy.load(program)
    with pytest.raises(InputTypeError, match=r"needs a path, got bytes; .*parse_program"):
        deploy.load(file.read_bytes())
    with pytest.raises(FormatError, match="cannot be read"):
        deploy.load("a\0b.qsnn")
    with pytest.raises(InputTypeError, match=r"save\(model, path, sample\): .* Tensor is no path"):
        deploy.save(model, X)
    with pytest.raises(InputTypeError, match=r"deploy\.save needs a module, got str"):
        deploy.save("net.qsnn", model)
    with pytest.raises(InputTypeError, match="load_checkpoint needs a path, got function"):
        load_checkpoint(network, "net.safetensors")
    with pytest.raises(InputTypeError, match="save_checkpoint needs a path, got Sequential"):
        save_checkpoint(model, model)


def test_files_of_torch_are_known(model, tmp_path):
    torch.save(model.state_dict(), tmp_path / "net.pt")
    with pytest.raises(FormatError, match=r"torch\.save writes"):
        deploy.load(tmp_path / "net.pt")
    with pytest.raises(CheckpointError, match=r"torch\.load.*load_state_dict"):
        load_checkpoint(tmp_path / "net.pt", network)


def test_a_function_that_builds_no_model_is_told_what_it_gave(model, tmp_path):
    save_checkpoint(model, tmp_path / "net.safetensors")
    with pytest.raises(InputTypeError, match="the function returned NoneType"):
        load_checkpoint(tmp_path / "net.safetensors", lambda: None)


@pytest.mark.parametrize("give", [
    lambda m, x: calibrate(m, [x]),
    lambda m, x: calibrate(m, [(x, torch.zeros(2))]),
    summarize,
    lambda m, x: summarize(m, (x,)),
])  # fmt: skip
def test_arrays_are_told_how_to_become_tensors(model, give):
    with pytest.raises(InputTypeError, match=r"NumPy array; torch\.as_tensor"):
        give(model, X.numpy())


def test_a_model_that_does_not_run_on_a_batch_keeps_its_error_with_a_hint(model):
    """A model called once per time step is given whole sequences, another one a dictionary."""
    with pytest.raises(RuntimeError, match=r"\[4, 2, 1, 8, 8\]") as caught:
        calibrate(network("s"), [X])
    assert "run on batch 1 " in caught.value.__notes__[0]
    assert "forward=" in caught.value.__notes__[0]
    with pytest.raises(AttributeError) as caught:
        calibrate(network(), [{"x": X}])
    assert "forward=" in caught.value.__notes__[0]


def test_a_model_that_takes_arrays_or_dictionaries_is_given_them():
    class FromArrays(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network()

        def forward(self, x):
            return self.inner(torch.as_tensor(x["x"] if isinstance(x, dict) else x))

    made = FromArrays()
    assert calibrate(made, [X.numpy(), {"x": X}])
    assert summarize(made, X.numpy()).total.firing_rate is not None


def test_compare_names_what_is_wrong_with_its_arguments(model, program):
    with pytest.raises(InputTypeError, match=r"compare needs a module, got Program"):
        deploy.compare(program, model, [X])
    with pytest.raises(InputTypeError, match=r"pass \[x\]"):
        deploy.compare(model, program, X)
    with pytest.raises(InputTypeError, match=r"compare: the input .* ndarray; give tensors"):
        deploy.compare(model, program, [X.numpy()])
    for labels in (torch.zeros(5), torch.zeros(2, 10)):
        with pytest.raises(InputError, match=r"labels of shape .* for 2 samples"):
            deploy.compare(model, program, [(X, labels)])


def test_export_into_a_file_is_refused(program, tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(ConfigError, match="taken could not be written"):
        deploy.export_c(program, tmp_path / "taken", verbose=False)


def test_booleans_are_told_what_to_become(program):
    with pytest.raises(InputTypeError, match=r"type bool; .*astype\(\"float32\"\)"):
        deploy.DeployedModel(program)(X.numpy() > 0.5)


@pytest.mark.parametrize("strength", [-1.0, float("nan"), float("inf")])
def test_strength_of_the_regularizer_is_a_weight(model, strength):
    with pytest.raises(ConfigError, match="strength="):
        WSDRRegularizer(model, strength=strength, exclude=None)


def test_calibration_on_silence_is_told():
    made = network()
    with pytest.warns(UserWarning, match=r"scale 0 .* nothing is carried: 1, 3;"):
        scales = calibrate(made, [torch.zeros_like(X)])
    assert scales == {"1": 0.0, "3": 0.0}
    assert np.isfinite(made(X).detach().numpy()).all()
