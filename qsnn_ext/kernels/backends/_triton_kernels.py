"""The kernels of :mod:`qsnn_ext.kernels.backends.triton`, in Triton's language.

Names and order of the arithmetic are those of :mod:`qsnn_ext.kernels.recurrence` and
:mod:`qsnn_ext.kernels.grid`. Everything is computed in float32; a state is rounded to the dtype of
the input after each step. Inputs of all steps are loaded before the first is computed: stores and
barriers between loads would make each wait for the one before.
"""

# Triton's language looks like Python, and is neither typed nor as rich.
# mypy: ignore-errors
# ruff: noqa: SIM102, SIM108, RUF005

import triton
import triton.language as tl

VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])


@triton.jit
def _fires(h, theta, STRICT: tl.constexpr):
    if STRICT:
        fired = h > theta
    else:
        fired = h >= theta
    return fired


@triton.jit
def _reset(h, fired, theta, RESET: tl.constexpr, V_RESET: tl.constexpr):
    if RESET == "hard":
        left = tl.where(fired, h * 0.0 + V_RESET, h)
    elif RESET == "soft":
        left = tl.where(fired, h - theta, h)
    else:
        left = h
    return left


@triton.jit
def _maximum(v, inside, ABSMAX: tl.constexpr):
    """Of the finite ones of a block."""
    finite = inside & (tl.abs(v) < float("inf"))
    if ABSMAX:
        top = tl.max(tl.where(finite, tl.abs(v), 0.0), axis=0)
    else:
        top = tl.max(tl.where(finite, v, -float("inf")), axis=0)
    return top


@triton.jit
def _used(top, running, SCALE: tl.constexpr, MOMENTUM: tl.constexpr):
    """The scale of a step with this maximum, and the running one afterwards."""
    if SCALE == "running":
        observed = tl.maximum(top, 0.0)
        alpha = tl.where(running > 0.0, running, observed)
        running = alpha + MOMENTUM * (observed - alpha)
    else:
        alpha = top
    return alpha, running


@triton.jit
def _round(v, alpha, LEVELS: tl.constexpr, SCALE: tl.constexpr, RECIPROCAL: tl.constexpr):
    empty = alpha <= 0.0
    zero = v * 0.0  # NaN where v is NaN or infinite
    if LEVELS == 1.0 and SCALE == "dynamic":
        half = tl.where(empty, float("inf"), alpha * 0.5)
        value = tl.where(v > half, alpha, tl.where(v < -half, -alpha, 0.0)) + zero
    else:
        ratio = tl.div_rn(v, tl.where(empty, float("inf"), alpha))
        ratio = tl.minimum(tl.maximum(ratio, -1.0), 1.0)
        # Beside 1.5 * 2**23 floats are whole numbers, and a sum is rounded half to even.
        code = (ratio * LEVELS + 12582912.0) - 12582912.0
        if RECIPROCAL:
            step = alpha * (1.0 / LEVELS)
        else:
            step = tl.div_rn(alpha, LEVELS)
        value = (code + zero) * tl.where(empty, 0.0, step)
    return value


@triton.jit
def _unround(grad, v, alpha, ABSMAX: tl.constexpr, SCALE: tl.constexpr):
    if ABSMAX and SCALE == "dynamic":
        inside = tl.where(alpha > 0.0, grad, 0.0)  # nothing exceeds its own maximum
    else:
        inside = tl.where(tl.abs(v) <= tl.where(alpha > 0.0, alpha, -1.0), grad, 0.0)
    return inside


