// The rules that make an integer program valid, and the proof, by interval arithmetic, that no
// int32 can overflow: what Program.validate does in Python. Numbers that may pass 2^53 are BigInts.

import { QSNNError } from "./errors.js";

export const INT32_MAX = 2 ** 31 - 1;
const WIDE_LIMIT = 2 ** 30 - 1; // a 32-bit membrane saturates here
const MAX_DIMENSION = 2 ** 16, MAX_ELEMENTS = 2 ** 26, MAX_OPS = 4096;

/** Number of 32-bit words that hold so many bits. */
export const words = (bits) => Math.ceil(bits / 32);
export const elements = (value) => value.shape.reduce((a, b) => a * b, 1);
export const sourcesOf = (op) => op.sources ?? [op.source];
export const targetsOf = (op) =>
  typeof op.membrane === "number" ? [op.target, op.membrane] : [op.target];
/** Bits of state of a neuron, and its largest code. */
export const stateBits = (n) => n.bits + (n.delay === "none" ? 0 : 1);
export const levelsOf = (n) => (n.bits === 32 ? 0 : 2 ** (n.bits - 1) - 1);
/** Largest absolute entry of a tensor. */
const largest = (tensor) => tensor.data.reduce((a, b) => Math.max(a, Math.abs(b)), 0);

const isInt = (n, lo, hi) => Number.isInteger(n) && n >= lo && n <= hi;
const isList = (x, length, lo, hi) =>
  Array.isArray(x) && x.length === length && x.every((n) => isInt(n, lo, hi));
const isText = (x) => typeof x === "string";
const isScale = (x) => typeof x === "number" && x > 0 && x < 1e30;

function need(holds, where, what) {
  if (!holds) throw new QSNNError(`invalid program: ${where}: ${what}`);
}

/** Check every rule of a program; throws a QSNNError that names the operation. */
export function validate(p) {
  need(p.values.length >= 1 && p.values.length <= 4 * MAX_OPS && p.ops.length >= 1 &&
    p.ops.length <= MAX_OPS, "program", "it needs 1 to 4096 operations and a value for each");
  const names = new Set();
  for (const v of p.values) {
    need(isText(v.name) && v.name.length > 0 && v.name.length <= 512 && !names.has(v.name),
      "value", "names must be 1 to 512 characters, each once");
    names.add(v.name);
    need(isList(v.shape, 3, 1, MAX_DIMENSION) && elements(v) <= MAX_ELEMENTS, v.name,
      "its shape is not three sizes");
    need(isInt(v.planes, 0, 16) && isScale(v.scale), v.name, "planes or scale are out of range");
  }
  need(p.values.reduce((sum, v) => sum + elements(v), 0) <= 4 * MAX_ELEMENTS, "program",
    "its activations are too large");
  need(isList(p.inputRange, 2, -32768, 32767) && p.inputRange[0] <= 0 && p.inputRange[1] >= 0 &&
    p.values[0].planes === 0 && isScale(p.inputScale), "input", "its codes are out of range");
  need(["none", "sum", "mean"].includes(p.reduction), "program", "unknown reduction");
  need(isInt(p.timesteps, 1, 2 ** 16), "program", "its time steps are out of range");
  const ranges = new Array(p.values.length).fill(null);
  ranges[0] = p.inputRange;
  names.clear();
  for (const op of p.ops) {
    need(isText(op.name) && op.name.length > 0 && op.name.length <= 512 && !names.has(op.name),
      "operation", "names must be 1 to 512 characters, each once");
    names.add(op.name);
    const sources = sourcesOf(op), targets = targetsOf(op);
    // A delay may take what is written later.
    need(Array.isArray(sources) && sources.every((i) => isInt(i, 0, p.values.length - 1)) &&
      (op.op === "Delay" || sources.every((i) => ranges[i] !== null)), op.name,
      "it reads a value before it is written");
    need(targets.every((i) => isInt(i, 1, p.values.length - 1) && ranges[i] === null) &&
      new Set(targets).size === targets.length, op.name, "it writes a value that has one already");
    RULES[op.op](p, op, ranges);
  }
  need(Array.isArray(p.outputs) && p.outputs.length >= 1 && p.outputs.length <= 16 &&
    p.outputs.every((i) => isInt(i, 0, p.values.length - 1) && ranges[i] !== null), "program",
    "it needs 1 to 16 outputs that are written");
  need(ranges.every((r) => r !== null), "program", "some value is never written");
  need(Object.values(p.metadata).every(isText), "metadata", "they must be text");
  const [, height, width] = p.values[0].shape, ranks = outputRanks(p);
  need(height === 1 || ["1", "2"].indexOf(p.metadata.input_rank) < 0, "metadata",
    "the rank of the input contradicts its shape");
  need(width === 1 || p.metadata.input_rank !== "1", "metadata",
    "the rank of the input contradicts its shape");
  need(["1", "2", "3"].includes(p.metadata.input_rank ?? "3") && ranks.length === p.outputs.length &&
    ranks.every((r) => isInt(r, 1, 3)), "metadata", "impossible ranks");
  for (const key of ["input_gain", "input_bias"]) {
    const numbers = (p.metadata[key] ?? "1").split(",").map((n) => (n.trim() ? Number(n) : NaN));
    need([1, p.values[0].shape[0]].includes(numbers.length) && numbers.every(Number.isFinite),
      "metadata", `${key} must be one finite number or one per channel`);
  }
}

