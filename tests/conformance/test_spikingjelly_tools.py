"""SpikingJelly's tools run on models with our neurons and layers.

What a tool makes of the float model is the reference. Where a tool refuses our classes, the test
says so, because a refusal is what protects the user from a float model in place of his own.
"""

import copy
import importlib.util
import inspect
import pkgutil
import re
import sys
import types

import pytest
import torch
from torch import nn

sj = pytest.importorskip("spikingjelly.activation_based")
from spikingjelly.activation_based import (  # noqa: E402
    base,
    functional,
    layer,
    memopt,
    neuron,
    op_counter,
    surrogate,
)

from qsnn_ext.quantizers import BinaryWeight  # noqa: E402
from qsnn_ext.spikingjelly import (  # noqa: E402
    BinaryConv2d,
    BinaryLinear,
    QuantIFNode,
    QuantLIFNode,
    QuantLinear,
    QuantParametricLIFNode,
    Triangle,
)

T, N = 3, 2


def network(cls=QuantLIFNode, conv=BinaryConv2d, linear=QuantLinear, **options):
    """Two spiking layers in step mode "m"."""
    torch.manual_seed(0)
    net = nn.Sequential(
        conv(2, 4, 3, padding=1, bias=False),
        layer.BatchNorm2d(4),
        cls(**options),
        layer.Flatten(),
        linear(4 * 6 * 6, 5),
        cls(**options),
    )
    functional.set_step_mode(net, "m")
    return net


def float_network():
    return network(neuron.LIFNode, layer.Conv2d, layer.Linear)


@pytest.fixture
def spikes_in():
    generator = torch.Generator().manual_seed(1)
    return (torch.rand(T, N, 2, 6, 6, generator=generator) > 0.5).float()


# --------------------------------------------------------------------------- monitors

monitor = pytest.importorskip("spikingjelly.activation_based.monitor", exc_type=ImportError)


@pytest.mark.parametrize("instance", [QuantLIFNode, neuron.LIFNode, neuron.BaseNode])
def test_output_monitor_records_the_spikes(instance, spikes_in):
    net = network()
    with monitor.OutputMonitor(net, instance) as recorded:
        out = net(spikes_in)
    assert recorded.monitored_layers == ["2", "5"]
    assert torch.equal(recorded["5"][0], out)
    assert set(recorded["2"][0].unique().tolist()) <= {0.0, 1.0}


def test_input_monitor_records_the_current(spikes_in):
    net = network()
    with monitor.InputMonitor(net, QuantLIFNode) as recorded:
        net(spikes_in)
    functional.reset_net(net)
    assert torch.equal(recorded["2"][0], net[1](net[0](spikes_in)))


def test_attribute_monitor_records_the_quantized_potential(spikes_in):
    net = network().eval()  # batch norm in training takes its statistics over all time steps
    functional.set_step_mode(net, "s")
    with monitor.AttributeMonitor("v", False, net, QuantLIFNode) as recorded:
        for x in spikes_in:
            net(x)
    assert len(recorded["2"]) == T
    assert all(len(v.unique()) <= 3 for v in recorded["2"])
    functional.reset_net(net)
    functional.set_step_mode(net, "m")
    for module in (net[2], net[5]):
        module.store_v_seq = True
    with monitor.AttributeMonitor("v_seq", False, net, QuantLIFNode) as sequence:
        net(spikes_in)
    torch.testing.assert_close(sequence["5"][0][0], recorded["5"][0])


@pytest.mark.parametrize("name", ["GradInputMonitor", "GradOutputMonitor"])
def test_gradient_monitors(name, spikes_in):
    net = network()
    with getattr(monitor, name)(net, QuantLIFNode) as recorded:
        net(spikes_in).sum().backward()
    # Backward runs from the last layer to the first.
    assert [tuple(g.shape) for g in recorded.records] == [(T, N, 5), (T, N, 4, 6, 6)]
    if name == "GradOutputMonitor":
        assert torch.equal(recorded["5"][0], torch.ones(T, N, 5))
    assert all(torch.isfinite(g).all() for g in recorded.records)


# --------------------------------------------------------------------------- counters


def count(counter, net, x):
    with op_counter.DispatchCounterMode([counter]), torch.no_grad():
        net(x)
    return counter.get_counts()