@triton.jit
def _derivative(x, SURROGATE: tl.constexpr, A: tl.constexpr, B: tl.constexpr):
    """As :data:`qsnn_ext.kernels.surrogates.DERIVATIVES`."""
    size = tl.abs(x)
    if SURROGATE == "triangle":
        slope = A - size
        slope = tl.where(slope < 0.0, 0.0, slope)
    elif SURROGATE == "piecewise_quadratic":
        slope = tl.where(size > 1.0 / A, 0.0, A - A * A * size)
    elif SURROGATE == "piecewise_exp":
        slope = A / 2.0 * tl.exp(-A * size)
    elif SURROGATE == "sigmoid":
        s = 1.0 / (1.0 + tl.exp(-A * x))
        slope = (1.0 - s) * s * A
    elif SURROGATE == "soft_sign":
        y = 1.0 / A + size
        slope = 1.0 / (2.0 * A * (y * y))
    elif SURROGATE == "super_spike":
        y = size + 1.0
        slope = A / (y * y)
    elif SURROGATE == "atan":
        y = (1.5707963267948966 * A) * x
        slope = (A / 2.0) / (1.0 + y * y)
    elif SURROGATE == "erf":
        y = A * x
        slope = tl.exp(-(y * y)) * (A * 0.5641895835477563)
    elif SURROGATE == "rect":
        slope = tl.where(size < 0.5 / A, A, tl.full(x.shape, 0.0, tl.float32))
    elif SURROGATE == "fast_sigmoid":
        y = A * size + 1.0
        slope = 1.0 / (y * y)
    elif SURROGATE == "straight_through":
        slope = tl.full(x.shape, 1.0, tl.float32)
    elif SURROGATE == "slope_above":
        slope = tl.where(x > 0.0, A, tl.full(x.shape, B, tl.float32))
    elif SURROGATE == "slope_from":
        slope = tl.where(x >= 0.0, A, tl.full(x.shape, B, tl.float32))
    else:
        tl.static_assert(SURROGATE == "rate_escape")
        slope = B * tl.exp(-A * tl.abs(x - 1.0))
    return slope


@triton.jit
def _fire(fired, spikes, count, inside, ALONE: tl.constexpr):
    """Writes the spikes of a block and what it counts of them."""
    ones = tl.where(fired, 1.0, 0.0)
    tl.store(spikes, ones.to(spikes.dtype.element_ty), mask=inside)
    total = tl.sum(tl.where(fired & inside, 1, 0), axis=0).to(count.dtype.element_ty)
    if ALONE:
        tl.store(count, total)
    else:
        tl.atomic_add(count, total, sem="relaxed")