/** Axes of every answer per sample and time step. */
export const outputRanks = (p) =>
  p.metadata.output_ranks ? p.metadata.output_ranks.split(",").map(Number) : p.outputs.map(() => 3);

function setRange(p, op, ranges, target, lo, hi) {
  const { planes } = p.values[target];
  if (planes) need(lo >= 0 && hi < 2 ** planes, op.name, "its results do not fit the bit planes");
  else need(Math.max(-lo, hi) <= INT32_MAX, op.name, "its result may exceed int32");
  ranges[target] = [lo, hi];
}

function hasShape(op, name, ...shape) {
  const given = op[name].shape;
  need(given.length === shape.length && given.every((n, i) => n === shape[i]), op.name,
    `${name} has shape [${given}] where [${shape}] was expected`);
}

function checkGeometry(op, src, dst, dilation) {
  const { kernel, stride, padding } = op;
  need([kernel, stride, dilation].every((x) => isList(x, 2, 1, 4096)) &&
    isList(padding, 4, 0, 4096), op.name, "its geometry is out of range");
  for (const axis of [0, 1]) {
    const size = src.shape[1 + axis] + padding[axis] + padding[axis + 2];
    const out = Math.floor((size - dilation[axis] * (kernel[axis] - 1) - 1) / stride[axis]) + 1;
    need(out === dst.shape[1 + axis], op.name, "its output shape does not follow from its geometry");
  }
}

/** Interval of ((x * multiplier + half) >> shift) + bias for x in [lo[c], hi[c]]. */
function fixedPoint(op, channels, lo, hi) {
  for (const name of ["multiplier", "shift", "bias"]) hasShape(op, name, channels);
  let low = Infinity, high = -Infinity;
  for (let c = 0; c < channels; c++) {
    const shift = op.shift.data[c];
    need(shift >= 1 && shift <= 46, op.name, "shifts must be 1 to 46");
    for (const x of [lo[c], hi[c]]) {
      const product = BigInt(x) * BigInt(op.multiplier.data[c]) + (1n << BigInt(shift - 1));
      const y = Number(product >> BigInt(shift)) + op.bias.data[c];
      low = Math.min(low, y);
      high = Math.max(high, y);
    }
  }
  return [low, high];
}

/** Interval of the products of two intervals. */
const products = (a, b) => {
  const ends = a.flatMap((x) => b.map((y) => x * y));
  return [Math.min(...ends), Math.max(...ends)];
};

