// From a program to the image that the runtime executes: the simplest one there is. Layers of bits
// are counted event-driven, all other convolutions row by row, and every value has a place of its
// own, so that spikes can be looked at after a step. (Python's layout.py also shares memory and
// stores what makes layers faster; runtime and records are the same.)

import { CODES, LAYOUT, RECORDS } from "./records.js";
import { elements, levelsOf, stateBits, words } from "./program.js";
import { QSNNError } from "./errors.js";

export { LAYOUT };
const MEMORY_LIMIT = 256 * 2 ** 20; // bytes
const TAIL = 16; // words after the last parameter: vector loads may read that far past it

const code = (group, name) => CODES[group].indexOf(name);
const roundUp = (n, to) => Math.ceil(n / to) * to;
const sizeOf = (name) =>
  RECORDS[name].reduce((sum, [, kind]) => sum + (kind ? sizeOf(kind) : 1), 0);

/** Hands out stretches of words, each at the start of 16 bytes. */
class Region {
  size = 0;
  take(count) {
    const offset = this.size;
    this.size += roundUp(count, 4);
    return offset;
  }
}

/**
 * Image of a valid program, and where its neurons and values lie.
 * @returns {{words: Uint32Array, stateWords: number, arenaWords: number, layers: object[]}}
 */
