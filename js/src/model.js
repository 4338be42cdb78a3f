// A deployed network in JavaScript: what qsnn_ext.deploy.load gives in Python.

import { LAYOUT, buildImage } from "./image.js";
import { QSNNError } from "./errors.js";
import { elements, outputRanks } from "./program.js";
import { parse } from "./file.js";

const PAGE = 65536;

/**
 * The runtime: a compiled module whose instances run one model each.
 * @param {BufferSource} simd The build that uses vectors; taken where the host has them.
 * @param {BufferSource} plain The build that does not.
 */
export async function compileEngine(simd, plain) {
  const vectors = WebAssembly.validate(simd);
  return { module: await WebAssembly.compile(vectors ? simd : plain), simd: vectors };
}

/**
 * Read the bytes of a .qsnn file.
 * @param {ArrayBuffer | Uint8Array} content The whole file.
 * @param {{module: WebAssembly.Module, simd: boolean}} engine From compileEngine.
 */
export function load(content, engine) {
  if (!ArrayBuffer.isView(content) && !isBuffer(content))
    throw new QSNNError(
      "load takes the bytes of a file, such as await (await fetch(url)).arrayBuffer()");
  if (Object.prototype.toString.call(engine?.module) !== "[object WebAssembly.Module]")
    throw new QSNNError("load needs the engine that compileEngine gives");
  // A view of its own class: Node's Buffers do not copy what they slice.
  const bytes = ArrayBuffer.isView(content)
    ? new Uint8Array(content.buffer, content.byteOffset, content.byteLength)
    : new Uint8Array(content);
  return new Model(parse(bytes), engine);
}

/** Refuse what is no list of numbers. */
function listed(x, what) {
  if (typeof x !== "object" || !Number.isInteger(x?.length))
    throw new QSNNError(`${what} takes an array of numbers`);
}

/** Also of another realm, such as a frame or a worker. */
function isBuffer(content) {
  return /^\[object (Shared)?ArrayBuffer\]$/.test(Object.prototype.toString.call(content));
}

/** Calls a program like the model it came from. */
export class Model {
  constructor(program, engine) {
    this.program = program;
    this.engine = engine;
    this.image = buildImage(program);
    const shape = program.values[0].shape;
    const rank = Number(program.metadata.input_rank ?? 3);
    this.inputShape = { 1: shape.slice(0, 1), 2: [shape[0], shape[2]], 3: shape }[rank];
    this.inputSize = elements(program.values[0]);
    this.timesteps = program.timesteps;
    this.outputs = program.outputs.map((i, k) => ({
      size: elements(program.values[i]), shape: program.values[i].shape,
      scale: program.values[i].scale, rank: outputRanks(program)[k],
    }));
    this.layers = this.image.layers.map(({ name, shape, bits, levels }) =>
      ({ name, shape, bits, levels }));
    this.classes = classesOf(program.metadata);
  }

  /** A run of its own, one time step at a time. */
  session() {
    return new Session(this);
  }

  /**
   * Integer input codes of real inputs, as Python computes them.
   * @param {ArrayLike<number>} x Any number of samples; integer arrays are taken to be codes.
   * @returns {Int32Array}
   */
  codes(x) {
    listed(x, "codes");
    if (x.length === 0 || x.length % this.inputSize)
      throw new QSNNError(`input of ${x.length} numbers; this program takes ${this.inputShape}`);
    const real = !ArrayBuffer.isView(x) || x instanceof Float32Array || x instanceof Float64Array;
    const [lo, hi] = this.program.inputRange, scale = this.program.inputScale;
    const channels = this.program.values[0].shape[0], pixels = this.inputSize / channels;
    const { gain, bias } = prologue(this.program);
    return Int32Array.from(x, (given, i) => {
      if (!Number.isFinite(given)) throw new QSNNError("the input contains NaN or infinity");
      const c = Math.floor(i / pixels) % channels;
      const value = real ? roundHalfEven((given * gain(c) + bias(c)) / scale) : given;
      return Math.min(Math.max(value, lo), hi);
    });
  }

  /**
   * Input code of every 8-bit pixel of a channel: that of (pixel / 255 - mean) / std in float32.
   * @returns {Int32Array} Of 256 codes.
   */
  pixelTable(mean, std, channel = 0) {
    if (!Number.isFinite(mean) || !(Number.isFinite(std) && std > 0))
      throw new QSNNError(`mean ${mean} must be finite and std ${std} finite and positive`);
    const [channels] = this.program.values[0].shape;
    if (!Number.isInteger(channel) || channel < 0 || channel >= channels)
      throw new QSNNError(`there is no channel ${channel}; the input has ${channels}`);
    const f = Math.fround, { gain, bias } = prologue(this.program);
    return Int32Array.from({ length: 256 }, (_, pixel) => {
      const real = f(f(f(f(pixel) / f(255)) - f(mean)) / f(std)) * gain(channel) + bias(channel);
      const [lo, hi] = this.program.inputRange;
      return Math.min(Math.max(roundHalfEven(real / this.program.inputScale), lo), hi);
    });
  }

  /**
   * Integer answers of every time step and output, before any scale.
   * @param {Int32Array} codes One sample, shown `timesteps` times, or one after the other T steps.
   * @returns {Int32Array[][]} By step, then by output.
   */
  integers(codes) {
    listed(codes, "integers");
    if (codes.length === 0 || codes.length % this.inputSize)
      throw new QSNNError(`${codes.length} codes; this program takes ${this.inputSize} a step`);
    const frames = codes.length / this.inputSize, session = this.session();
    return Array.from({ length: frames === 1 ? this.timesteps : frames }, (_, t) => {
      const at = frames === 1 ? 0 : t * this.inputSize;
      return session.step(codes.slice(at, at + this.inputSize));
    });
  }
}