@pytest.mark.parametrize("name", ["MACCounter", "SynOpCounter"])
def test_synaptic_counters_see_the_layers_operations(name, spikes_in):
    """Quantizing weights adds no multiplication and no synaptic operation of its own.

    Inputs are the same for both networks only at the first layer, so that layer is compared.
    """
    counts = []
    for net in (network(), float_network()):
        counted = count(getattr(op_counter, name)(), net, spikes_in)
        counts.append(sum(counted.get("Sequential.0", {}).values()))
    assert counts[0] == counts[1]
    if name == "SynOpCounter":
        assert counts[0] > 0


@pytest.mark.parametrize("name", ["FlopCounter", "ACCounter", "MemoryAccessCounter"])
def test_other_counters_run(name, spikes_in):
    counter = getattr(op_counter, name)()
    count(counter, network(), spikes_in)
    assert counter.get_total() > 0


def test_neuron_state_counter_sees_the_state(spikes_in):
    counter = op_counter.NeuronStateCounter(strict=True)
    count(counter, network(), spikes_in)
    metrics = counter.get_metric_counts()["Global"]
    assert metrics["state_reads"] > 0
    assert metrics["state_writes"] > 0


def test_simple_energy_equals_the_float_models_where_spikes_are_equal(spikes_in):
    """Same spikes in, so the first layer and all neuron states cost the same."""
    ours = op_counter.estimate_simple_energy(network(), spikes_in)
    theirs = op_counter.estimate_simple_energy(float_network(), spikes_in)
    assert ours.energy_total_pj > 0
    assert ours.warnings == theirs.warnings
    for key in ("mac", "bias_read_bytes", "neuron_state_read_bytes", "neuron_state_write_bytes"):
        assert ours.counts[key] == theirs.counts[key], key


def test_lemaire_energy_accepts_the_neurons_in_strict_mode(spikes_in):
    """It accepts ``LIFNode`` and ``IFNode`` only, and knows ours for such."""
    for cls in (QuantLIFNode, QuantIFNode):
        net = nn.Sequential(layer.Linear(12, 5), cls(step_mode="m"), layer.Linear(5, 2))
        functional.set_step_mode(net, "m")
        report = op_counter.estimate_lemaire_energy(net, spikes_in[:, :, 0, 0].repeat(1, 1, 2))
        assert report.total_pj > 0
        assert not report.warnings


def test_lemaire_energy_counts_quantized_layers_as_the_stock_layers():
    """With ``strict=False``: strict mode objects to any part it has no formula for.

    Here that is the layer's quantizer, which costs nothing: weights are quantized ahead of time.
    """
    x = (torch.rand(T, N, 12, generator=torch.Generator().manual_seed(1)) > 0.5).float()
    config = op_counter.LemaireEnergyConfig(strict=False)
    reports = []
    for linear in (BinaryLinear, layer.Linear):
        net = nn.Sequential(linear(12, 5), QuantLIFNode())
        functional.set_step_mode(net, "m")
        if linear is BinaryLinear:
            with pytest.raises(ValueError, match="BinaryWeight"):
                op_counter.estimate_lemaire_energy(net, x)
            with pytest.warns(RuntimeWarning, match="BinaryWeight"):
                reports.append(op_counter.estimate_lemaire_energy(net, x, config=config))
        else:
            reports.append(op_counter.estimate_lemaire_energy(net, x, config=config))
    for key in ("mac", "synop", "read_params_bytes", "read_in_bytes"):
        assert reports[0].counts[key] == reports[1].counts[key], key


# --------------------------------------------------------------------------- memory optimisation


def train_step(net, x):
    """Output and gradients of one step, and the running scales after it."""
    functional.reset_net(net)
    net.zero_grad()
    out = net(x)
    (out * torch.arange(1.0, out.shape[-1] + 1)).sum().backward()
    gradients = [p.grad.clone() for p in net.parameters()]
    scales = [b.clone() for name, b in net.named_buffers() if name.endswith("alpha")]
    return [out.detach(), *gradients, *scales]


@pytest.mark.parametrize("mode", ["dynamic", "frozen"])
@pytest.mark.parametrize("order", ["fire_first", "quantize_first"])
@pytest.mark.parametrize("compress", [False, True])
def test_memopt_changes_no_number(mode, order, compress, spikes_in):
    """Checkpointed neurons and layers give the same spikes, gradients and running scales."""
    plain = network(mode=mode, order=order)
    optimized = memopt.optimize_memory(
        network(mode=mode, order=order),
        targets=(neuron.BaseNode, nn.Conv2d, nn.Linear),
        example_forward=lambda net: net(spikes_in),
        level=1,
        compress=compress,
    )
    functional.reset_net(optimized)
    for _ in range(3):
        for ours, reference in zip(
            train_step(optimized, spikes_in), train_step(plain, spikes_in), strict=True
        ):
            assert torch.equal(ours, reference)
    if mode == "frozen":
        assert all(m.calibrated for m in optimized.modules() if hasattr(m, "calibrated"))