const RULES = {
  Gather(p, op, ranges) {
    const src = p.values[op.source], dst = p.values[op.target];
    need(src.planes === dst.planes, op.name, "it must keep the bit planes");
    let reach = 0, zeros = false;
    ["channel", "row", "column"].forEach((name, axis) => {
      hasShape(op, name, dst.shape[axis]);
      const { data } = op[name];
      need(data.every((n) => n >= -1), op.name, `${name} must hold numbers of -1 or more`);
      zeros ||= data.includes(-1);
      reach += Math.max(0, data.reduce((a, b) => Math.max(a, b), 0));
    });
    need(reach < elements(src), op.name, "it reaches beyond its source");
    const [lo, hi] = ranges[op.source];
    setRange(p, op, ranges, op.target, ...(zeros ? [Math.min(lo, 0), Math.max(hi, 0)] : [lo, hi]));
  },

  Concat(p, op, ranges) {
    const dst = p.values[op.target], parts = op.sources.map((i) => p.values[i]);
    need(parts.length >= 2 && parts.length <= 64, op.name, "it needs 2 to 64 sources");
    need(parts.every((v) => v.shape[1] === dst.shape[1] && v.shape[2] === dst.shape[2] &&
      (v.planes === 0) === (dst.planes === 0)), op.name, "its operands do not fit each other");
    need(parts.reduce((sum, v) => sum + v.shape[0], 0) === dst.shape[0], op.name,
      "its channels are not those of its operands together");
    const ends = op.sources.map((i) => ranges[i]);
    setRange(p, op, ranges, op.target, Math.min(...ends.map((e) => e[0])),
      Math.max(...ends.map((e) => e[1])));
  },

  Matmul(p, op, ranges) {
    const values = [...op.sources, op.target].map((i) => p.values[i]), { heads, transpose } = op;
    need(op.sources.length === 2 && Array.isArray(transpose) && transpose.length === 2 &&
      transpose.every((t) => typeof t === "boolean"), op.name,
      "it needs two sources, and whether each is transposed");
    need(isInt(heads, 1, MAX_DIMENSION) && values.every((v) => v.shape[0] % heads === 0), op.name,
      "heads must divide the channels");
    const [[i, k], [same, j], product] = values.map((v, n) => {
      const size = [v.shape[1] * v.shape[2], v.shape[0] / heads];
      return transpose[n] ? size.reverse() : size;
    });
    need(k === same && product[0] === i && product[1] === j, op.name, "its matrices do not fit");
    const ends = products(ranges[op.sources[0]], ranges[op.sources[1]]).map((x) => x * k);
    need(Math.max(-ends[0], ends[1]) <= INT32_MAX, op.name, "its sums may exceed int32");
    setRange(p, op, ranges, op.target, ...ends);
  },

  Delay(p, op, ranges) {
    const src = p.values[op.source], dst = p.values[op.target];
    need(String(src.shape) === String(dst.shape) && src.planes === dst.planes, op.name,
      "a delay keeps shape and planes");
    if (dst.planes > 0) return setRange(p, op, ranges, op.target, 0, 2 ** dst.planes - 1);
    const neuron = p.ops.find(
      (n) => n.op === "Neuron" && n.membrane === op.source && n.bits !== 32);
    const reading = neuron?.reading?.data;
    need(reading instanceof Int32Array && reading.length > 0, op.name,
      "it delays counts, spikes, or membrane outputs of neurons of 8 bits or less");
    setRange(p, op, ranges, op.target, Math.min(0, ...reading), Math.max(0, ...reading));
  },

  Conv(p, op, ranges) {
    const src = p.values[op.source], dst = p.values[op.target], g = op.groups;
    checkGeometry(op, src, dst, op.dilation);
    need(isInt(g, 1, MAX_DIMENSION) && src.shape[0] % g === 0 && dst.shape[0] % g === 0, op.name,
      "groups must divide the channels");
    need(dst.planes === 0, op.name, "a convolution writes int32");
    const rows = op.kernel[0] * op.kernel[1] * (src.shape[0] / g), cout = dst.shape[0] / g;
    const reach = Math.max(-ranges[op.source][0], ranges[op.source][1]);
    const bound = new Array(dst.shape[0]).fill(rows * reach);
    if (op.weight.dtype === "U32") {
      const columns = words(cout);
      hasShape(op, "weight", g, rows, columns);
      if (cout % 32)
        for (let i = columns - 1; i < op.weight.data.length; i += columns)
          need(op.weight.data[i] >>> (cout % 32) === 0, op.name,
            "weight bits beyond the last channel must be 0");
    } else {
      hasShape(op, "weight", g, rows, cout);
      bound.fill(0);
      op.weight.data.forEach((w, i) => {
        bound[Math.floor(i / (rows * cout)) * cout + (i % cout)] += Math.abs(w) * reach;
      });
    }
    need(bound.every((b) => b <= INT32_MAX), op.name, "its accumulator may exceed int32");
    const [lo, hi] = fixedPoint(op, dst.shape[0], bound.map((b) => -b), bound);
    setRange(p, op, ranges, op.target, lo, hi);
  },

  Affine(p, op, ranges) {
    const src = p.values[op.source], dst = p.values[op.target], c = src.shape[0];
    need(String(src.shape) === String(dst.shape) && dst.planes === 0, op.name,
      "it must keep the shape and write int32");
    const [lo, hi] = ranges[op.source];
    const ends = fixedPoint(op, c, new Array(c).fill(lo), new Array(c).fill(hi));
    setRange(p, op, ranges, op.target, ...ends);
  },

  Add(p, op, ranges) {
    const { sources, factors, target } = op;
    need(sources.length >= 2 && sources.length <= 16 &&
      isList(factors, sources.length, -INT32_MAX, INT32_MAX), op.name,
      "it needs 2 to 16 sources and a factor for each");
    let lo = 0, hi = 0;
    sources.forEach((source, k) => {
      need(String(p.values[source].shape) === String(p.values[target].shape), op.name,
        "its operands differ in shape");
      const ends = ranges[source].map((x) => x * factors[k]);
      lo += Math.min(...ends);
      hi += Math.max(...ends);
      need(Math.max(-lo, hi, ...ends.map(Math.abs)) <= INT32_MAX, op.name,
        "its result may exceed int32");
    });
    setRange(p, op, ranges, target, lo, hi);
  },

  Logic(p, op, ranges) {
    const dst = p.values[op.target];
    need(op.sources.length === 2 && ["and", "iand"].includes(op.function) && dst.planes === 1,
      op.name, "it needs two sources, a known function and spikes as target");
    for (const i of op.sources)
      need(String(p.values[i].shape) === String(dst.shape) && p.values[i].planes === 1, op.name,
        "its operands must be spikes of the same shape");
    setRange(p, op, ranges, op.target, 0, 1);
  },

  Pool(p, op, ranges) {
    const src = p.values[op.source], dst = p.values[op.target];
    let [lo, hi] = ranges[op.source];
    need(src.shape[0] === dst.shape[0], op.name, "it must keep the channels");
    need(["max", "sum", "repeat"].includes(op.function), op.name, "unknown function");
    need((src.planes === 0) === (dst.planes === 0), op.name,
      "it cannot turn int32 into bit planes or back");
    need(op.function === "sum" || src.planes === dst.planes, op.name,
      "it must keep the bit planes");
    if (op.function === "repeat") {
      need(isList(op.kernel, 2, 1, MAX_DIMENSION) && isList(op.stride, 2, 1, 1) &&
        isList(op.padding, 4, 0, 0) &&
        [1, 2].every((i) => dst.shape[i] === src.shape[i] * op.kernel[i - 1]), op.name,
        "its output shape does not follow from its geometry");
    } else {
      checkGeometry(op, src, dst, [1, 1]);
      need(op.padding.every((n, i) => n < op.kernel[i % 2]), op.name,
        "padding must be smaller than the kernel");
    }
    if (op.function === "sum") {
      const area = op.kernel[0] * op.kernel[1];
      [lo, hi] = [Math.min(lo * area, 0), Math.max(hi * area, 0)];
    }
    setRange(p, op, ranges, op.target, lo, hi);
  },

  Neuron(p, op, ranges) {
    const src = p.values[op.source], dst = p.values[op.target], c = src.shape[0];
    need(String(src.shape) === String(dst.shape) && dst.planes === 1, op.name,
      "a neuron writes spikes of the shape it reads");
    need(["hard", "soft", "none"].includes(op.reset) && ["none", "table"].includes(op.delay) &&
      ["fire_first", "quantize_first"].includes(op.order), op.name,
      "unknown reset, delay or order");
    for (const name of ["threshold", "reset_value"])
      hasShape(op, name, op[name].shape[0] === 1 ? 1 : c);
    need(op.leak.shape.length === 2 && [1, c].includes(op.leak.shape[0]), op.name,
      `leak needs 1 or ${c} rows`);
    need(isInt(op.ceiling, -127, 127) && isInt(op.initial, -WIDE_LIMIT, WIDE_LIMIT), op.name,
      "initial or ceiling is out of range");
    const reach = Math.max(-ranges[op.source][0], ranges[op.source][1]);
    const given = typeof op.membrane === "number";
    need(given || op.membrane === null, op.name, "its membrane output is malformed");
    const [lo, hi] = (op.bits === 32 ? wideNeuron : narrowNeuron)(op, reach, given);
    if (!given) hasShape(op, "reading", 0);
    setRange(p, op, ranges, op.target, 0, 1);
    if (!given) return;
    const m = p.values[op.membrane];
    need(String(m.shape) === String(src.shape) && m.planes === 0, op.name,
      "its membrane output must be int32 of the same shape");
    setRange(p, op, ranges, op.membrane, lo, hi);
  },
};