export function buildImage(program) {
  const image = new Region(), state = new Region(), arena = new Region();
  const pieces = []; // [offset, words]
  const store = (array) => {
    const offset = image.take(array.length);
    pieces.push([offset, array]);
    return array.length ? offset : 0;
  };
  const write = (name, offset, given) => {
    const flat = [];
    const encode = (record, fields) => {
      for (const [field, kind] of RECORDS[record]) {
        if (kind) encode(kind, fields[field]);
        else if (Number.isInteger(fields[field])) flat.push(fields[field]);
        else throw new QSNNError(`the image's ${record} has no ${field}: another version`);
      }
    };
    encode(name, given);
    pieces.push([offset, Int32Array.from(flat)]);
    return offset;
  };
  const record = (name, given) => write(name, image.take(sizeOf(name)), given);

  const header = image.take(sizeOf("header"));
  const values = program.values.map((v) => {
    const [channels, height, width] = v.shape, pixels = height * width;
    const stride = v.planes ? v.planes * words(channels) : words(channels) * 32;
    const offset = arena.take(pixels * stride);
    within(4 * arena.size);
    return {
      ...v, channels, height, width, pixels, stride, words: words(channels), offset,
      record: record("value",
        { channels, height, width, pixels, planes: v.planes, words: words(channels), stride, offset }),
    };
  });
  const workspace = arena.size;
  const widest = roundUp(Math.max(...values.map((v) => v.channels)), 64) + 64;
  const [line, other] = [0, widest]; // in the workspace, before what a step needs beside
  let workspaceWords = 0;
  const neurons = [], layers = [], steps = [];
  const ends = []; // what a step ends with: values that delays keep

  for (const op of program.ops) {
    const work = new Region();
    work.take(2 * widest);
    const target = values[op.target], source = values[op.source ?? op.sources[0]];
    const step = {
      kind: 0, source: source.record, target: target.record, add: 0, self_factor: 1,
      add_factor: 0, neuron: 0,
    };
    const place = (fields) => {
      const kind = fields.name;
      return record(kind, { step: { ...step, kind: code("kind", kind) }, ...fields });
    };
    if (op.op === "Conv") {
      const bits = op.weight.dtype === "U32";
      const name = bits && source.planes && op.groups === 1 ? "events" : "rows";
      const fields = name === "events" ? events(op, source, target, work) : rows(op, source, target, work);
      const weight = store(name === "events" ? eventRows(op) : bits ? op.weight.data : bytes(op.weight.data));
      steps.push(place({ name, window: window(op), scale: scale(op, store), ...fields, weight }));
    } else if (op.op === "Affine") {
      steps.push(place({ name: "affine", scale: scale(op, store) }));
    } else if (op.op === "Add") {
      const pairs = op.sources.flatMap((s, k) => [values[s].record, op.factors[k]]);
      steps.push(place({ name: "add", list: store(Int32Array.from(pairs)), count: op.sources.length }));
    } else if (op.op === "Logic") {
      const second = values[op.sources[1]].record;
      steps.push(place({ name: "logic", second, function: code("logic", op.function) }));
    } else if (op.op === "Pool") {
      steps.push(place(
        { name: "pool", window: window({ dilation: [1, 1], ...op }), function: code("pool", op.function) }));
    } else if (op.op === "Gather") {
      const [channels, height, width] = source.shape;
      const stays = channels === op.channel.data.length &&
        op.channel.data.every((n, c) => n === c * height * width);
      const [channel, row, column] = ["channel", "row", "column"].map((f) => store(op[f].data));
      steps.push(place({ name: "gather", channel, row, column, in_order: stays ? 1 : 0 }));
    } else if (op.op === "Concat") {
      const list = store(Int32Array.from(op.sources, (i) => values[i].record));
      steps.push(place({ name: "concat", list, count: op.sources.length }));
    } else if (op.op === "Matmul") {
      const [first, second] = op.transpose.map(Number);
      steps.push(place({
        name: "matmul", second: values[op.sources[1]].record, heads: op.heads,
        inner: first ? source.pixels : source.channels / op.heads,
        columns: target.channels / op.heads, flip_first: first, flip_second: second,
      }));
    } else if (op.op === "Delay") {
      const kept = state.take(source.pixels * source.stride);
      within(4 * state.size);
      steps.push(place({ name: "delay", state: kept }));
      ends.push(() => place({ name: "keep", state: kept }));
    } else {
      const pitch = op.bits === 32 ? source.channels : stateBits(op) * source.words;
      const layer = {
        name: op.name, shape: target.shape, bits: op.bits, levels: levelsOf(op),
        stateBits: op.bits === 32 ? 32 : stateBits(op), pitch, state: state.take(source.pixels * pitch),
        spikes: target,
      };
      within(4 * state.size);
      layers.push(layer);
      step.neuron = record("neuron", neuron(op, source, target, values, layer, store));
      neurons.push(step.neuron);
      steps.push(place({ name: "fire" }));
    }
    workspaceWords = Math.max(workspaceWords, work.size);
    within(4 * (image.size + state.size + workspace + workspaceWords));
  }
  steps.push(...ends.map((end) => end()));
  const lists = {
    steps: store(Int32Array.from(steps)), neurons: store(Int32Array.from(neurons)),
    outputs: store(Int32Array.from(program.outputs, (i) => values[i].record)),
  };
  const imageWords = image.size + TAIL;
  write("header", header, {
    ...lists, image_words: imageWords, state_words: state.size,
    arena_words: workspace + workspaceWords, input_words: elements(program.values[0]),
    output_words: program.outputs.reduce((sum, i) => sum + elements(program.values[i]), 0),
    input: values[0].record, step_count: steps.length, neuron_count: neurons.length,
    output_count: program.outputs.length, workspace, workspace_words: workspaceWords,
    line, other,
  });
  const whole = new Uint32Array(imageWords);
  for (const [offset, array] of pieces) whole.set(array, offset);
  return { words: whole, stateWords: state.size, arenaWords: workspace + workspaceWords, layers };
}

function within(bytes) {
  if (bytes > MEMORY_LIMIT)
    throw new QSNNError(`the program needs more than ${MEMORY_LIMIT} bytes of memory`);
}

function window({ kernel, stride, padding, dilation }) {
  const [kh, kw] = kernel, [sh, sw] = stride, [dh, dw] = dilation, [top, left] = padding;
  return { kh, kw, sh, sw, dh, dw, top, left };
}

function scale(op, store) {
  return {
    multiplier: store(op.multiplier.data), shift: store(bytes(op.shift.data)),
    bias: store(op.bias.data), channels: op.multiplier.data.length, product32: 0,
  };
}