def test_memopt_chunks_over_time_carry_the_state(spikes_in):
    x = spikes_in.flatten(2)
    plain, chunked = (QuantLIFNode(step_mode="m", mode="frozen") for _ in range(2))
    chunked = memopt.checkpoint_module(chunked, chunks=3)
    results = []
    for node in (plain, chunked):
        inputs = x.clone().requires_grad_()
        out = node(inputs)
        out.sum().backward()
        results.append((out.detach(), inputs.grad))
    for ours, reference in zip(*results, strict=True):
        assert torch.equal(ours, reference)


# --------------------------------------------------------------------------- profilers


@pytest.mark.gpu
def test_profilers():
    if not torch.cuda.is_available():
        pytest.skip("the host's profilers measure CUDA only")
    from spikingjelly.activation_based import profiler

    net = network().cuda()
    with profiler.LayerWiseFPCUDATimeProfiler((net,), ("net",)) as timed:
        for _ in range(12):
            net(torch.rand(T, N, 2, 6, 6, device="cuda"))
            functional.reset_net(net)
        assert timed.export(output=False)


# --------------------------------------------------------------------------- registration


def test_neuron_config_builds_ours():
    vision = pytest.importorskip(
        "spikingjelly.activation_based.distributed.vision", exc_type=ImportError
    )
    from spikingjelly.activation_based.distributed.vision import config

    for cls in (QuantLIFNode, QuantIFNode, QuantParametricLIFNode):
        vision.register_neuron_class(cls)
    vision.register_surrogate_class(Triangle)
    declared = vision.NeuronConfig(
        class_path="qsnn_ext.spikingjelly.QuantLIFNode",
        kwargs={"bits": 4, "preset": "official", "order": "quantize_first", "tau": 2.0},
        surrogate="qsnn_ext.spikingjelly.Triangle",
        surrogate_kwargs={"beta": 0.5},
    )
    cls, kwargs = config._resolve_neuron_config(declared)
    node = cls(**kwargs)
    assert type(node) is QuantLIFNode
    assert (node.bits, node.order, node.membrane.squash) == (4, "quantize_first", "tanh")
    assert isinstance(node.surrogate_function, Triangle)


# --------------------------------------------------------------------------- exchange formats


@pytest.fixture
def lava(monkeypatch):
    """A second copy of the host's ``lava_exchange``, with its functions even without lava-dl.

    It defines them only where ``lava.lib.dl.slayer`` can be imported. What it accepts is decided
    before slayer is called, so an empty module is enough to ask.
    """
    from spikingjelly.activation_based import lava_exchange

    for name in ("lava", "lava.lib", "lava.lib.dl", "lava.lib.dl.slayer"):
        module = types.ModuleType(name)
        module.__path__ = []
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(
        sys.modules["lava.lib.dl"], "slayer", sys.modules["lava.lib.dl.slayer"], raising=False
    )
    monkeypatch.setattr(sys.modules["lava.lib"], "dl", sys.modules["lava.lib.dl"], raising=False)
    monkeypatch.setattr(sys.modules["lava"], "lib", sys.modules["lava.lib"], raising=False)
    spec = importlib.util.spec_from_file_location(
        f"{lava_exchange.__package__}._lava_exchange_copy", lava_exchange.__file__
    )
    copied = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copied)
    return copied


def test_lava_takes_the_neurons_for_lif_and_if(lava):
    """Its parameters are those of the float neuron: the quantized membrane is not carried over."""
    for cls in (QuantLIFNode, QuantIFNode):
        options = {"tau": 2.0, "decay_input": False} if cls is QuantLIFNode else {}
        ours = cls(**options, step_mode="m")
        theirs = cls.float_type()(**options, step_mode="m")
        to_dict = lava.to_lava_neuron_param_dict
        assert to_dict(ours) == to_dict(theirs)
        block = lava.BlockContainer(nn.Linear(3, 2, bias=False), ours, step_mode="m")
        reference = lava.BlockContainer(nn.Linear(3, 2, bias=False), theirs, step_mode="m")
        assert block.neuron.lava_cuba_neuron_params == reference.neuron.lava_cuba_neuron_params