/** A 32-bit membrane potential; returns the interval of its reading. */
function wideNeuron(op, reach, given) {
  hasShape(op, "leak", op.leak.shape[0], 3);
  hasShape(op, "bounds", 0);
  need(op.order === "fire_first", op.name, "a 32-bit membrane is not quantized");
  let offset = 0;
  for (let i = 0; i < op.leak.data.length; i += 3) {
    const [multiplier, shift, add] = op.leak.data.subarray(i, i + 3);
    need(multiplier >= 0 && shift >= 1 && shift <= 31 && multiplier <= 2 ** shift, op.name,
      "a leak must be from 0 to 1");
    offset = Math.max(offset, Math.abs(add));
  }
  need(WIDE_LIMIT + 1 + reach + offset + largest(op.reset_value) <= INT32_MAX, op.name,
    "its charge may exceed int32");
  if (!given) return [0, 0];
  hasShape(op, "reading", 2);
  need(op.reading.data[0] === 0, op.name, "reading[0] must be 0");
  const extra = Math.abs(op.reading.data[1]);
  return [-WIDE_LIMIT - extra, WIDE_LIMIT + extra];
}

/** 2 to 8 bits; returns the interval of its reading. */
function narrowNeuron(op, reach, given) {
  need(isInt(op.bits, 2, 8), op.name, "bits must be 2 to 8, or 32");
  const n = levelsOf(op), size = 2 ** stateBits(op);
  hasShape(op, "leak", op.leak.shape[0], size);
  hasShape(op, "bounds", 2 * n);
  need(op.bounds.data.every((b, i, all) => i === 0 || all[i - 1] <= b), op.name,
    "bounds must ascend");
  need(op.initial >= 0 && op.initial < size && op.ceiling >= -n, op.name,
    "initial or ceiling is out of range");
  need(largest(op.leak) + reach + largest(op.reset_value) <= INT32_MAX, op.name,
    "its charge may exceed int32");
  if (!given) return [0, 0];
  hasShape(op, "reading", size);
  return [Math.min(...op.reading.data), Math.max(...op.reading.data)];
}
