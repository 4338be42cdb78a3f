"""snnTorch: its neurons with quantized states.

The only file that imports snnTorch.
"""

from __future__ import annotations

import functools
import weakref
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from qsnn_ext import functional as F
from qsnn_ext import hosts, kernels
from qsnn_ext.counterparts import QuantizedNeuron, held, kind_of, rounder
from qsnn_ext.errors import ConfigError, InputError, InputTypeError
from qsnn_ext.neuron import Charge, Drive, Feedback, Filter, Link, NeuronModel, State
from qsnn_ext.quantizers import MembraneQuantizer

try:
    import snntorch as snn
except ImportError as error:
    raise hosts.missing("snntorch", error) from error


#: What makes closures whose derivative has a closed form: its kind, names in the closure or the
#: number itself.
_DERIVATIVES: dict[str, tuple[str, tuple[str | float, ...]]] = {
    "atan": ("atan", ("alpha",)),
    "fast_sigmoid": ("fast_sigmoid", ("slope",)),
    # The host's exp overflows to NaN far below the threshold; this form gives the limit, 0.
    "sigmoid": ("sigmoid", ("slope",)),
    "straight_through_estimator": ("straight_through", ()),
    "heaviside": ("slope_above", (1.0, 0.0)),
    "LSO": ("slope_above", (1.0, "slope")),
    "spike_rate_escape": ("rate_escape", ("beta", "slope")),
}


def _closed_form(fire: Any) -> kernels.Surrogate | None:
    """The closed form of a surrogate of the host, or of ours."""
    if type(fire) is Triangle:
        return kernels.Surrogate.of("triangle", [fire.beta], strict=True)
    if not isinstance(fire, FunctionType) or fire.__module__ != "snntorch.surrogate":
        return None
    maker = fire.__qualname__.partition(".")[0]
    if maker not in _DERIVATIVES:
        return None
    kind, entries = _DERIVATIVES[maker]
    cells = dict(zip(fire.__code__.co_freevars, fire.__closure__ or (), strict=True))
    numbers = [cells[e].cell_contents if isinstance(e, str) else e for e in entries]
    return kernels.Surrogate.of(kind, numbers, strict=True)


kernels.RECOGNIZERS.append(_closed_form)

_RESETS: dict[str, F.Reset] = {"subtract": "soft", "zero": "hard", "none": "none"}


class Triangle:
    """The paper's surrogate (Eq. 5) in snnTorch's convention: fires at ``u > theta``.

    Pass it as ``spike_grad``. Gradient ``max(0, beta - |u - theta|)``.

    Args:
        beta: half-width and height of the triangle; positive.

    Raises:
        ConfigError: ``beta`` is not positive.
    """

    def __init__(self, beta: float = 1.0) -> None:
        self.beta = F.check_beta(beta)

    def __call__(self, x: Tensor) -> Tensor:
        """Spikes for ``x = u - theta``, like ``x``."""
        return F.triangle(x, self.beta, strict=True)