@pytest.mark.parametrize(
    "net",
    [
        lambda: nn.Sequential(layer.Linear(4, 3), QuantLIFNode()),
        lambda: nn.Sequential(BinaryLinear(4, 3), neuron.LIFNode()),
    ],
    ids=["neuron", "layer"],
)
def test_nir_export_of_the_host_refuses_ours(net):
    """It looks classes up exactly, and so cannot write a float neuron or latent weights by mistake.

    Quantized models have an export of their own.
    """
    pytest.importorskip("nir")
    pytest.importorskip("nirtorch")
    from spikingjelly.activation_based import nir_exchange

    nir_exchange.export_to_nir(
        nn.Sequential(layer.Linear(4, 3), neuron.LIFNode()), torch.rand(2, 4)
    )
    with pytest.raises(KeyError, match=r"qsnn_ext\.spikingjelly"):
        nir_exchange.export_to_nir(net(), torch.rand(2, 4))


# --------------------------------------------------------------------------- fusion


def fuse(net):
    from spikingjelly.activation_based.functional import conv_bn_fusion

    return conv_bn_fusion.fuse_conv_bn_eval_modules(net)


def conv_bn_lif(conv):
    torch.manual_seed(0)
    net = nn.Sequential(conv(2, 4, 3, padding=1, bias=False), layer.BatchNorm2d(4), QuantLIFNode())
    functional.set_step_mode(net, "m")
    for _ in range(3):
        net(torch.rand(T, N, 2, 6, 6))
        functional.reset_net(net)
    return net.eval()


@pytest.mark.parametrize("conv", [layer.Conv2d, BinaryConv2d])
def test_fusion_of_convolution_and_batch_norm(conv, spikes_in):
    net = conv_bn_lif(conv)
    fused = fuse(copy.deepcopy(net))
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fused.modules())
    current, expected = fused.get_submodule("0")(spikes_in), net[1](net[0](spikes_in))
    torch.testing.assert_close(current, expected, rtol=1e-4, atol=1e-5)


def test_training_pack_of_conv_and_bn_keeps_results(spikes_in):
    from spikingjelly.activation_based.functional import conv_bn_fusion

    net = conv_bn_lif(BinaryConv2d).train()
    packed = conv_bn_fusion.pack_conv_bn_train_modules(copy.deepcopy(net))
    torch.testing.assert_close(packed(spikes_in), net(spikes_in))


# --------------------------------------------------------------------------- containers


def test_multi_step_container_equals_step_mode_m(spikes_in):
    plain = network()
    inner = [copy.deepcopy(m) for m in plain]
    for module in inner:
        functional.set_step_mode(module, "s")
    contained = layer.MultiStepContainer(*inner).eval()
    plain.eval()
    # Batch norm in eval mode, because in training its statistics are over time and batch.
    torch.testing.assert_close(contained(spikes_in), plain(spikes_in))
    functional.reset_net(contained)
    assert all(m.v == 0.0 for m in contained.modules() if isinstance(m, QuantLIFNode))


def test_seq_to_ann_container_equals_step_mode_m(spikes_in):
    conv = BinaryConv2d(2, 4, 3)
    twin = copy.deepcopy(conv)
    twin.step_mode = "m"
    assert torch.equal(layer.SeqToANNContainer(conv)(spikes_in), twin(spikes_in))


def test_step_mode_container(spikes_in):
    node = QuantLIFNode()
    container = layer.StepModeContainer(True, "m", node)
    expected = QuantLIFNode(step_mode="m")(spikes_in)
    assert torch.equal(container(spikes_in), expected)


def test_recurrent_containers(spikes_in):
    """The neuron's spikes are fed back; the state of both starts anew with ``reset_net``."""
    x = spikes_in.flatten(2)[..., :6]
    containers = [
        layer.ElementWiseRecurrentContainer(QuantLIFNode(), torch.add, step_mode="m"),
        layer.LinearRecurrentContainer(
            nn.Sequential(BinaryLinear(6, 4), QuantLIFNode()), 6, 4, step_mode="m"
        ),
    ]
    for container in containers:
        first = container(x)
        functional.reset_net(container)
        assert torch.equal(container(x), first)
        functional.reset_net(container)


