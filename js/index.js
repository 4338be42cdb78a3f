// npm entry: the runtime is found beside this file, in Node.js and in browsers.

import { QSNNError } from "./src/errors.js";
import { compileEngine, load as loadWith } from "./src/model.js";

export { QSNNError } from "./src/errors.js";
export { Model, Session, compileEngine } from "./src/model.js";

// Written out, for bundlers to find them.
const SIMD = new URL("./dist/qsnn-simd.wasm", import.meta.url);
const PLAIN = new URL("./dist/qsnn.wasm", import.meta.url);

let engine;

async function bytesOf(url) {
  if (url.protocol === "file:") {
    const { readFile } = await import(/* webpackIgnore: true */ "node:fs/promises");
    return readFile(url);
  }
  const answer = await fetch(url);
  if (!answer.ok) throw new QSNNError(`the runtime ${url} cannot be read: status ${answer.status}`);
  return answer.arrayBuffer();
}

/**
 * Read a .qsnn file.
 * @param {ArrayBuffer | Uint8Array} content The whole file.
 */
export async function load(content) {
  engine ??= Promise.all([SIMD, PLAIN].map(bytesOf)).then((builds) => compileEngine(...builds));
  try {
    await engine;
  } catch (error) {
    engine = undefined; // the network may be back next time
    throw error;
  }
  return loadWith(content, await engine);
}
