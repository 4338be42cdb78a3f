"""Programs as NIR graphs and back, with weights that are truly binary.

NIR (the Neuromorphic Intermediate Representation) knows convolutions, linear layers, scales and
leaky integrate-and-fire neurons as ordinary differential equations in float; it has no words for
codes, fixed point or a quantized membrane. The graph written here is therefore two things at once:
every node carries the real-valued meaning a NIR consumer can run approximately (weights are exactly
-1 and +1, their scale is a node of its own), and its metadata carry the integer fields, from which
:func:`from_nir` rebuilds the program bit by bit.

Limits: a NIR neuron has one output, its spikes; potentials that a model returns beside them have no
node and are named in the metadata. It resets to ``v_reset``; subtraction is noted in the metadata
only. NIR integrates continuous time, so ``tau`` and ``r`` are those whose exact Euler step (dt = 1)
is our step. Residual sums are several edges into one node. Maximum pooling, repetition and products
of spikes have no NIR node and are refused.
"""

from __future__ import annotations

import base64
import json
import re
from dataclasses import fields
from typing import Any

import numpy as np

from qsnn_ext.deploy import checks
from qsnn_ext.deploy.fileformat import dump_program, parse_program
from qsnn_ext.deploy.program import Add, Affine, Conv, Logic, Neuron, Pool, Program, sources_of
from qsnn_ext.deploy.reference import unpack_weight
from qsnn_ext.errors import FormatError, LoweringError, MissingDependencyError


def _nir() -> Any:
    try:
        import nir
    except ImportError as error:
        raise MissingDependencyError(
            "NIR export needs the nir package; install it with: pip install 'qsnn_ext[snntorch]'"
        ) from error
    return nir