/** A program in execution: membranes of one sample, in memory of its own. */
export class Session {
  constructor(model) {
    this.model = model;
    const { exports } = new WebAssembly.Instance(model.engine.module, {});
    if (exports.qsnn_layout() !== LAYOUT)
      throw new QSNNError("the compiled runtime is of another version than this module; rebuild both");
    const { image } = model;
    const answers = model.outputs.reduce((sum, o) => sum + o.size, 0);
    let at = Math.ceil(exports.__heap_base.value / 64) * 64;
    const take = (count) => {
      const start = at;
      at += Math.ceil((4 * count) / 64) * 64;
      return start;
    };
    this.at = {
      image: take(image.words.length), state: take(image.stateWords),
      arena: take(image.arenaWords), input: take(model.inputSize), output: take(answers),
    };
    const missing = at - exports.memory.buffer.byteLength;
    try {
      if (missing > 0) exports.memory.grow(Math.ceil(missing / PAGE));
    } catch {
      throw new QSNNError(`there is no memory for the program here: it needs ${at} bytes`);
    }
    this.wasm = exports;
    this.memory = new Int32Array(exports.memory.buffer);
    new Uint32Array(exports.memory.buffer).set(image.words, this.at.image / 4);
    this.reset();
  }

  /** Put every neuron into its initial state. */
  reset() {
    this.wasm.qsnn_reset(this.at.image, this.at.state);
  }

  /**
   * Run one time step.
   * @param {ArrayLike<number>} codes Integer input codes [C, H, W].
   * @returns {Int32Array[]} One [C, H, W] per output.
   */
  step(codes) {
    listed(codes, "step");
    const { at, model } = this, [lo, hi] = model.program.inputRange;
    if (codes.length !== model.inputSize)
      throw new QSNNError(`${codes.length} codes; this program takes ${model.inputSize} a step`);
    for (let i = 0; i < codes.length; i++)
      if (!Number.isInteger(codes[i]) || codes[i] < lo || codes[i] > hi)
        throw new QSNNError(`code ${codes[i]} is not one of ${lo} to ${hi}; model.codes makes them`);
    this.memory.set(codes, at.input / 4);
    this.wasm.qsnn_run(at.image, at.state, at.arena, at.input, 1, 0, at.output);
    let from = at.output / 4;
    return model.outputs.map(({ size }) => this.memory.slice(from, (from += size)));
  }

  /**
   * Spikes of a layer in the step that ran last.
   * @param {number} layer Index into model.layers.
   * @returns {Uint8Array} Zeros and ones [C, H, W].
   */
  spikes(layer) {
    const { spikes: v } = this.#layer(layer);
    return this.#bits(this.at.arena / 4 + v.offset, v, v.stride, 1, Uint8Array);
  }

  /**
   * Membrane potentials of a layer: codes from -levels to levels, or 32-bit potentials.
   * @param {number} layer Index into model.layers.
   * @returns {Int32Array} [C, H, W].
   */
  membranes(layer) {
    const { bits, state, pitch, spikes: v } = this.#layer(layer);
    const from = this.at.state / 4 + state;
    if (bits < 32)
      return this.#bits(from, v, pitch, bits, Int32Array).map((x) => (x << (32 - bits)) >> (32 - bits));
    const potentials = new Int32Array(v.channels * v.pixels);
    for (let c = 0, i = 0; c < v.channels; c++)
      for (let pixel = 0; pixel < v.pixels; pixel++)
        potentials[i++] = this.memory[from + pixel * pitch + c];
    return potentials;
  }

  #layer(layer) {
    const { layers } = this.model.image;
    if (!Number.isInteger(layer) || layer < 0 || layer >= layers.length)
      throw new QSNNError(`there is no layer ${layer}; model.layers has ${layers.length}`);
    return layers[layer];
  }

  /** Numbers held as bit planes [pixel][plane][word of channels], as [C, H, W]. */
  #bits(from, { channels, pixels, words }, pitch, planes, Type) {
    const found = new Type(channels * pixels);
    for (let c = 0, i = 0; c < channels; c++)
      for (let pixel = 0; pixel < pixels; pixel++, i++)
        for (let p = 0; p < planes; p++) {
          const word = this.memory[from + pixel * pitch + p * words + (c >> 5)];
          found[i] |= ((word >>> (c & 31)) & 1) << p;
        }
    return found;
  }
}

/** The nearest integer; the even one of two that are as near. */
function roundHalfEven(x) {
  const low = Math.floor(x), rest = x - low;
  return rest > 0.5 || (rest === 0.5 && low % 2 !== 0) ? low + 1 : low;
}

/** What is done to a real input of a channel before it becomes a code: x * gain + bias. */
function prologue({ metadata }) {
  const [gain, bias] = [["input_gain", "1"], ["input_bias", "0"]].map(([key, otherwise]) => {
    const numbers = (metadata[key] ?? otherwise).split(",").map(Number);
    return (channel) => numbers[numbers.length === 1 ? 0 : channel];
  });
  return { gain, bias };
}

function classesOf(metadata) {
  try {
    const names = JSON.parse(metadata.classes ?? "null");
    return Array.isArray(names) && names.every((n) => typeof n === "string") ? names : null;
  } catch {
    return null;
  }
}