class QuantizedSpikingNeuron(QuantizedNeuron):
    """Mixin over a neuron of snnTorch: what it carries is rounded.

    Every argument and calling style of the neuron works and returns what the neuron returns.
    Without a quantizer (``bits=None`` or 32) the host's own code runs, bit for bit.

    What is quantized is the membrane potential *after* reset, ``v``. By default the host stores the
    potential *before* reset and decides the next step's reset from it, so a stored value rounded
    across the threshold would lose or invent a reset. Here the stored value is
    :func:`qsnn_ext.functional.delayed_state`: ``Q(v)`` plus the threshold where the neuron fired
    (subtract and zero reset), always on the side of the threshold that the spike was on. With
    ``reset_delay=False`` the reset is in the step, and none is made at the start of the next.

    A step whose charge is affine is one operation. Any other neuron runs the host's own step, after
    which its states are rounded, each with a scale of its own.

    Takes the arguments of the neuron, then those of
    :class:`~qsnn_ext.counterparts.QuantizedNeuron`.

    Raises:
        ConfigError: unknown bits, preset or option, or ``state_quant`` together with ``bits``.
    """

    prefix = "Q"
    rounds_charges = True
    mem: Tensor
    spike_grad: Any
    threshold: Tensor
    reset_mechanism: str
    init_hidden: bool
    output: bool
    state_function: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        before = len(snn.SpikingNeuron.instances)
        try:
            super().__init__(*args, **kwargs)
        except BaseException:
            # The host's constructor puts every neuron on its global list.
            del snn.SpikingNeuron.instances[before:]
            raise

    def forward(self, input_: Tensor, *states: Any, **kwargs: Any) -> Any:
        """One time step, as the host's.

        Args:
            input_: input current ``[N, ...]``, floating point.
            states: of the step before, as the host takes them; only without ``init_hidden``.
            kwargs: the same by name.

        Returns:
            Spikes, or spikes and states, as the host returns them.

        Raises:
            InputTypeError: ``input_`` is not floating point, or states beside ``init_hidden``.
        """
        if self.membrane is None:
            return super().forward(input_, *states, **kwargs)  # type: ignore[misc]
        F.check_floating(input_, type(self).__name__)
        given = (*states, *kwargs.values())
        if self.init_hidden and any(s is not None for s in given):
            raise InputTypeError(
                "pass no states to a neuron with init_hidden=True: it keeps its own."
            )
        model = ADAPTER.describe(self)
        assert model is not None
        if model.charge is not None and len(given) <= 1:
            return self._affine_step(input_, given[0] if given else None, model)
        return self._host_step(input_, states, kwargs, model)

    def _affine_step(self, input_: Tensor, mem: Tensor | None, model: NeuronModel) -> Any:
        """A step with an affine charge, as one operation."""
        if mem is not None:
            self.mem = mem
        if self.mem.shape != input_.shape:
            self.mem = torch.zeros_like(input_)
        emitted, carried, computed = self._dtypes(input_)
        spikes, after = kernels.run_layer(
            input_.to(computed).unsqueeze(0), self.mem.to(computed), model
        )
        self.mem = self._narrowed(after, carried, model)
        spk = spikes[0] if emitted == computed else spikes[0].to(emitted)
        if not _is_one(model.graded):
            spk = spk * model.graded
        return spk if self.init_hidden and not self.output else (spk, self.mem)

    def _host_step(
        self, input_: Tensor, states: tuple[Any, ...], kwargs: dict[str, Any], model: NeuronModel
    ) -> Any:
        """The host's own step, and every state it leaves rounded."""
        emitted, carried, computed = self._dtypes(input_)
        if any(not isinstance(m, MembraneQuantizer | nn.ModuleDict) for m in self.children()):  # type: ignore[attr-defined]
            computed = input_.dtype  # layers of its own compute in the dtype of their weights
        narrow = computed != input_.dtype
        if narrow:
            input_, states, kwargs = _cast((input_, states, kwargs), computed)
            for state in model.states:
                setattr(self, state.name, _cast(getattr(self, state.name), computed))
        if model.order == "quantize_first":
            returned = self._rounding_charges(input_, states, kwargs, model)
        else:
            returned = super().forward(input_, *states, **kwargs)  # type: ignore[misc]
        replaced: dict[int, Tensor] = {}
        for state in model.states:
            left = getattr(self, state.name, None)
            if not isinstance(left, Tensor) or not left.is_floating_point():
                continue
            value = left
            if state.quantizer is not None and model.order == "fire_first":
                if state.name == model.potential and model.delayed:
                    assert model.threshold is not None
                    quantize = kernels.rounding(state.quantizer, delayed=True)
                    fired = self.mem_reset(left)
                    value = F.delayed_state(left, fired, model.threshold, model.reset, quantize)
                else:
                    value = rounder(state.quantizer)(left)
            if narrow and state.name == model.potential:
                value = self._narrowed(value, carried, model)
            elif narrow:
                value = value.to(carried)
            replaced[id(left)] = value
            setattr(self, state.name, value)
        returned = _replaced(returned, replaced)
        return _cast(returned, emitted, only_first=True) if narrow else returned

    def _rounding_charges(
        self, input_: Tensor, states: tuple[Any, ...], kwargs: dict[str, Any], model: NeuronModel
    ) -> Any:
        """The host's step in Algorithm 1's order: its charges are rounded before it fires."""
        charge = self.state_function
        names = [s.name for s in model.states]
        quantizers = {s.name: s.quantizer for s in model.states}

        called = False

        def rounded(x: Tensor) -> Any:
            nonlocal called
            called = True
            charges = charge(x)
            several = isinstance(charges, tuple)
            values = [
                value if (q := quantizers[name]) is None else rounder(q)(value)
                for name, value in zip(names, charges if several else (charges,), strict=True)
            ]
            return tuple(values) if several else values[0]

        self.state_function = rounded
        try:
            returned = super().forward(input_, *states, **kwargs)  # type: ignore[misc]
        finally:
            self.state_function = charge
        if not called:
            raise ConfigError(
                f"a {type(self).__name__} charges and fires in one piece, and cannot round between "
                "the two; use order='fire_first'."
            )
        return returned

    def mem_reset(self, mem: Tensor) -> Tensor:
        """The host's: which neurons are above the threshold, and due for a reset.

        With the reset in the step none is due at the start of the next: what fired has been reset,
        and a state above the threshold may just have been rounded there.
        """
        if self.membrane is not None and not getattr(self, "reset_delay", True):
            return torch.zeros_like(mem)
        due: Tensor = super().mem_reset(mem)  # type: ignore[misc]
        return due

    def _dtypes(self, input_: Tensor) -> tuple[torch.dtype, torch.dtype, torch.dtype]:
        """Of spikes and of states, as the host returns them, and of the computation."""
        if input_.dtype == torch.float32:
            return input_.dtype, input_.dtype, input_.dtype
        with torch.no_grad():  # the host's own surrogates return float32 whatever they are given
            emitted = self.spike_grad(input_.new_zeros(1)).dtype
        half = input_.dtype in (torch.float16, torch.bfloat16)
        carried = torch.promote_types(input_.dtype, emitted)
        return emitted, carried, torch.float32 if half else input_.dtype

    def _narrowed(self, mem: Tensor, dtype: torch.dtype, model: NeuronModel) -> Tensor:
        """A potential in the dtype that is carried, on its side of the threshold."""
        stored = mem.to(dtype)
        if stored.dtype == mem.dtype or not model.delayed or model.reset == "none":
            return stored
        with torch.no_grad():
            below, above = _around(self.threshold.float(), dtype)
            sided = torch.where(mem > self.threshold, above.maximum(stored), stored)
            sided = torch.where(mem <= self.threshold, below.minimum(sided), sided)
        return F.straight_through(stored, sided)

    def extra_repr(self) -> str:
        """Bits and step order, for ``print(model)``."""
        return f"bits={self.bits}, order={self.order!r}"