def to_nir(program: Program) -> Any:
    """Write a program as a NIR graph.

    Args:
        program: A valid program of convolutions, linear layers, batch norms, sums, average pooling
            and neurons.

    Returns:
        A ``nir.NIRGraph``. ``nir.write(path, graph)`` stores it.

    Raises:
        LoweringError: If an operation has no NIR node; names it.
        InputTypeError: If ``program`` is none.
        MissingDependencyError: If ``nir`` is not installed.
    """
    nir = _nir()
    checks.program(program, "to_nir").validate()
    nodes: dict[str, Any] = {}
    edges: list[tuple[str, str]] = []
    unsaid: dict[int, str] = {}  # outputs that are potentials of firing neurons -> the neuron
    shape = np.array(program.values[0].shape)
    nodes["input"] = nir.Input(input_type={"input": shape})
    writer: dict[int, str] = {0: "input"}

    def put(name: str, node: Any, *sources: int | str) -> str:
        nodes[name] = node
        edges.extend((s if isinstance(s, str) else writer[s], name) for s in sources)
        return name

    keys = _keys(program)
    for op in program.ops:
        source, target = program.values[_source(op)], program.values[op.target]
        key = keys[op.name]
        if isinstance(op, Conv):
            weight = _conv_weight(op, source.shape[0])
            alpha = op.multiplier / 2.0 ** op.shift.astype(np.float64) * target.scale / source.scale
            bias = op.bias * target.scale
            flat = source.shape[1:] == (1, 1) == target.shape[1:] and op.groups == 1
            if flat:
                dot = nir.Linear(weight=weight[:, :, 0, 0])
                dot = put(f"{key}_weight", dot, op.source)
            else:
                top, left, bottom, right = op.padding
                if (top, left) != (bottom, right):
                    raise LoweringError(
                        f"{op.name}: NIR has no uneven padding; pad both sides alike"
                    )
                dot = nir.Conv2d(
                    input_shape=source.shape[1:], weight=weight, stride=op.stride,
                    padding=(top, left), dilation=op.dilation, groups=op.groups,
                    bias=np.zeros(target.shape[0], np.float32),
                )  # fmt: skip
                dot = put(f"{key}_weight", dot, op.source)
            spread = np.broadcast_to(alpha[:, None, None], target.shape)
            scaled = put(f"{key}_scale", nir.Scale(scale=_like(spread, flat)), dot)
            offset = np.broadcast_to(bias[:, None, None], target.shape)
            writer[op.target] = _bias(nir, put, key, scaled, _like(offset, flat))
        elif isinstance(op, Affine):
            gain = op.multiplier / 2.0 ** op.shift.astype(np.float64) * target.scale / source.scale
            spread = np.broadcast_to(gain[:, None, None], target.shape)
            scaled = put(f"{key}_scale", nir.Scale(scale=np.array(spread)), op.source)
            offset = np.broadcast_to((op.bias * target.scale)[:, None, None], target.shape)
            writer[op.target] = _bias(nir, put, key, scaled, np.array(offset))
        elif isinstance(op, Add):
            gains = [f * target.scale / program.values[i].scale
                     for i, f in zip(op.sources, op.factors, strict=True)]  # fmt: skip
            scaled_sources = [
                put(f"{key}_in{k}", nir.Scale(scale=np.full(target.shape, g)), i)
                for k, (i, g) in enumerate(zip(op.sources, gains, strict=True))
            ]
            one = nir.Scale(scale=np.ones(target.shape))
            writer[op.target] = put(f"{key}_sum", one, *scaled_sources)
        elif isinstance(op, Neuron):
            node = _neuron(nir, op, source.scale, target.shape)
            if op.membrane is not None:
                _refuse_read_potentials(program, op)
                if op.target in program.outputs or any(
                    op.target in sources_of(later) for later in program.ops
                ):
                    unsaid[op.membrane] = op.name
                elif op.reset == "none":  # spikes that nobody reads: it only integrates
                    node = nir.LI(tau=node.tau, r=node.r, v_leak=node.v_leak)
                else:
                    raise LoweringError(
                        f"{op.name}: a NIR neuron emits spikes, and only its membrane potential is "
                        "returned; return the spikes too, or make it a read-out without reset"
                    )
            writer[op.target] = put(key, node, op.source)
            if op.membrane is not None:
                writer[op.membrane] = key
        elif isinstance(op, Pool) and op.function == "sum":
            if op.padding[:2] != op.padding[2:]:
                raise LoweringError(f"{op.name}: NIR has no uneven padding; pad both sides alike")
            node = nir.AvgPool2d(
                kernel_size=np.array(op.kernel), stride=np.array(op.stride),
                padding=np.array(op.padding[:2]),
            )  # fmt: skip
            area = op.kernel[0] * op.kernel[1] * target.scale / source.scale
            pooled = put(f"{key}_mean", node, op.source)
            gain = np.full(target.shape, area)
            writer[op.target] = put(f"{key}_total", nir.Scale(scale=gain), pooled)
        else:
            what = op.function if isinstance(op, Pool | Logic) else type(op).__name__
            raise LoweringError(
                f"{op.name}: NIR has no node for {what!r}; keep to convolutions, sums and average "
                "pooling, or pass the .qsnn file on instead"
            )
    for k, index in enumerate(program.outputs):
        if index in unsaid:
            continue
        shape = np.array(program.values[index].shape)
        put(f"output{k or ''}", nir.Output(output_type={"output": shape}), index)
    metadata = {
        "qsnn_program": base64.b64encode(dump_program(program)).decode(),
        "qsnn_quantization": json.dumps(_quantization(program)),
        "qsnn_potentials": json.dumps(
            {f"output{program.outputs.index(i) or ''}": name for i, name in unsaid.items()}
        ),
    }
    return nir.NIRGraph(nodes=nodes, edges=edges, metadata=metadata, type_check=False)


def _refuse_read_potentials(program: Program, neuron: Neuron) -> None:
    if any(neuron.membrane in sources_of(op) for op in program.ops):
        raise LoweringError(
            f"{neuron.name}: a NIR neuron emits spikes, and a layer reads its membrane potential; "
            "read its spikes instead"
        )


def from_nir(graph: Any) -> Program:
    """The program a graph of :func:`to_nir` was written from.

    The weights in the graph are compared with those of the embedded program, so a graph whose
    weights were edited is refused rather than silently replaced.

    Args:
        graph: A ``nir.NIRGraph``, fresh or read back with ``nir.read``.

    Raises:
        FormatError: If the graph was not written by :func:`to_nir`, or was changed since.
    """
    text = (getattr(graph, "metadata", None) or {}).get("qsnn_program")
    if isinstance(text, np.ndarray):
        text = text.item()
    if isinstance(text, bytes):
        text = text.decode()
    if not isinstance(text, str):
        raise FormatError("the NIR graph carries no qsnn program: only to_nir's own graphs go back")
    try:
        content = base64.b64decode(text, validate=True)
    except ValueError as error:
        raise FormatError("the qsnn program in the NIR graph is damaged") from error
    program = parse_program(content, "the NIR graph")
    keys = _keys(program)
    for op in program.ops:
        if isinstance(op, Conv):
            node = graph.nodes.get(keys[op.name] + "_weight")
            expected = _conv_weight(op, program.values[op.source].shape[0])
            found = None if node is None else np.asarray(node.weight)
            if found is None or not np.array_equal(found.reshape(-1), expected.reshape(-1)):
                raise FormatError(f"the weights of {op.name} were changed in the NIR graph")
    return program