def test_container_refuses_a_neuron_in_the_wrong_mode():
    with pytest.raises(ValueError, match="step_mode"):
        layer.MultiStepContainer(QuantLIFNode(step_mode="m"))


# --------------------------------------------------------------------------- zoo


def zoo_constructors():
    """Every public function of the zoo that takes ``spiking_neuron``, one of each family.

    Of networks that differ in depth alone (resnet18, resnet34, ...) only the first is built.
    """
    from spikingjelly.activation_based import model

    found = {}
    for info in pkgutil.iter_modules(model.__path__):
        try:
            module = importlib.import_module(f"{model.__name__}.{info.name}")
        except ImportError:
            continue
        for name, function in vars(module).items():
            if inspect.isfunction(function) and not name.startswith("_"):
                takes = "spiking_neuron" in inspect.signature(function).parameters
                if takes and function.__module__ == module.__name__:
                    family = re.sub(r"\d+", "", f"{info.name}.{name}")
                    found.setdefault(family, pytest.param(function, id=f"{info.name}.{name}"))
    return list(found.values())


@pytest.mark.parametrize("constructor", zoo_constructors())
def test_zoo_constructors_take_our_neuron(constructor):
    """Built without memory on the meta device: ours in every place, and the same checkpoint."""
    arguments = {"num_classes": 4}
    if "cnf" in inspect.signature(constructor).parameters:
        arguments["cnf"] = "ADD"
    nets = []
    for cls in (neuron.LIFNode, QuantLIFNode):
        try:
            with torch.device("meta"):
                nets.append(constructor(spiking_neuron=cls, **arguments))
        except Exception as error:
            if cls is QuantLIFNode:
                raise
            pytest.skip(f"not with the host's LIFNode either: {type(error).__name__}: {error}")
    theirs, ours = nets
    replaced = [type(m) for m in ours.modules() if isinstance(m, neuron.BaseNode)]
    expected = [type(m) for m in theirs.modules() if isinstance(m, neuron.BaseNode)]
    assert [QuantLIFNode if cls is neuron.LIFNode else cls for cls in expected] == replaced
    assert QuantLIFNode in replaced
    assert list(ours.state_dict()) == list(theirs.state_dict())


def test_zoo_model_trains_in_both_step_modes():
    from spikingjelly.activation_based.model import sew_resnet

    options = {"cnf": "ADD", "num_classes": 4, "surrogate_function": surrogate.ATan()}
    reference = sew_resnet.sew_resnet18(spiking_neuron=neuron.LIFNode, **options)
    torch.manual_seed(0)
    net = sew_resnet.sew_resnet18(
        spiking_neuron=QuantLIFNode, **options, detach_reset=True, bits=4, preset="official"
    )
    net.load_state_dict(reference.state_dict(), strict=True)
    functional.set_step_mode(net, "m")
    x = torch.rand(2, 2, 3, 32, 32)
    net(x).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in net.parameters())
    functional.reset_net(net)
    net.eval()
    with torch.no_grad():
        multi = net(x)
        functional.reset_net(net)
        functional.set_step_mode(net, "s")
        single = torch.stack([net(step) for step in x])
    torch.testing.assert_close(multi, single, rtol=1e-3, atol=1e-3)


# --------------------------------------------------------------------------- layers


@pytest.mark.parametrize("cls", [BinaryConv2d, layer.Conv2d])
def test_layers_are_stateless_members_of_the_host(cls, spikes_in):
    """The same questions asked of the host's own layer."""
    conv = cls(2, 4, 3, step_mode="m")
    assert isinstance(conv, layer.Conv2d)
    assert isinstance(conv, base.StepModule)
    steps = torch.stack([functional_step(conv, x) for x in spikes_in])
    torch.testing.assert_close(conv(spikes_in), steps)
    with pytest.raises(ValueError, match="x"):
        conv(spikes_in[0])
    assert "step_mode=m" in repr(conv)


def functional_step(conv, x):
    conv.step_mode = "s"
    out = conv(x)
    conv.step_mode = "m"
    return out


def test_host_initialisation_reaches_latent_weights():
    net = nn.Sequential(BinaryConv2d(2, 4, 3), BinaryLinear(4, 2))
    before = [p.detach().clone() for p in net.parameters()]
    functional.kaiming_normal_conv_linear_weight(net)
    assert not torch.equal(before[0], net[0].weight)
    assert isinstance(net[0].quantizer, BinaryWeight)
