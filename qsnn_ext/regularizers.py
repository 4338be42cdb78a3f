"""Weight-Spike Dual Regulation: the spike term of the loss, and the sign gradient's schedule.

The weight half of the regulation (Eq. 16) is an option of
:class:`~qsnn_ext.quantizers.BinaryWeight`; this file holds what acts during training.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from qsnn_ext import functional as F
from qsnn_ext import hosts, kernels
from qsnn_ext.errors import ConfigError, InputTypeError, StateError
from qsnn_ext.quantizers import BinaryWeight


class FiringRateHook:
    """A forward hook of one layer, or of the model, that can be copied and pickled with it.

    It holds its owner weakly, and a copy of the model gets a copy of the hook that does nothing:
    the copy is not being watched.
    """

    def __init__(self, owner: WSDRRegularizer | None, name: str | None, before: bool) -> None:
        self.owner = weakref.ref(owner) if owner is not None else None
        self.name = name
        self.before = before

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *output: Any
    ) -> None:
        """Tell the owner, if it is still there, of the call that is to come or has been."""
        owner = self.owner() if self.owner is not None else None
        if owner is None:
            return
        if self.name is None:  # the model itself
            owner._pass(1 if self.before else -1)
        elif self.before:
            owner._before(self.name, module, args, kwargs)
        else:
            owner._after(self.name, module, hosts.spikes(output[0]))

    def __reduce__(self) -> tuple[Any, ...]:
        return (FiringRateHook, (None, self.name, self.before))


class WSDRRegularizer:
    """The spike term of the loss (Eq. 17): ``strength * sum_l (f_l - target)**2``, hidden layers.

    ``f_l`` is the firing rate of layer ``l``: its spikes over neurons, samples and time steps. The
    regularizer watches the spiking layers by forward hooks and returns the differentiable term
    when called; add it to the loss::

        wsdr = WSDRRegularizer(model, strength=1e-3)
        loss = criterion(model(x), y) + wsdr()

    Multi-step calls and single-step loops both work, and every call counts: all calls of a neuron
    within one pass of the model, whatever happens to its state between them, and all passes until
    the term has been taken, gradients are switched on or off, or the state that the neuron keeps
    was reset before its first call of a pass. States passed by hand cannot be seen to reset, so
    there only the first two start anew.

    Args:
        model: a model with SpikingJelly or snnTorch neurons, quantized or not.
        strength: ``lambda`` of Eq. 18.
        target: rate with the greatest entropy, 0.5.
        reduction: ``"sum"`` over layers (the paper) or ``"mean"`` (the authors' code).
        exclude: ``"ends"`` leaves out the first and the last spiking layer in running order, as
            the paper does; ``None`` watches all; a sequence of module names leaves out those.

    Raises:
        InputTypeError: ``model`` is not a module.
        ConfigError: no spiking layer is left to watch, an unknown name or reduction, a strength
            below zero or a target that is no rate.
    """

    def __init__(
        self,
        model: nn.Module,
        strength: float = 1e-3,
        target: float = 0.5,
        reduction: Literal["sum", "mean"] = "sum",
        exclude: Literal["ends"] | Sequence[str] | None = "ends",
    ) -> None:
        if not isinstance(model, nn.Module):
            raise InputTypeError(f"WSDRRegularizer needs a module, got {type(model).__name__}.")
        if reduction not in ("sum", "mean"):
            raise ConfigError(f"reduction={reduction!r} is unknown; choose 'sum' or 'mean'.")
        if not 0 <= target <= 1:
            raise ConfigError(f"target={target!r} is a firing rate and must lie in 0..1.")
        if not 0 <= strength < math.inf:
            raise ConfigError(f"strength={strength!r} must be a number of at least 0.")
        self.strength = strength
        self.target = target
        self.reduction = reduction
        self._ends_excluded = exclude == "ends"
        if exclude is None or exclude == "ends":
            names: tuple[str, ...] = ()
        else:
            names = (exclude,) if isinstance(exclude, str) else tuple(exclude)
        self._layers = _spiking_layers(model, names, self._ends_excluded)
        self._model = model
        self._depth = 0  # of passes of the model in each other
        self._restart()
        self._handles: list[Any] = []
        self._watch()

    def _watch(self) -> None:
        enter, leave = FiringRateHook(self, None, True), FiringRateHook(self, None, False)
        self._handles.append(self._model.register_forward_pre_hook(enter, with_kwargs=True))
        self._handles.append(
            self._model.register_forward_hook(leave, with_kwargs=True, always_call=True)
        )
        for name, module in self._layers.items():
            before, after = FiringRateHook(self, name, True), FiringRateHook(self, name, False)
            self._handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            self._handles.append(module.register_forward_hook(after, with_kwargs=True))

    def _restart(self) -> None:
        self._taken = False
        # In running order, because a dictionary keeps the order in which keys first came.
        self._spikes: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        # The state each layer kept, held weakly: a new tensor in its place means a reset.
        self._states: dict[str, weakref.ref[Tensor]] = {}
        self._differentiable = torch.is_grad_enabled()
        self._met: set[str] = set()  # layers that have run in this pass of the model

    def _pass(self, change: int) -> None:
        """A pass of the model begins (1) or ends (-1)."""
        if self._depth == 0:
            self._met = set()
        self._depth = max(0, self._depth + change)

    def _before(
        self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        # An evaluation pass must not reach into the next training loss, nor the other way round.
        if self._taken or self._differentiable != torch.is_grad_enabled():
            self._restart()
        by_hand = [v for v in (*args[1:], *kwargs.values()) if isinstance(v, Tensor)]
        met = self._depth > 0 and name in self._met
        self._met.add(name)
        if name not in self._counts or met or by_hand:
            return
        kept = self._states.get(name)
        left = kept() if kept is not None else None
        host = hosts.adapter_of(module)
        x = args[0] if args and isinstance(args[0], Tensor) else None
        if host is not None and host.starts_sequence(module, x, left):
            del self._spikes[name], self._counts[name]

    def _after(self, name: str, module: nn.Module, spikes: Tensor) -> None:
        total = kernels.spike_count(spikes)
        if name in self._counts:
            total = total + self._spikes[name]
        self._spikes[name] = total
        self._counts[name] = self._counts.get(name, 0) + spikes.numel()
        host = hosts.adapter_of(module)
        state = host.state(module) if host is not None else None
        if state is not None:
            self._states[name] = weakref.ref(state)

    def _rates(self) -> dict[str, Tensor]:
        if not self._counts:
            raise StateError(
                "no spiking layer has run since the regularizer was made; "
                "call the model before the regularizer."
            )
        rates = {name: self._spikes[name] / max(1, self._counts[name]) for name in self._counts}
        if self._ends_excluded:
            hidden = list(rates)[1:-1]
            rates = {name: rates[name] for name in hidden}
        return rates

    def __call__(self) -> Tensor:
        """The loss term of the last forward pass: a differentiable 0-dim tensor.

        Raises:
            StateError: the model has not run yet, or fewer than three of its spiking layers did
                while the ends are left out.
        """
        rates = self._rates()
        if not rates:
            raise StateError(
                "only the first and the last spiking layer have run, and both are left out; "
                "pass exclude=None or a list of names."
            )
        self._taken = True
        squares = torch.stack([(rate - self.target).square() for rate in rates.values()])
        return self.strength * (squares.sum() if self.reduction == "sum" else squares.mean())

    def firing_rates(self) -> dict[str, float]:
        """Firing rate of each regulated layer in the last forward pass, in running order.

        Raises:
            StateError: the model has not run yet.
        """
        return {name: rate.item() for name, rate in self._rates().items()}

    def entropies(self) -> dict[str, float]:
        """Entropy (Eq. 14, nats) of each regulated layer's spikes in the last forward pass.

        Raises:
            StateError: the model has not run yet.
        """
        return {n: F.entropy(r.detach()).item() for n, r in self._rates().items()}

    @property
    def layer_names(self) -> tuple[str, ...]:
        """Names of the watched layers, in definition order, the ends included."""
        return tuple(self._layers)

    def close(self) -> None:
        """Stop watching the model. Closing twice does nothing."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state["_watching"] = bool(state.pop("_handles"))
        # Sums belong to a graph, which can be neither copied nor pickled.
        state.update(_taken=False, _spikes={}, _counts={}, _states={}, _depth=0, _met=set())
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        watching = state.pop("_watching")
        self.__dict__.update(state)
        self._handles = []
        if watching:
            self._watch()


def _spiking_layers(
    model: nn.Module, exclude: tuple[str, ...], ends_excluded: bool
) -> dict[str, nn.Module]:
    found = {name: m for name, m in model.named_modules() if hosts.adapter_of(m) is not None}
    unknown = [name for name in exclude if name not in found]
    if unknown:
        raise ConfigError(
            f"exclude names no spiking layer {unknown[0]!r}; there are: {', '.join(found)}."
        )
    layers = {name: module for name, module in found.items() if name not in exclude}
    if not layers:
        raise ConfigError(
            f"{type(model).__name__} has no spiking layer to regulate; "
            "it needs SpikingJelly or snnTorch neurons that are not all excluded."
        )
    if ends_excluded and len(layers) < 3:
        raise ConfigError(
            f"{type(model).__name__} has {len(layers)} spiking layer(s), and the first and the "
            "last are left out; pass exclude=None or a list of names."
        )
    return layers


class SignGradientSchedule:
    """Moves the temperature of annealed sign gradients, stepped like a learning-rate scheduler.

    ``t`` goes from ``start`` to ``end`` on a logarithmic scale over the epochs (IR-Net; the
    authors' code: 0.1 to 10). Construction sets ``start``; call :meth:`step` after each epoch.

    Args:
        model: a model with :class:`~qsnn_ext.quantizers.BinaryWeight` quantizers.
        epochs: number of epochs; the last one trains at ``end``.
        start: first temperature.
        end: last temperature.

    Raises:
        ConfigError: ``epochs`` below 1, or temperatures that are not positive.

    A model without annealed gradients is allowed, so that training code need not ask.
    """

    def __init__(
        self, model: nn.Module, epochs: int, start: float = 0.1, end: float = 10.0
    ) -> None:
        if epochs < 1:
            raise ConfigError(f"epochs={epochs!r} must be at least 1.")
        if not (start > 0 and end > 0):
            raise ConfigError(f"temperatures start={start!r} and end={end!r} must be positive.")
        self.epochs = epochs
        self.start = start
        self.end = end
        self._quantizers = [
            m for m in model.modules() if isinstance(m, BinaryWeight) and m.gradient == "annealed"
        ]
        self.epoch = 0
        self._apply()

    @property
    def temperature(self) -> float:
        """``t`` of the current epoch."""
        done = min(self.epoch, self.epochs - 1) / max(1, self.epochs - 1)
        return float(self.start * (self.end / self.start) ** done)

    def _apply(self) -> None:
        for quantizer in self._quantizers:
            quantizer.temperature.fill_(self.temperature)

    def step(self) -> None:
        """Go on to the next epoch; after the last one the temperature stays."""
        self.epoch += 1
        self._apply()

    def state_dict(self) -> dict[str, int]:
        """The epoch, for a checkpoint."""
        return {"epoch": self.epoch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Restore the epoch and set its temperature."""
        self.epoch = state["epoch"]
        self._apply()