#: What is appended to an operation's name in the names of its nodes.
_PARTS = (
    "",
    "_weight",
    "_scale",
    "_bias",
    "_sum",
    "_mean",
    "_total",
    *(f"_in{k}" for k in range(16)),
)


def _keys(program: Program) -> dict[str, str]:
    """Names of nodes: [A-Za-z0-9_] of an operation's name, and no two alike.

    Nodes become groups and paths of an HDF5 file, and names of modules for those who read it.
    """
    taken = {"input", *(f"output{k or ''}" for k in range(16))}
    keys: dict[str, str] = {}
    for op in program.ops:
        plain = key = re.sub("[^A-Za-z0-9_]", "_", op.name)
        count = 1
        while not taken.isdisjoint(key + part for part in _PARTS):
            count += 1
            key = f"{plain}_{count}"
        taken.update(key + part for part in _PARTS)
        keys[op.name] = key
    return keys


def _source(op: Any) -> int:
    return sources_of(op)[0]


def _like(array: np.ndarray[Any, Any], flat: bool) -> np.ndarray[Any, Any]:
    return np.array(array.reshape(-1) if flat else array)


def _bias(nir: Any, put: Any, key: str, source: str, offset: np.ndarray[Any, Any]) -> str:
    """NIR's bias node is an affine map; a threshold-free constant current is its cheapest form."""
    if not offset.any():
        return source
    if offset.ndim == 1:
        node = nir.Affine(weight=np.eye(offset.size), bias=offset)
    else:
        channels = offset.shape[0]
        node = nir.Conv2d(
            input_shape=offset.shape[1:], weight=np.ones((channels, 1, 1, 1), np.float32),
            stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=channels, bias=offset[:, 0, 0],
        )  # fmt: skip
    name: str = put(f"{key}_bias", node, source)
    return name


def _conv_weight(op: Conv, channels: int) -> np.ndarray[Any, Any]:
    """Weight codes ``[C_out, C_in/groups, kh, kw]`` as float32: -1 and +1 where binary."""
    codes = unpack_weight(op)
    groups, _, cout = codes.shape
    kh, kw = op.kernel
    shaped = codes.reshape(groups, kh, kw, channels // groups, cout).transpose(0, 4, 3, 1, 2)
    return np.ascontiguousarray(shaped.reshape(groups * cout, -1, kh, kw).astype(np.float32))


def _neuron(nir: Any, op: Neuron, unit: float, shape: tuple[int, int, int]) -> Any:
    """The LIF node whose Euler step with dt = 1 is ``v <- decay*v + x``."""
    if op.bits == 32:
        decay = op.leak[:, 0] / 2.0 ** op.leak[:, 1]
    else:
        # The slope of the leak table against the middle of each level's interval.
        width = np.diff(op.bounds).astype(np.float64)
        step = float(width[width > 0].mean()) if (width > 0).any() else 1.0
        decay = np.clip((op.leak[:, 1] - op.leak[:, 0]) / step, 0.0, 1.0)
    tau = 1.0 / np.maximum(1.0 - decay, 1e-6)

    def full(v: Any) -> Any:
        v = np.atleast_1d(np.asarray(v, np.float64))
        return np.array(np.broadcast_to(v[:, None, None] if v.size > 1 else v, shape))

    theta = op.threshold if op.order == "fire_first" else op.threshold * 0 + op.reset_value
    value = op.reset_value if op.reset == "hard" else op.reset_value * 0
    return nir.LIF(
        tau=full(tau), r=full(tau), v_leak=full(0.0), v_threshold=full(theta * unit),
        v_reset=full(value * unit),
    )  # fmt: skip


def _quantization(program: Program) -> dict[str, Any]:
    """Widths of everything, for readers that want to know and not to rebuild."""
    report: dict[str, Any] = {}
    for op in program.ops:
        if isinstance(op, Conv):
            report[op.name] = {"weight_bits": 1 if op.binary else 8}
        elif isinstance(op, Neuron):
            report[op.name] = {
                f.name: getattr(op, f.name)
                for f in fields(op)
                if f.name in ("bits", "reset", "order", "delay", "ceiling")
            }
    return report