@triton.jit(do_not_specialize=["first", "steps", "chunks"])
def forward(
    x, v, p, given, spikes, last, seen, alphas, counts, charges, first, steps, chunks,
    KNOWN: tl.constexpr, AHEAD: tl.constexpr, CARRIED: tl.constexpr, ALONE: tl.constexpr,
    SCALE: tl.constexpr, MOMENTUM: tl.constexpr, LEVELS: tl.constexpr, ABSMAX: tl.constexpr,
    QUANTIZE_FIRST: tl.constexpr, RESET: tl.constexpr, V_RESET: tl.constexpr,
    STRICT: tl.constexpr, RECIPROCAL: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Steps of a layer whose scales are known, and one more up to its maximum.

    Args:
        x: input ``[T, M]``.
        v: state before step ``first`` ``[M]``; ``None`` is zero.
        p: decay, gain, offset, threshold.
        given: scale, for ``"given"`` and ``"running"``.
        spikes: result ``[T, M]``.
        last: where the state after the known steps is put ``[M]``, or ``None``. May be ``v``.
        seen: maximum of each step ``[T]``: of earlier launches, and of the step ahead.
        alphas: result ``[T + 1]``. May be ``seen``.
        counts: result ``[T]``.
        charges: result ``[T, M]``, or ``None``.
        first: the first of the known steps.
        steps: ``T``.
        chunks: ``M / ALIGN``.
        KNOWN: number of known steps.
        AHEAD: whether the step after them begins.
        CARRIED: whether ``v`` is what an earlier launch put into ``last``.
        ALONE: whether one block has the whole layer, and this launch all of its steps.
        SCALE: ``LIFOptions.alpha``, or ``"none"``. The other options likewise.
        LEVELS: of the grid, a float.
        RECIPROCAL: whether a scale is divided by a number as PyTorch does on CUDA.
        ALIGN: a number that divides ``M``.
        BLOCK: neurons of a block.
    """
    M = chunks.to(tl.int64) * ALIGN
    start = tl.program_id(0).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    inside = lane < M - start
    writer = tl.program_id(0) == 0
    decay, gain = tl.load(p), tl.load(p + 1)
    offset, theta = tl.load(p + 2), tl.load(p + 3)
    waits: tl.constexpr = SCALE == "dynamic" or SCALE == "running"

    if v is None:
        state = tl.full([BLOCK], 0.0, tl.float32)
    else:
        state = tl.load(v + start + lane, mask=inside, other=0.0).to(tl.float32)
    inputs = ()
    for s in tl.static_range(KNOWN + AHEAD):
        row = (first + s).to(tl.int64) * M + start
        inputs = inputs + (tl.load(x + row + lane, mask=inside, other=0.0),)

    running = 0.0
    if SCALE == "given" or SCALE == "running":
        running = tl.load(given)
    if SCALE == "running" and CARRIED:
        # An earlier launch wrote the scale of the step before the first.
        before = tl.load(alphas + first - 1)
        running = before + MOMENTUM * (tl.maximum(tl.load(seen + first - 1), 0.0) - before)

    for s in tl.static_range(KNOWN):
        t = first + s
        row = t.to(tl.int64) * M + start
        h = decay * state + gain * inputs[s].to(tl.float32) + offset
        if charges is not None and (ALONE or not waits):
            tl.store(charges + row + lane, h, mask=inside)
        if QUANTIZE_FIRST:
            left = h
        else:
            fired = _fires(h, theta, STRICT)
            left = _reset(h, fired, theta, RESET, V_RESET)
        alpha = 0.0
        if SCALE == "given":
            alpha = running
        elif waits and ALONE:
            alpha, running = _used(_maximum(left, inside, ABSMAX), running, SCALE, MOMENTUM)
        elif waits:
            alpha, running = _used(tl.load(seen + t), running, SCALE, MOMENTUM)
        if SCALE != "dynamic" or ALONE:
            tl.store(alphas + t, alpha, mask=writer)
        state = left
        if SCALE != "none":
            state = _round(left, alpha, LEVELS, SCALE, RECIPROCAL)
        if QUANTIZE_FIRST:
            fired = _fires(state, theta, STRICT)
            state = _reset(state, fired, theta, RESET, V_RESET)
        if ALONE or not waits or (QUANTIZE_FIRST and s == KNOWN - 1):
            _fire(fired, spikes + row + lane, counts + t, inside, ALONE)
        state = state.to(x.dtype.element_ty).to(tl.float32)

    if last is not None:
        tl.store(last + start + lane, state.to(last.dtype.element_ty), mask=inside)
        tl.store(alphas + steps, running, mask=writer)

    if AHEAD:
        t = first + KNOWN
        row = t.to(tl.int64) * M + start
        h = decay * state + gain * inputs[KNOWN].to(tl.float32) + offset
        if charges is not None:
            tl.store(charges + row + lane, h, mask=inside)
        if QUANTIZE_FIRST:
            left = h
        else:
            fired = _fires(h, theta, STRICT)
            left = _reset(h, fired, theta, RESET, V_RESET)
            _fire(fired, spikes + row + lane, counts + t, inside, ALONE)
        tl.atomic_max(seen + t, _maximum(left, inside, ABSMAX), sem="relaxed")


@triton.jit(do_not_specialize=["chunks"])
def backward(
    g_spikes, g_v, g_counts, saved, v, p, alphas, g_x, g_v0, chunks,
    T: tl.constexpr, CHARGES: tl.constexpr, DETACH: tl.constexpr, SURROGATE: tl.constexpr,
    A: tl.constexpr, B: tl.constexpr, SCALE: tl.constexpr, LEVELS: tl.constexpr,
    ABSMAX: tl.constexpr, QUANTIZE_FIRST: tl.constexpr, RESET: tl.constexpr,
    V_RESET: tl.constexpr, STRICT: tl.constexpr, RECIPROCAL: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """All of the backward of a layer, every step of a neuron in registers.

    Args:
        g_spikes: gradient of the spikes ``[T, M]``, or ``None``.
        g_v: gradient of the last state ``[M]``, or ``None``.
        g_counts: gradient of the counts ``[T]``.
        saved: input or, with ``CHARGES``, charges ``[T, M]``.
        v: first state ``[M]``; ``None`` is zero.
        p: decay, gain, offset, threshold.
        alphas: scale of each step.
        g_x: result ``[T, M]``.
        g_v0: result ``[M]``, or ``None``.
        chunks: ``M / ALIGN``.
        T: number of steps.
        CHARGES: whether the charges were saved.
        DETACH: ``LIFOptions.detach_reset``.
        SURROGATE: its kind.
        A: its first number.
        B: its second number.
        SCALE: as for :func:`forward`, as all that follows.
    """
    M = chunks.to(tl.int64) * ALIGN
    start = tl.program_id(0).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    inside = lane < M - start
    decay, gain = tl.load(p), tl.load(p + 1)
    offset, theta = tl.load(p + 2), tl.load(p + 3)

    inputs = ()
    gradients = ()
    for t in tl.static_range(T):
        at = M * t + start
        inputs = inputs + (tl.load(saved + at + lane, mask=inside, other=0.0),)
        if g_spikes is not None:
            gradients = gradients + (tl.load(g_spikes + at + lane, mask=inside, other=0.0),)
    if g_v is None:
        g_state = tl.full([BLOCK], 0.0, tl.float32)
    else:
        g_state = tl.load(g_v + start + lane, mask=inside, other=0.0).to(tl.float32)
    if v is None or CHARGES:
        state = tl.full([BLOCK], 0.0, tl.float32)
    else:
        state = tl.load(v + start + lane, mask=inside, other=0.0).to(tl.float32)

    hs = ()  # charges
    decided = ()  # potentials that decided the spikes
    for t in tl.static_range(T):
        h = inputs[t].to(tl.float32)
        if not CHARGES:
            h = decay * state + gain * h + offset
        hs = hs + (h,)
        if QUANTIZE_FIRST:
            h = _round(h, tl.load(alphas + t), LEVELS, SCALE, RECIPROCAL)
        decided = decided + (h,)
        if not CHARGES and t < T - 1:
            state = _reset(h, _fires(h, theta, STRICT), theta, RESET, V_RESET)
            if SCALE != "none" and not QUANTIZE_FIRST:
                state = _round(state, tl.load(alphas + t), LEVELS, SCALE, RECIPROCAL)
            state = state.to(saved.dtype.element_ty).to(tl.float32)

    for t in tl.static_range(T - 1, -1, -1):
        h = decided[t]
        fired = _fires(h, theta, STRICT)
        g_fired = tl.full([BLOCK], 0.0, tl.float32) + tl.load(g_counts + t).to(tl.float32)
        if g_spikes is not None:
            g_fired = g_fired + gradients[t].to(tl.float32)
        g_left = g_state
        g_h = g_state
        if g_v is not None or t < T - 1:
            if SCALE != "none" and not QUANTIZE_FIRST:
                left = _reset(h, fired, theta, RESET, V_RESET)
                g_left = _unround(g_state, left, tl.load(alphas + t), ABSMAX, SCALE)
            g_h = g_left
            if RESET == "hard":
                g_h = tl.where(fired, 0.0, g_left)
                if not DETACH:
                    g_fired = g_fired + g_left * (V_RESET - h)
            elif RESET == "soft":
                if not DETACH:
                    g_fired = g_fired - g_left * theta
        g_h = g_h + g_fired * _derivative(h - theta, SURROGATE, A, B)
        if QUANTIZE_FIRST:
            g_h = _unround(g_h, hs[t], tl.load(alphas + t), ABSMAX, SCALE)
        at = M * t + start
        tl.store(g_x + at + lane, (gain * g_h).to(g_x.dtype.element_ty), mask=inside)
        g_state = decay * g_h
    if g_v0 is not None:
        tl.store(g_v0 + start + lane, g_state.to(g_v0.dtype.element_ty), mask=inside)
