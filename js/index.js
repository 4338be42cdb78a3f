// npm entry: the runtime is found beside this file, in Node.js and in browsers.

import { compileEngine, load as loadWith } from "./src/model.js";

export { QSNNError } from "./src/errors.js";
export { Model, Session, compileEngine } from "./src/model.js";

let engine;

async function bytesOf(name) {
  const url = new URL(`./dist/${name}`, import.meta.url);
  if (url.protocol !== "file:") return (await fetch(url)).arrayBuffer();
  const { readFile } = await import("node:fs/promises");
  return readFile(url);
}

/**
 * Read a .qsnn file.
 * @param {ArrayBuffer | Uint8Array} content The whole file.
 */
export async function load(content) {
  engine ??= Promise.all([bytesOf("qsnn-simd.wasm"), bytesOf("qsnn.wasm")]).then((builds) =>
    compileEngine(...builds));
  return loadWith(content, await engine);
}
