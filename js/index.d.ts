/** Anything wrong with a file, an input, or the engine. */
export class QSNNError extends Error {}

/** A compiled runtime; `simd` says whether it uses vectors. */
export interface Engine {
  readonly module: WebAssembly.Module;
  readonly simd: boolean;
}

export interface Output {
  /** Integers of one time step. */
  readonly size: number;
  /** [C, H, W]. */
  readonly shape: readonly number[];
  /** The real number that one unit stands for. */
  readonly scale: number;
  /** Axes per sample and time step, 1 to 3. */
  readonly rank: number;
}

export interface Layer {
  readonly name: string;
  /** [C, H, W] of its neurons. */
  readonly shape: readonly number[];
  /** Of a membrane potential: 2 to 8, or 32. */
  readonly bits: number;
  /** The largest code; membrane potentials are -levels to levels. 0 for 32 bits. */
  readonly levels: number;
}

/** A deployed network: what `qsnn_ext.deploy.load` gives in Python. */
export class Model {
  readonly engine: Engine;
  /** Shape of one sample at one time step. */
  readonly inputShape: readonly number[];
  /** Numbers of one sample at one time step. */
  readonly inputSize: number;
  /** Default number of time steps. */
  readonly timesteps: number;
  readonly outputs: readonly Output[];
  /** Spiking layers, in order. */
  readonly layers: readonly Layer[];
  /** Names of the classes, where the file has them. */
  readonly classes: readonly string[] | null;
  /** A run of its own, one time step at a time. */
  session(): Session;
  /** Integer input codes of real inputs; integer arrays are taken to be codes already. */
  codes(x: ArrayLike<number>): Int32Array;
  /** Input code of every 8-bit pixel of a channel: that of `(pixel / 255 - mean) / std` in float32. */
  pixelTable(mean: number, std: number, channel?: number): Int32Array;
  /** Integer answers by step, then by output, before any scale. */
  integers(codes: Int32Array | number[]): Int32Array[][];
}

/** A program in execution, in memory of its own. */
export class Session {
  readonly model: Model;
  /** Put every neuron into its initial state. */
  reset(): void;
  /** Run one time step; one [C, H, W] per output. */
  step(codes: ArrayLike<number>): Int32Array[];
  /** Spikes of a layer in the step that ran last: zeros and ones [C, H, W]. */
  spikes(layer: number): Uint8Array;
  /** Membrane potentials of a layer [C, H, W]. */
  membranes(layer: number): Int32Array;
}

/** The runtime from its two builds, with and without vectors. */
export function compileEngine(simd: BufferSource, plain: BufferSource): Promise<Engine>;

/** Read a .qsnn file with the runtime that lies beside this module. */
export function load(content: ArrayBuffer | Uint8Array): Promise<Model>;
