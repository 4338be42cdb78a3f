"""snnTorch: its ``Leaky`` neuron with a quantized membrane potential.

The only file that imports snnTorch.
"""

from __future__ import annotations

import weakref
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from qsnn_ext import functional as F
from qsnn_ext import hosts, kernels
from qsnn_ext.errors import ConfigError, InputError, InputTypeError
from qsnn_ext.quantizers import MembraneQuantizer, membrane_quantizer

try:
    import snntorch as snn
except ImportError as error:
    raise hosts.missing("snntorch", error) from error


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
        if not beta > 0:
            raise ConfigError(f"beta={beta!r} of the triangular surrogate must be positive.")
        self.beta = beta

    def __call__(self, x: Tensor) -> Tensor:
        """Spikes for ``x = u - theta``, like ``x``."""
        return F.triangle(x, self.beta, strict=True)


class QLeaky(snn.Leaky):  # type: ignore[misc]
    """snnTorch's ``Leaky`` with a k-bit membrane potential (Eq. 10 to 12).

    Every argument and calling style of ``Leaky`` works and returns what ``Leaky`` returns. Without
    a quantizer (``bits=None`` or 32) ``Leaky``'s own code runs, bit for bit.

    What is quantized is the membrane potential *after* reset, ``v``. With ``reset_delay=True`` (the
    host's default) ``Leaky`` stores the potential *before* reset and decides the next step's reset
    from it, so a stored value rounded across the threshold would lose or invent a reset. Here the
    stored value is ``Q(v)`` plus the threshold where the neuron fired (subtract and zero reset),
    and always lies on the side of the threshold that the spike was on:

    - no spike, but ``Q(v) > theta``: the largest grid level not above ``theta`` is stored;
    - a spike with ``Q(v) = 0``: the next float above ``theta`` is stored.

    Args:
        beta: decay rate, as for ``Leaky``; all further arguments of ``Leaky`` follow.
        bits: 2 to 8, or ``None``/32 for a float membrane potential.
        membrane: a ready quantizer; overrides ``bits`` and the options below.
        preset: ``"paper"`` or ``"official"``: defaults of the options below.
        scale: ``"max"`` or ``"absmax"``.
        squash: ``"tanh"``, ``"none"``, or ``None`` for the preset's.
        mode: ``"dynamic"`` (default) or ``"frozen"``.
        order: ``"fire_first"`` (Eq. 12) or ``"quantize_first"`` (Algorithm 1).

    Raises:
        ConfigError: unknown bits, preset or option, or ``state_quant`` together with ``bits``.
    """

    membrane: MembraneQuantizer | None

    def __init__(
        self,
        beta: float | Tensor,
        *args: Any,
        bits: int | None = 2,
        membrane: MembraneQuantizer | None = None,
        preset: str = "paper",
        scale: F.MembraneScale | None = None,
        squash: F.Squash | Literal["none"] | None = None,
        mode: Literal["dynamic", "frozen"] | None = None,
        order: F.StepOrder = "fire_first",
        **kwargs: Any,
    ) -> None:
        if membrane is None:
            membrane = membrane_quantizer(bits, preset, scale=scale, squash=squash, mode=mode)
        F.check_order(order)
        super().__init__(beta, *args, **kwargs)
        try:
            _check_state_quant(self, membrane)
        except ConfigError:
            # The host's constructor has already put the neuron on its global list.
            snn.SpikingNeuron.instances.remove(self)
            raise
        self.membrane = membrane
        self.order = order

    @property
    def bits(self) -> int | None:
        """Bits of the membrane potential; ``None`` when it is in floating point."""
        return None if self.membrane is None else self.membrane.bits

    @classmethod
    def float_type(cls) -> type[nn.Module]:
        """The host's class this neuron extends."""
        leaky: type[nn.Module] = snn.Leaky
        return leaky

    @classmethod
    def from_float(
        cls,
        node: nn.Module,
        membrane: MembraneQuantizer | None,
        order: F.StepOrder = "fire_first",
    ) -> Self:
        """Turn a ``Leaky`` into a ``QLeaky``, in place (its class changes), and return it.

        The object stays the one on the host's global list of neurons, so nothing is held twice.

        Raises:
            InputTypeError: ``node`` is not exactly a ``Leaky``.
            ConfigError: it has a ``state_quant`` of its own.
        """
        if type(node) is not snn.Leaky:
            raise InputTypeError(f"QLeaky replaces a Leaky, got {type(node).__name__}.")
        F.check_order(order)
        _check_state_quant(node, membrane)
        node.__class__ = cls
        assert isinstance(node, cls)
        if membrane is not None:
            membrane.to(node.beta.device).train(node.training)
        node.membrane = membrane
        node.order = order
        return node

    def forward(self, input_: Tensor, mem: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """One time step, as ``Leaky.forward``.

        Args:
            input_: input current ``[N, ...]``, floating point.
            mem: membrane potential of the step before, like ``input_``; only without
                ``init_hidden``.

        Returns:
            ``spk`` with ``init_hidden`` and no ``output``, else ``(spk, mem)``, like ``input_``.

        Raises:
            InputTypeError: ``input_`` is not floating point, or ``mem`` beside ``init_hidden``.
        """
        if self.membrane is None:
            result: Tensor | tuple[Tensor, Tensor] = super().forward(input_, mem)
            return result
        F.check_floating(input_, "QLeaky")
        if mem is not None:
            if self.init_hidden:
                raise InputTypeError(
                    "pass no `mem` to a neuron with init_hidden=True: it keeps its own."
                )
            self.mem = mem
        if self.mem.shape != input_.shape:
            self.mem = torch.zeros_like(input_)

        if input_.dtype in (torch.float16, torch.bfloat16):
            spk, self.mem = self._narrow_step(input_)
        else:
            spk, self.mem = self._fused(input_) or self._step(input_)
        return spk if self.init_hidden and not self.output else (spk, self.mem)

    def _step(self, input_: Tensor) -> tuple[Tensor, Tensor]:
        """The step in plain operations."""
        assert self.membrane is not None
        # Without the delay what fired has been reset already: a state above the threshold may just
        # have been rounded there, and to reset it now would be a reset without a spike.
        self.reset = self.mem_reset(self.mem) if self.reset_delay else torch.zeros_like(self.mem)
        u = self.state_function(input_)
        if self.order == "quantize_first":
            with kernels.uncounted():
                u = self.membrane(u)
        spk = self.fire_inhibition(u.size(0), u) if self.inhibition else self.fire(u)
        return spk, self._delayed(u) if self.reset_delay else self._immediate(u, spk)

    def _narrow_step(self, input_: Tensor) -> tuple[Tensor, Tensor]:
        """The step of half-precision currents: in float32, and rounded to what Leaky returns."""
        spikes = self.spike_grad(input_.new_zeros(0)).dtype  # the host's own are float32
        self.mem = self.mem.float()
        spk, mem = self._step(input_.float())
        stored = mem.to(torch.promote_types(input_.dtype, spikes))
        if stored.dtype != mem.dtype and self.reset_delay and self.reset_mechanism != "none":
            with torch.no_grad():
                below, above = _around(self.threshold.float(), stored.dtype)
                sided = torch.where(mem > self.threshold, above.maximum(stored), stored)
                sided = torch.where(mem <= self.threshold, below.minimum(sided), sided)
            stored = F.straight_through(stored, sided)
        return spk.to(spikes), stored

    def _fused(self, input_: Tensor) -> tuple[Tensor, Tensor] | None:
        """The step as one operation; ``None`` where there is none for this neuron."""
        assert self.membrane is not None
        if self.inhibition or self.mem.device != input_.device or input_.dtype != torch.float32:
            return None  # what the host's surrogates return has a dtype of its own
        if torch.compiler.is_compiling() or kernels.is_watched():
            return None  # plain operations fuse by themselves there
        if not self.reset_delay:
            return self._fused_immediate(input_)
        if self.threshold.requires_grad or self.graded_spikes_factor.requires_grad:
            return None
        if self.beta.numel() != 1 or self.threshold.numel() != 1:
            return None
        graded, params = self._constants(input_.dtype)
        result = kernels.run_delayed_step(
            input_,
            self.mem,
            self.membrane,
            params=params,
            reset=_RESETS[self.reset_mechanism],
            surrogate=self.spike_grad,
            order=self.order,
        )
        if result is None or not graded:
            return result
        return result[0] * self.graded_spikes_factor, result[1]

    def _fused_immediate(self, input_: Tensor) -> tuple[Tensor, Tensor] | None:
        """The step with the reset in it: one step of the layer that SpikingJelly's neurons run."""
        assert self.membrane is not None
        charge = {"decay": self.beta.clamp(0, 1), "gain": 1.0, "offset": 0.0}
        numbers = (charge["decay"], self.threshold)
        known = kernels.covers(input_, self.membrane, self.spike_grad, numbers)
        if not known or self.mem.dtype != input_.dtype:
            return None
        spk, mem = kernels.run_layer(
            input_.unsqueeze(0),
            self.mem,
            self.membrane,
            charge=charge,
            threshold=self.threshold,
            reset=_RESETS[self.reset_mechanism],
            v_reset=0.0,
            detach_reset=False,
            surrogate=self.spike_grad,
            order=self.order,
        )
        return spk[0] * self.graded_spikes_factor, mem

    def _constants(self, dtype: torch.dtype) -> tuple[bool, Tensor]:
        """Whether spikes are graded, and the kernel's params; kept until one of them changes."""
        sources = (self.beta, self.threshold, self.graded_spikes_factor)
        # Tensors made under inference_mode count no versions: what they are is read every time.
        counted = not any(t.is_inference() for t in sources)
        key = (dtype, *[(id(t), t._version, t.data_ptr()) for t in sources]) if counted else None
        kept = self.__dict__.get("_kernel_constants")
        if kept is None or kept[0] != key or key is None:
            with torch.inference_mode(False):  # what is kept may take part in training later
                beta, theta = self.beta.detach().clamp(0, 1), self.threshold.detach().to(dtype)
                above = torch.nextafter(theta, torch.full_like(theta, torch.inf))
                params = torch.stack([t.to(dtype).reshape(()) for t in (beta, theta, above)])
                graded = bool((self.graded_spikes_factor != 1).any())
            kept = self.__dict__["_kernel_constants"] = (key, graded, params)
        params = kept[2]
        if self.beta.requires_grad and torch.is_grad_enabled():
            decay = self.beta.clamp(0, 1).to(dtype).reshape(1)
            params = torch.cat([decay, params[1:]])
        return kept[1], params

    def _immediate(self, u: Tensor, spk: Tensor) -> Tensor:
        """The membrane potential after a reset in the same step (``reset_delay=False``)."""
        do_reset: Tensor = spk / self.graded_spikes_factor
        v: Tensor
        if self.reset_mechanism == "subtract":
            v = u - do_reset * self.threshold
        elif self.reset_mechanism == "zero":
            v = u - do_reset * u
        else:
            v = u
        assert self.membrane is not None
        if self.order == "quantize_first":
            return v
        with kernels.uncounted():
            carried: Tensor = self.membrane(v)
        return carried

    def _delayed(self, u: Tensor) -> Tensor:
        """What to store so that the next step resets exactly where this one fired."""
        assert self.membrane is not None
        if self.order == "quantize_first":
            return u
        with kernels.uncounted():
            stored: Tensor = self._stored(u)
        return stored

    def _stored(self, u: Tensor) -> Tensor:
        assert self.membrane is not None
        if self.reset_mechanism == "none":
            return self.membrane.quantize(u)[0]
        fired: Tensor = self.mem_reset(u)
        v: Tensor = (
            u - fired * self.threshold if self.reset_mechanism == "subtract" else (1 - fired) * u
        )
        quantized, step = self.membrane.quantize(v)
        stored = quantized + fired * self.threshold
        return F.straight_through(stored, self._beside_threshold(stored, fired, step))

    @torch.no_grad()
    def _beside_threshold(self, stored: Tensor, fired: Tensor, step: Tensor) -> Tensor:
        """``stored``, moved to the nearest admissible value where it lost or invented a spike."""
        theta = self.threshold.to(stored.dtype)
        # The largest level not above theta; the product may round up past it, hence the second try.
        code = torch.floor(theta / torch.where(step > 0, step, 1))
        below = torch.where(code * step > theta, (code - 1) * step, code * step)
        above = torch.nextafter(theta, torch.full_like(theta, torch.inf))
        is_fired = fired > 0
        # NaN is neither above nor below, and stays.
        stored = torch.where(is_fired & (stored <= theta), above, stored)
        return torch.where(~is_fired & (stored > theta), torch.minimum(below, theta), stored)

    def extra_repr(self) -> str:
        """Bits and step order, for ``print(model)``."""
        return f"bits={self.bits}, order={self.order!r}"


def _around(theta: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The numbers of half precision nearest to ``theta``: not above it, and above it."""
    near = theta.to(dtype)
    infinity = torch.full_like(near, torch.inf)
    is_above = near.float() > theta
    below = torch.where(is_above, torch.nextafter(near, -infinity), near)
    return below, torch.where(is_above, near, torch.nextafter(near, infinity))


def _check_state_quant(node: Any, membrane: MembraneQuantizer | None) -> None:
    if membrane is not None and node.state_quant:
        raise ConfigError(
            "Leaky's own state_quant and bits would both quantize the membrane potential; "
            "drop state_quant, or pass bits=None."
        )


def is_spiking(module: nn.Module) -> bool:
    """Whether ``module`` is one of snnTorch's spiking neurons (or ours)."""
    return isinstance(module, snn.SpikingNeuron)


def state(module: nn.Module) -> Tensor | None:
    """The membrane potential the neuron keeps."""
    mem: Tensor | None = getattr(module, "mem", None)
    return mem


def starts_sequence(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], left: Tensor | None
) -> bool:
    """Whether the neuron's own state was replaced since the last call, or has another shape.

    A membrane potential passed by hand may be any of several, or a detached one, so of those only
    the shape is looked at.
    """
    given: Tensor | None = args[1] if len(args) > 1 else kwargs.get("mem")
    mem = state(module) if given is None else given
    if mem is None or (given is None and mem is not left):
        return True
    return bool(args) and mem.shape != args[0].shape


def reset(model: nn.Module) -> None:
    """Put the states that the neurons in ``model`` keep back to zero.

    Only those of ``model``, unlike ``utils.reset``. The host keeps states, and nothing else, in
    non-persistent buffers.
    """
    for module in model.modules():
        if is_spiking(module):
            for name in module._non_persistent_buffers_set:
                value = getattr(module, name)
                if isinstance(value, Tensor):
                    setattr(module, name, torch.zeros_like(value))


#: Which class takes a host neuron's place, by exact type: other neurons subclass Leaky's base.
NEURONS: dict[type[nn.Module], type[QLeaky]] = {snn.Leaky: QLeaky}


def is_neuron(module: nn.Module) -> bool:
    """Whether ``module`` is a neuron of snnTorch of any kind (or ours)."""
    return is_spiking(module) or type(module).__module__.startswith("snntorch._neurons.")


def is_readout(module: nn.Module) -> bool:
    """Whether the neuron is never reset, and so only integrates."""
    return getattr(module, "reset_mechanism", None) == "none"


def obstacle(module: nn.Module) -> str | None:
    """A neuron that already quantizes its state by the host's own means is left alone."""
    return "it has a state_quant of its own" if getattr(module, "state_quant", False) else None


def converted(model: nn.Module) -> None:
    """Nothing to do: the neurons on the host's list are still the same objects."""


def copied(model: nn.Module) -> None:
    """Put the copied neurons on the host's list, so that ``utils.reset`` finds them.

    The list holds its neurons for ever; it gets weak proxies of these, which leave it when the
    copy dies, so that copying a model many times costs nothing.
    """
    instances = snn.SpikingNeuron.instances
    for module in model.modules():
        if isinstance(module, snn.SpikingNeuron):
            proxy = weakref.proxy(module)
            instances.append(proxy)
            weakref.finalize(module, _discard, instances, id(proxy))


def _discard(instances: list[Any], proxy: int) -> None:
    """Drop one object from a list, by identity: comparing a dead proxy is an error."""
    instances[:] = [entry for entry in instances if id(entry) != proxy]


def restart(module: nn.Module) -> None:
    """Nothing to do: :class:`OverTime` starts every sequence from zero."""


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