class QLeaky(QuantizedSpikingNeuron, snn.Leaky):  # type: ignore[misc]
    """snnTorch's ``Leaky`` with a k-bit membrane potential (Eq. 10 to 12).

    Takes all arguments of ``Leaky``, then those of :class:`QuantizedSpikingNeuron`.
    """


#: Every other neuron has its class made, which takes the neuron's arguments and then those of
#: :class:`QuantizedSpikingNeuron`. These have names to build with.
QLapicque = QuantizedSpikingNeuron.over(snn.Lapicque)
QSynaptic = QuantizedSpikingNeuron.over(snn.Synaptic)
QAlpha = QuantizedSpikingNeuron.over(snn.Alpha)
QRLeaky = QuantizedSpikingNeuron.over(snn.RLeaky)
QRSynaptic = QuantizedSpikingNeuron.over(snn.RSynaptic)
QSLSTM = QuantizedSpikingNeuron.over(snn.SLSTM)
QSConv2dLSTM = QuantizedSpikingNeuron.over(snn.SConv2dLSTM)


def _around(theta: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The numbers of half precision nearest to ``theta``: not above it, and above it."""
    near = theta.to(dtype)
    infinity = torch.full_like(near, torch.inf)
    is_above = near.float() > theta
    below = torch.where(is_above, torch.nextafter(near, -infinity), near)
    return below, torch.where(is_above, near, torch.nextafter(near, infinity))


def _is_one(factor: float | Tensor) -> bool:
    """Whether spikes need no factor; where to ask would wait for a device they get it."""
    if not isinstance(factor, Tensor):
        return factor == 1.0
    if factor.requires_grad or factor.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return not torch._C._is_tracing() and bool((factor == 1).all())


def _cast(value: Any, dtype: torch.dtype, only_first: bool = False) -> Any:
    """Tensors in it as ``dtype``, or only the first of a tuple."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {k: _cast(v, dtype) for k, v in value.items()}
    if isinstance(value, tuple):
        if only_first:
            return (_cast(value[0], dtype), *value[1:])
        return tuple(_cast(v, dtype) for v in value)
    return value


def _replaced(value: Any, by: dict[int, Tensor]) -> Any:
    """What a step returned, with the states in it exchanged."""
    if isinstance(value, tuple):
        return tuple(_replaced(v, by) for v in value)
    return by.get(id(value), value)


#: Neurons whose computation is known.
_KNOWN = (
    snn.Leaky, snn.Lapicque, snn.Synaptic, snn.Alpha, snn.RLeaky, snn.RSynaptic, snn.SLSTM,
    snn.SConv2dLSTM,
)  # fmt: skip

#: What neurons call the states they carry, the membrane potential last.
_STATES = ("syn", "syn_exc", "syn_inh", "mem")


class _SnnTorch(hosts.Adapter):
    """See :class:`qsnn_ext.hosts.Adapter`."""

    helpers = ("snntorch._neurons",)

    def describe(self, module: Any) -> NeuronModel | None:
        """A neuron of snnTorch, spiking or not."""
        cls = type(module)
        if not isinstance(module, snn.SpikingNeuron) and not cls.__module__.startswith(
            "snntorch._neurons."
        ):
            return None
        states = tuple(State(name, held(module, name, "mem")) for name in _state_names(module))
        spiking = isinstance(module, snn.SpikingNeuron)
        difference = isinstance(module, snn.DeltaLeaky)  # fires on it, and is never reset
        reset = _RESETS["none" if difference else getattr(module, "reset_mechanism", "none")]
        delayed, recurrent = getattr(module, "reset_delay", True), hasattr(module, "recurrent")
        return NeuronModel(
            kind=(kind_of(cls, _KNOWN) or cls).__name__,
            states=states,
            potential="mem",
            passed=(*["spk"] * recurrent, *(s.name for s in states)),
            charge=_charge(module),
            own_drive=functools.partial(_drive, module),
            spiking=spiking,
            threshold=getattr(module, "threshold", None),
            fire=getattr(module, "spike_grad", None),
            reset=reset,
            delayed=delayed,
            resets_again=not delayed and getattr(module, "membrane", None) is None,
            order=getattr(module, "order", "fire_first"),
            graded=getattr(module, "graded_spikes_factor", 1.0),
            recurrent=recurrent,
            stateless="it computes all time steps at once, and carries no potential",
            readout=reset == "none" and isinstance(module, snn.LIF) and not difference,
            obstacle=(
                "its own state_quant and bits would both quantize its states; drop state_quant, "
                "or pass bits=None"
                if getattr(module, "state_quant", False)
                else None
            ),
            no_integers=_no_integers(module),
        )

    def link(self, module: nn.Module) -> Link | None:
        """:class:`OverTime`, which runs the neuron it holds."""
        return Link(neuron="neuron") if type(module) is OverTime else None

    def over_time(self, module: nn.Module) -> bool:
        """:class:`OverTime` alone."""
        return type(module) is OverTime

    def counterpart(self, float_type: type[nn.Module]) -> type[Any] | None:
        """Any spiking neuron of the host."""
        if issubclass(float_type, snn.SpikingNeuron):
            return QuantizedSpikingNeuron.over(float_type)
        return None

    def starts_sequence(self, module: nn.Module, x: Tensor | None, left: Tensor | None) -> bool:
        """Whether the neuron's own state was replaced since the last call, or has another shape."""
        mem = self.state(module)
        return mem is None or mem is not left or (x is not None and mem.shape != x.shape)

    def reset(self, model: nn.Module) -> None:
        """Put the states that the neurons in ``model`` keep back to zero.

        Only those of ``model``, unlike ``utils.reset``. The host keeps states, and nothing else, in
        non-persistent buffers.
        """
        for module in model.modules():
            if isinstance(module, snn.SpikingNeuron):
                for name in module._non_persistent_buffers_set:
                    value = getattr(module, name)
                    if isinstance(value, Tensor):
                        setattr(module, name, torch.zeros_like(value))

    def adopt(self, model: nn.Module, copied: bool) -> None:
        """Put copied neurons on the host's list, so that ``utils.reset`` finds them.

        The list holds its neurons for ever; it gets weak proxies of these, which leave it when the
        copy dies, so that copying a model many times costs nothing.
        """
        instances = snn.SpikingNeuron.instances
        for module in model.modules() if copied else ():
            if isinstance(module, snn.SpikingNeuron):
                proxy = weakref.proxy(module)
                instances.append(proxy)
                weakref.finalize(module, _discard, instances, id(proxy))

    def restart(self, module: nn.Module) -> None:
        """Nothing to do: :class:`OverTime` starts every sequence from zero."""

    def paper_neuron(self, bits: int | None, preset: str = "paper", **options: Any) -> nn.Module:
        """See :func:`paper_neuron`."""
        return paper_neuron(bits, preset, **options)


def _charge(module: Any) -> Charge | None:
    """The charge of a neuron where it is affine and resets as the fused operation does."""
    kind = kind_of(type(module), (snn.Leaky, snn.Lapicque))
    if kind is None or module.inhibition:
        return None
    if kind is snn.Leaky:
        return Charge(module.beta.clamp(0, 1))
    if module.reset_mechanism == "zero":  # drops the current of that step with the potential
        return None
    leak = module.time_step / (module.R * module.C)
    return Charge(1 - leak, module.R * leak)


#: Neurons whose current is more than the input: those with a synaptic current, with feedback.
_FILTERED = (snn.Synaptic, snn.RSynaptic, snn.Alpha)
_FED_BACK = (snn.RLeaky, snn.RSynaptic)


def _drive(module: Any) -> Drive | None:
    """The drive of a neuron, in the host's own ``forward``."""
    kind = kind_of(type(module), (*_FILTERED, *_FED_BACK), besides=("forward",))
    if kind is None:
        return None
    beta = module.beta.clamp(0, 1)
    filters: tuple[Filter, ...] = ()
    if kind in _FILTERED:
        alpha = module.alpha.clamp(0, 1)
        filters = (Filter("syn", alpha),)
    if kind is snn.Alpha:
        slow, fast = alpha.double().log(), beta.double().log()
        filters = (Filter("syn_exc", alpha), Filter("syn_inh", beta, -1.0))
        return Drive(Charge(0.0), filters, gain=slow / (fast - slow) + 1)
    if kind not in _FED_BACK:
        return Drive(Charge(beta), filters)
    back = getattr(module.recurrent, "V", module.recurrent)
    return Drive(Charge(beta), filters, feedback=Feedback("add", back, "recurrent"))


def _no_integers(module: Any) -> str | None:
    if getattr(module, "inhibition", False):
        return (
            "inhibition lets neurons of a layer interact; turn it off, or run the model in its own "
            "framework"
        )
    if isinstance(module, snn.Alpha) and module.reset_mechanism != "none":
        return (
            "a spike of an Alpha resets two currents that do not fire themselves, which no integer "
            "operation does; use reset_mechanism='none' (a read-out), or Synaptic"
        )
    own = isinstance(module, (*_FILTERED, *_FED_BACK))
    if own and module.reset_mechanism == "zero" and module.reset_delay:
        return (
            "its delayed reset to zero drops the current of the step after a spike; use "
            "reset_mechanism='subtract' or reset_delay=False"
        )
    return None


def _state_names(module: nn.Module) -> tuple[str, ...]:
    """Names of the states a neuron carries, its membrane potential last."""
    known = [name for name in _STATES if hasattr(module, name)]
    own = sorted(module._non_persistent_buffers_set - set(_STATES) - {"spk"})
    return (*own, *known)


def _discard(instances: list[Any], proxy: int) -> None:
    """Drop one object from a list, by identity: comparing a dead proxy is an error."""
    instances[:] = [entry for entry in instances if id(entry) != proxy]


ADAPTER = _SnnTorch()


class OverTime(nn.Module):
    """Runs a neuron over a sequence: ``[T, N, ...]`` in, spikes ``[T, N, ...]`` out.

    Every call starts from a membrane potential of zero.

    Args:
        neuron: a snnTorch neuron that takes and returns its membrane potential.
    """

    def __init__(self, neuron: snn.Leaky) -> None:
        super().__init__()
        self.neuron = neuron

    def forward(self, x_seq: Tensor) -> Tensor:
        """Spikes of all time steps, like ``x_seq``.

        Raises:
            InputError: fewer than two dimensions, or no time step.
        """
        F.check_rank(x_seq, "OverTime", 2, "[T, N, ...]")
        if x_seq.shape[0] == 0:
            raise InputError("OverTime got a sequence of no time steps (T = 0).")
        mem = torch.zeros_like(x_seq[0])
        spikes = []
        for x in x_seq:
            spk, mem = self.neuron(x, mem)
            spikes.append(spk)
        # The neuron keeps its last state; it need not keep the whole graph alive with it.
        self.neuron.mem = mem.detach()
        return torch.stack(spikes)


def paper_neuron(bits: int | None, preset: str = "paper", **options: Any) -> OverTime:
    """The paper's neuron over time: leak 1/2, threshold 1, reset to zero in the same step.

    It differs from SpikingJelly's only in that the threshold itself does not fire.

    Args:
        bits: membrane bits, ``None`` for float.
        preset: ``"paper"`` or ``"official"``.
        options: anything else :class:`QLeaky` takes; overrides the values above.
    """
    defaults: dict[str, Any] = {
        "beta": 0.5,
        "threshold": 1.0,
        "reset_mechanism": "zero",
        "reset_delay": False,
        "spike_grad": Triangle(),
    }
    return OverTime(QLeaky(**{**defaults, **options}, bits=bits, preset=preset))


#: What is for users; the rest of the file serves the core.
__all__ = [
    "QSLSTM",
    "OverTime",
    "QAlpha",
    "QLapicque",
    "QLeaky",
    "QRLeaky",
    "QRSynaptic",
    "QSConv2dLSTM",
    "QSynaptic",
    "QuantizedSpikingNeuron",
    "Triangle",
    "paper_neuron",
]