/** Rows of bits, and a row of zeros after the last. */
function eventRows(op) {
  const whole = new Uint32Array(op.weight.data.length + op.weight.shape[2]);
  whole.set(op.weight.data);
  return whole;
}

/** Bytes in words, the first the lowest. */
function bytes(data) {
  const whole = new Uint32Array(Math.ceil(data.length / 4));
  data.forEach((b, i) => (whole[i >> 2] |= (b & 255) << (8 * (i & 3))));
  return whole;
}

/** What listing and counting active inputs works in. */
function events(op, source, target, work) {
  const [kh, kw] = op.kernel, [, rows, columns] = op.weight.shape, cin = source.channels;
  const centre = rows * (2 ** source.planes - 1), depth = 32 - Math.clz32(centre);
  const deepest = Math.max(5, depth), out = target.width;
  const span = Math.min(op.dilation[0] * (kh - 1) + 1, source.height);
  const ring = source.width * words(cin) * 32 + 16;
  const counts = roundUp(out * columns + 16, 4);
  const listed = work.take(Math.max(rows + 32, columns * 32));
  return {
    joined: 0, pitch: 4 * columns, tap: 4 * cin * columns, kernel_row: 4 * kw * cin * columns,
    zeros: 4 * rows * columns, depth, deepest, centre, method: code("method", "events"), dense: 0,
    dense_rows: 0, firing: 0, firing_block: 0, after: 0, span, starts_pitch: source.width + 1,
    starts: work.take(span * source.planes * (source.width + 1)), ring_pitch: ring,
    ring: work.take(span * source.planes * ring + 16), list: listed, dense_counts: listed,
    together: work.take(deepest * roundUp(kw * columns, 16)),
    together_pitch: roundUp(kw * columns, 16), counts_pitch: counts,
    counts: work.take(source.planes * deepest * counts), active_pitch: out,
    active: work.take(source.planes * out), slots: work.take(kh), sums: work.take(out + 16),
  };
}

function rows(op, source, target, work) {
  const [, count, columns] = op.weight.shape, cout = target.channels / op.groups;
  return {
    groups: op.groups, cin: source.channels / op.groups, cout,
    binary: op.weight.dtype === "U32" ? 1 : 0, row_pitch: columns, group_pitch: count * columns,
    list: work.take(2 * count + 2), sums: work.take(roundUp(cout, 32)),
  };
}

function neuron(op, source, target, values, layer, store) {
  const padded = source.words * 32, perLeak = op.leak.shape[0] > 1;
  const per = op.threshold.data.length > 1 || op.reset_value.data.length > 1;
  const pad = (data, length) => {
    const whole = new Int32Array(length);
    if (data.length === 1) whole.fill(data[0]);
    else whole.set(data);
    return whole;
  };
  const leak = new Int32Array(op.leak.shape[1] * (perLeak ? padded : 1));
  leak.set(op.leak.data);
  // Bisection, which takes over at 5 bits, needs a power of two of them.
  const bounds = new Int32Array(op.bits > 4 && op.bits <= 8 ? 2 ** op.bits : op.bounds.data.length);
  bounds.fill(2 ** 31 - 1);
  bounds.set(op.bounds.data);
  return {
    bits: op.bits, state_bits: stateBits(op), levels: levelsOf(op), reset: code("reset", op.reset),
    order: code("order", op.order), delay: code("delay", op.delay), ceiling: op.ceiling,
    initial: op.initial, leak: store(leak), leak_pitch: perLeak ? op.leak.shape[1] : 0,
    threshold: store(pad(op.threshold.data, per ? padded : 1)),
    reset_value: store(pad(op.reset_value.data, per ? padded : 1)), per_channel: per ? 1 : 0,
    bounds: store(bounds), reading: store(op.reading.data), state: layer.state,
    state_pitch: layer.pitch, spikes: target.record,
    membrane: op.membrane === null ? 0 : values[op.membrane].record,
  };
}
