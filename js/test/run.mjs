// Runs programs and prints what they answer: `node run.mjs FOLDER` reads tasks.json there, a list of
// {file, codes: {file, steps}}, and writes one line of JSON for each. Used by the Python tests.

import { readFile } from "node:fs/promises";
import { QSNNError, compileEngine } from "../index.js";
import { load } from "../src/model.js";

const folder = process.argv[2];
const dist = new URL("../dist/", import.meta.url);
const [simd, plain] = await Promise.all(
  ["qsnn-simd.wasm", "qsnn.wasm"].map((name) => readFile(new URL(name, dist))));
const engines = [await compileEngine(simd, plain), await compileEngine(plain, plain)];

for (const { program, codes, real } of JSON.parse(await readFile(`${folder}/tasks.json`, "utf8"))) {
  try {
    const content = await readFile(`${folder}/${program}`);
    const answers = engines.map((engine) => {
      const model = load(content, engine);
      if (real) return { codes: [...model.codes(real)] };
      if (!codes) return {};
      const session = model.session();
      const outputs = codes.flatMap((step) => session.step(step).flatMap((a) => [...a]));
      return {
        outputs, inputShape: model.inputShape, timesteps: model.timesteps,
        layers: model.layers.map(({ name, bits }, k) =>
          ({ name, bits, membranes: [...session.membranes(k)], spikes: [...session.spikes(k)] })),
      };
    });
    if (JSON.stringify(answers[0]) !== JSON.stringify(answers[1]))
      console.log(JSON.stringify({ error: "the two builds differ" }));
    else console.log(JSON.stringify(answers[0]));
  } catch (error) {
    if (!(error instanceof QSNNError)) throw error;
    console.log(JSON.stringify({ refused: error.message }));
  }
}
