// The demo page: draws, runs, shows. It talks to the network as any user of the module would.
"use strict";

const $ = (id) => document.getElementById(id);
const INK = 26; // pen width on paper of 280 pixels
const SIDE = 16; // pixels of what the network sees
const STEP_MS = 450; // while playing
const bytesOf = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
/** The bytes of a packed file: zlib, in base64. */
const unpacked = async (text) => {
  const stream = new Blob([bytesOf(text)]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
};
const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

/** What can be looked at: what its samples are called, and what to do with it. */
const VIEWS = {
  digits: {
    tested: "test digits",
    hint: "With keys: arrows move the pen, <kbd>space</kbd> lowers or lifts it, <kbd>Delete</kbd> clears, <kbd>0</kbd>–<kbd>9</kbd> show an example. In the digits it has learned from, a seven has a bar.",
  },
  events: {
    tested: "test recordings",
    hint: "A simulated event camera looks at a test digit while its gaze jumps; the answer forms as events come in.",
  },
  pictures: {
    tested: "test pictures",
    hint: "It knows these ten things alone, and takes whatever a picture shows for one of them.",
  },
};

const views = {}; // by name: model, card, frames to run, what to show of them
let view = null; // the one on show
let run = null; // what the network did with the present input, step by step
let shown = 0; // the step on show
let chosen = { layer: 3, neuron: 0 };
let playing = !matchMedia("(prefers-reduced-motion: reduce)").matches;

/* ---- from paper to pixels -------------------------------------------------------------------- */

/**
 * Ink on the paper as the data set was made: cut out, scaled to 32 pixels height, counted in blocks
 * of 4 by 4, then enlarged bilinearly.
 * @returns {Uint8Array | null} [16, 16], or null for an empty paper.
 */
function pixelsOfPaper() {
  const { width, height } = $("paper");
  const { data } = paper.getImageData(0, 0, width, height);
  let left = width, right = -1, top = height, bottom = -1;
  for (let y = 0; y < height; y++)
    for (let x = 0; x < width; x++)
      if (data[4 * (y * width + x) + 3] > 127) {
        [left, right] = [Math.min(left, x), Math.max(right, x)];
        [top, bottom] = [Math.min(top, y), Math.max(bottom, y)];
      }
  if (right < 0) return null;
  const size = Math.max(bottom - top + 1, right - left + 1);
  const x0 = (left + right + 1 - size) / 2, y0 = (top + bottom + 1 - size) / 2;
  const blocks = new Float64Array(64);
  for (let y = 0; y < 32; y++)
    for (let x = 0; x < 32; x++) {
      const px = Math.floor(x0 + ((x + 0.5) * size) / 32), py = Math.floor(y0 + ((y + 0.5) * size) / 32);
      const inside = px >= 0 && py >= 0 && px < width && py < height;
      if (inside && data[4 * (py * width + px) + 3] > 127) blocks[(y >> 2) * 8 + (x >> 2)] += 1 / 16;
    }
  const at = (y, x) => blocks[Math.min(Math.max(y, 0), 7) * 8 + Math.min(Math.max(x, 0), 7)];
  const pixels = new Uint8Array(SIDE * SIDE);
  for (let y = 0; y < SIDE; y++)
    for (let x = 0; x < SIDE; x++) {
      const sy = Math.max(y / 2 - 0.25, 0), sx = Math.max(x / 2 - 0.25, 0);
      const iy = Math.floor(sy), ix = Math.floor(sx), fy = sy - iy, fx = sx - ix;
      const upper = at(iy, ix) * (1 - fx) + at(iy, ix + 1) * fx;
      const lower = at(iy + 1, ix) * (1 - fx) + at(iy + 1, ix + 1) * fx;
      pixels[y * SIDE + x] = Math.round((upper * (1 - fy) + lower * fy) * 255);
    }
  return pixels;
}

const paper = $("paper").getContext("2d", { willReadFrequently: true });
const pen = { x: 140, y: 140, down: false, keys: false };
let example = null; // pixels of an example, where one is on the paper

function startInk() {
  if (example) clearPaper();
  paper.lineCap = paper.lineJoin = "round";
  paper.lineWidth = INK;
  paper.strokeStyle = color("--ink");
}

function drawTo(x, y) {
  paper.beginPath();
  paper.moveTo(pen.x, pen.y);
  paper.lineTo(x + 0.01, y); // a line of no length would leave no ink
  paper.stroke();
  [pen.x, pen.y] = [x, y];
}

function clearPaper() {
  paper.clearRect(0, 0, 280, 280);
  example = null;
}

function showExample(pixels) {
  clearPaper();
  example = pixels;
  const small = document.createElement("canvas");
  small.width = small.height = SIDE;
  paintPixels(small.getContext("2d"), pixels);
  paper.imageSmoothingEnabled = false;
  paper.drawImage(small, 0, 0, 280, 280);
}

function paintPixels(context, pixels) {
  const [r, g, b] = rgb(color("--ink"));
  const image = context.createImageData(SIDE, SIDE);
  (pixels ?? new Uint8Array(SIDE * SIDE)).forEach((v, i) => image.data.set([r, g, b, v], 4 * i));
  context.putImageData(image, 0, 0);
}

const rgb = (hex) => {
  const full = hex.length === 4 ? hex.replace(/[^#]/g, "$&$&") : hex;
  return [1, 3, 5].map((i) => parseInt(full.slice(i, i + 2), 16));
};

/* ---- running --------------------------------------------------------------------------------- */

/** Run a network from its initial state and keep what every step looked like. */
function execute(frames) {
  const { model, session } = view;
  session.reset();
  const total = new Array(model.outputs[0].size).fill(0);
  const steps = frames.map((codes) => {
    const [answer] = session.step(codes);
    answer.forEach((a, i) => (total[i] += a));
    return {
      codes, answer: [...answer], total: [...total],
      spikes: model.layers.map((_, k) => session.spikes(k)),
      membranes: model.layers.map((_, k) => session.membranes(k)),
    };
  });
  return { steps, ms: latency(frames) };
}

/** The class of a run, looking at nothing else. */
function classOf(frames) {
  const total = new Array(view.model.outputs[0].size).fill(0);
  view.session.reset();
  for (const codes of frames) view.session.step(codes)[0].forEach((a, i) => (total[i] += a));
  return largest(total);
}

/** Milliseconds of a whole run: the shortest of some. */
function latency(frames) {
  let shortest = Infinity;
  for (let i = 0; i < 5; i++) {
    const start = performance.now();
    view.session.reset();
    for (const codes of frames) view.session.step(codes);
    shortest = Math.min(shortest, performance.now() - start);
  }
  return shortest;
}

const largest = (list) => list.indexOf(Math.max(...list));

/** Read the paper, run, show. */
function answerPaper(atEnd = true) {
  const pixels = example ?? pixelsOfPaper();
  view.pixels = pixels;
  paintPixels($("seen").getContext("2d"), pixels);
  if (!pixels) return nothing();
  run = execute(framesOf(pixels));
  showRun(atEnd);
}

/** The same codes at every step, of pixels [C, H, W]. */
function framesOf(pixels) {
  const { model, tables } = view, size = model.inputSize / tables.length;
  const codes = Int32Array.from(pixels, (p, i) => tables[Math.floor(i / size)][p]);
  return new Array(model.timesteps).fill(codes);
}

function answerEvents(index) {
  view.index = index;
  const whole = bytesOf(view.card.samples[index]), size = view.model.inputSize;
  const frames = Array.from({ length: view.card.steps }, (_, t) =>
    view.model.codes(Int32Array.from(whole.subarray(t * size, (t + 1) * size))));
  run = execute(frames);
  showRun(false);
}

/**
 * Run on a picture.
 * @param {Uint8Array} pixels [3, 32, 32].
 * @param {string} source What it is.
 * @param {number | null} truth Its class, where that is known.
 */
function answerPicture(pixels, source, truth = null) {
  Object.assign(view, { pixels, source, truth });
  $("source").textContent = source;
  paintPicture(pixels);
  run = execute(framesOf(pixels));
  showRun(false);
}

function answerRecord(index) {
  const { records } = view;
  view.index = Math.min(Math.max(index, 0), records.labels.length - 1);
  $("record").value = view.index + 1;
  $("previous").disabled = view.index === 0;
  $("next").disabled = view.index === records.labels.length - 1;
  answerPicture(records.pixels(view.index), records.name, records.labels[view.index]);
  records.said[view.index] = largest(run.steps.at(-1).total);
  tally();
}

/** Whether a picture of the records is on show, and none that was opened by itself. */
const onRecord = () => Boolean(view.records) && view.source === view.records.name;

/** How many of the records' pictures, of those looked at, were named right. */
function tally() {
  let seen = 0, right = 0;
  if (onRecord())
    view.records.said.forEach((said, i) => {
      seen += said >= 0;
      right += said === view.records.labels[i];
    });
  view.tally = seen ? [right, seen] : null;
  $("tally").textContent = seen
    ? `${grouped(right)} of ${grouped(seen)} right (${((100 * right) / seen).toFixed(1)} %)` : "";
}

/** Pictures with their classes, to be gone through. */
function takeRecords(records) {
  views.pictures.records = { ...records, said: new Int8Array(records.labels.length).fill(-1) };
  $("records").hidden = view !== views.pictures;
  $("count").textContent = grouped(records.labels.length);
  $("record").max = records.labels.length;
}

function nothing() {
  run = null;
  $("answer").textContent = "–";
  $("sure").textContent = view === views.digits ? "draw a digit from 0 to 9" : "open a picture";
  counts();
  show();
}

function showRun(atEnd) {
  $("step").max = run.steps.length;
  shown = atEnd || !playing ? run.steps.length - 1 : 0;
  resting = 0;
  counts();
  show();
}

/* ---- showing --------------------------------------------------------------------------------- */

function show() {
  const step = run?.steps[shown];
  $("step").value = shown + 1;
  $("step").disabled = $("play").disabled = !run;
  $("step-name").textContent = step ? `${shown + 1} of ${run.steps.length}` : "–";
  bars(step);
  truth(step);
  if (view === views.events && step) paintEvents(step);
  view.model.layers.forEach((layer, k) => paintLayer(layer, k, step));
  paintTrace();
}

function bars(step) {
  const given = step ? step.total : new Array(10).fill(0);
  const low = Math.min(0, ...given), high = Math.max(1, ...given), best = largest(given);
  if (step) {
    const sorted = [...given].sort((a, b) => b - a);
    const scale = view.model.outputs[0].scale / (shown + 1);
    $("answer").textContent = view.classes[best];
    $("sure").textContent =
      `ahead of ${view.classes[given.indexOf(sorted[1])]} by ${((sorted[0] - sorted[1]) * scale).toFixed(1)}`;
  }
  $("bars").replaceChildren(...given.map((value, i) => {
    const bar = document.createElement("div"), filled = document.createElement("i");
    const name = document.createElement("span");
    filled.style.setProperty("--share", step ? Math.max(0, (value - low) / (high - low)) : 0);
    if (step && i === best) bar.className = "best";
    name.textContent = view.classes[i];
    bar.append(filled, name);
    return bar;
  }));
}

/** What the sample really is, and at the last step whether the answer says so. */
function truth(step) {
  const name = step && view.truth !== null && view.truth !== undefined ? view.classes[view.truth] : null;
  const last = run && shown === run.steps.length - 1;
  const right = last ? (largest(step?.total ?? []) === view.truth ? ": right" : ": wrong") : "";
  $("truth").textContent = name ? `labeled ${name}${right}` : "";
}

/** A picture [3, 32, 32], every pixel as it is. */
function paintPicture(pixels) {
  const context = $("picture").getContext("2d"), size = PICTURE_SIDE * PICTURE_SIDE;
  const image = context.createImageData(PICTURE_SIDE, PICTURE_SIDE);
  for (let i = 0; pixels && i < size; i++)
    image.data.set([pixels[i], pixels[size + i], pixels[2 * size + i], 255], 4 * i);
  context.putImageData(image, 0, 0);
  $("picture").setAttribute("aria-label",
    `What the network sees: ${pixels ? "the picture in 32 by 32 pixels" : "no picture yet"}`);
}

function paintEvents({ codes }) {
  const context = $("events").getContext("2d"), image = context.createImageData(SIDE, SIDE);
  const on = rgb(color("--spike")), off = rgb(color("--off"));
  const half = SIDE * SIDE;
  for (let i = 0; i < half; i++) {
    const less = codes[i], more = codes[half + i]; // polarity 0, then 1
    if (less || more)
      image.data.set([...(more >= less ? on : off), Math.min(255, 90 + 55 * Math.max(less, more))], 4 * i);
  }
  context.putImageData(image, 0, 0);
}

/** Channels of a layer as tiles of one picture. */
function tiles({ shape: [channels, height, width] }) {
  const columns = Math.ceil(Math.sqrt((channels * height) / width));
  return { columns, rows: Math.ceil(channels / columns), height, width, channels };
}

function buildLayers() {
  $("layers").replaceChildren(...view.model.layers.map((layer, k) => {
    const { columns, rows, height, width, channels } = tiles(layer);
    const map = document.createElement("div"), canvas = document.createElement("canvas");
    const label = document.createElement("span");
    map.className = "map";
    canvas.width = columns * (width + 1) - 1;
    canvas.height = rows * (height + 1) - 1;
    canvas.setAttribute("role", "img");
    label.innerHTML = `<span><b>${k + 1}</b>${channels}×${height}×${width}</span><i></i>`;
    canvas.addEventListener("click", (event) => {
      const box = canvas.getBoundingClientRect();
      const x = Math.floor(((event.clientX - box.left) / box.width) * canvas.width);
      const y = Math.floor(((event.clientY - box.top) / box.height) * canvas.height);
      const channel = Math.floor(y / (height + 1)) * columns + Math.floor(x / (width + 1));
      const [row, column] = [y % (height + 1), x % (width + 1)];
      if (channel < channels && row < height && column < width)
        choose(k, (channel * height + row) * width + column);
    });
    map.append(canvas, label);
    return map;
  }));
}

function paintLayer(layer, k, step) {
  const map = $("layers").children[k], canvas = map.firstChild, context = canvas.getContext("2d");
  const { columns, height, width, channels } = tiles(layer);
  const image = context.createImageData(canvas.width, canvas.height);
  const lit = rgb(color("--spike")), dark = rgb(color("--quiet"));
  let fired = 0, mark = null;
  for (let c = 0, i = 0; c < channels; c++) {
    const top = Math.floor(c / columns) * (height + 1), left = (c % columns) * (width + 1);
    for (let y = 0; y < height; y++)
      for (let x = 0; x < width; x++, i++) {
        const spike = step ? step.spikes[k][i] : 0;
        fired += spike;
        if (chosen.layer === k && chosen.neuron === i) mark = [left + x, top + y];
        image.data.set([...(spike ? lit : dark), 255], 4 * ((top + y) * canvas.width + left + x));
      }
  }
  context.putImageData(image, 0, 0);
  if (mark) {
    context.strokeStyle = color("--mark");
    context.strokeRect(mark[0] - 0.5, mark[1] - 0.5, 2, 2);
  }
  const share = `${((100 * fired) / (channels * height * width)).toFixed(1)} %`;
  map.querySelector("i").textContent = step ? share : "";
  canvas.setAttribute("aria-label", `Spikes of layer ${k + 1}: ${step ? share : "none"}`);
}

function choose(layer, neuron) {
  const layers = view.model.layers, size = (k) => layers[k].shape.reduce((a, b) => a * b);
  layer = (layer + layers.length) % layers.length;
  chosen = { layer, neuron: (neuron + size(layer)) % size(layer) };
  show();
}

/** The neuron of a layer that fires most often without firing always: there is something to see. */
function liveliest(layer) {
  let best = 0, most = -1;
  const size = run.steps[0].spikes[layer].length;
  for (let i = 0; i < size; i++) {
    const levels = new Set(run.steps.map((s) => s.membranes[layer][i])).size;
    const fires = run.steps.some((s) => s.spikes[layer][i]);
    if (2 * levels + fires > most) [best, most] = [i, 2 * levels + fires];
  }
  return best;
}

function paintTrace() {
  const canvas = $("trace"), context = canvas.getContext("2d");
  const ratio = window.devicePixelRatio || 1, box = canvas.getBoundingClientRect();
  [canvas.width, canvas.height] = [Math.max(box.width, 200) * ratio, 180 * ratio];
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  const width = canvas.width / ratio, height = 180, layer = view.model.layers[chosen.layer];
  const n = layer.levels, y = (level) => 22 + ((n - level) / (2 * n)) * (height - 60);
  const steps = run ? run.steps.length : view.model.timesteps;
  const x = (t) => 46 + ((t + 1) / steps) * (width - 62);
  context.font = "13px system-ui, sans-serif";
  context.textBaseline = "middle";
  for (let level = -n; level <= n; level++) {
    context.strokeStyle = color("--line");
    context.fillStyle = color("--soft");
    context.beginPath();
    context.moveTo(46, y(level));
    context.lineTo(width - 8, y(level));
    context.stroke();
    context.textAlign = "right";
    context.fillText(level > 0 ? `+${level}` : `${level}`, 38, y(level));
  }
  context.textAlign = "center";
  for (let t = 0; t < steps; t++) context.fillText(`${t + 1}`, x(t), height - 10);
  const [, h, w] = layer.shape, c = Math.floor(chosen.neuron / (h * w)), i = chosen.neuron % (h * w);
  $("neuron").textContent =
    `of layer ${chosen.layer + 1}, channel ${c}, row ${Math.floor(i / w)}, column ${i % w}; a mark is a spike`;
  if (!run) return;
  const path = run.steps.map((s) => s.membranes[chosen.layer][chosen.neuron]);
  context.strokeStyle = context.fillStyle = color("--spike");
  context.lineWidth = 2.5;
  context.beginPath();
  context.moveTo(46, y(0));
  path.slice(0, shown + 1).forEach((level, t) => {
    context.lineTo(x(t), y(t ? path[t - 1] : 0));
    context.lineTo(x(t), y(level));
  });
  context.stroke();
  path.slice(0, shown + 1).forEach((level, t) => {
    context.fillStyle = color("--spike");
    context.beginPath();
    context.arc(x(t), y(level), 4, 0, 7);
    context.fill();
    if (!run.steps[t].spikes[chosen.layer][chosen.neuron]) return;
    context.fillStyle = color("--mark");
    context.fillRect(x(t) - 2, 2, 4, 14);
  });
  canvas.setAttribute("aria-label", `Membrane levels: ${path.slice(0, shown + 1).join(", ")}`);
}

function counts() {
  const { model, card, file } = view;
  const neurons = model.layers.reduce((sum, { shape }) => sum + shape.reduce((a, b) => a * b), 0);
  const bits = model.layers.reduce(
    (sum, { shape, bits }) => sum + bits * shape.reduce((a, b) => a * b), 0);
  const weights = model.program.ops.filter((op) => op.op === "Conv");
  const count = (binary) => weights
    .filter((op) => (op.weight.dtype === "U32") === binary)
    .reduce((sum, op) => sum + op.weight.shape[0] * op.weight.shape[1] *
      (model.program.values[op.target].shape[0] / op.groups), 0);
  const spikes = run?.steps.reduce((sum, s) => sum + s.spikes.reduce(
    (a, layer) => a + layer.reduce((x, y) => x + y), 0), 0);
  const text = (n) => n.toLocaleString("en-US");
  const rows = {
    "1-bit weights": text(count(true)),
    "8-bit weights (first and last layer)": text(count(false)),
    "the same weights as float32": `${text(4 * (count(true) + count(false)))} bytes`,
    "file with everything": `${text(file.length)} bytes`,
    "runtime": `${text(view.runtime)} bytes of WebAssembly`,
    "membrane potentials": `${text(neurons)} × 2 bits = ${text(bits / 8)} bytes`,
    "spikes for this answer": run ? `${text(spikes)} of ${text(neurons * run.steps.length)}` : "–",
    "time for this answer": run ? `${run.ms.toFixed(1)} ms (${run.steps.length} steps)` : "–",
    [`right on ${VIEWS[view.name].tested}`]: `${card.accuracy_program.toFixed(1)} % of ${text(card.test_samples)}`,
  };
  document.querySelector("#counts dl").replaceChildren(...Object.entries(rows).map(([name, value]) => {
    const row = document.createElement("div");
    const [dt, dd] = [document.createElement("dt"), document.createElement("dd")];
    [dt.textContent, dd.textContent] = [name, value];
    row.append(dt, dd);
    return row;
  }));
}

/* ---- playing, keys and buttons --------------------------------------------------------------- */

let resting = 0; // steps to wait at the end before it begins again

setInterval(() => {
  if (!playing || !run || document.hidden || pen.down) return;
  if (shown < run.steps.length - 1) shown++;
  else if (++resting > 3) [shown, resting] = [0, 0];
  else return;
  show();
}, STEP_MS);

function play(on) {
  playing = on;
  $("play").textContent = on ? "Pause" : "Play";
  $("play").setAttribute("aria-pressed", String(on));
}

function switchTo(name) {
  view = views[name];
  for (const other of Object.keys(VIEWS)) {
    $(`panel-${other}`).hidden = other !== name;
    $(`tab-${other}`).setAttribute("aria-selected", String(other === name));
    $(`tab-${other}`).tabIndex = other === name ? 0 : -1;
  }
  $("input").setAttribute("aria-labelledby", `tab-${name}`);
  $("hint").innerHTML = VIEWS[name].hint;
  $("records").hidden = name !== "pictures" || !view.records;
  $("refused").hidden = true;
  document.querySelector("main").className = view.model.layers.length > 12 ? "deep" : "";
  const words = view.classes.some((c) => c.length > 2);
  $("bars").className = words ? "words" : "";
  $("answer").className = words ? "word" : "";
  $("tally").textContent = "";
  testAll(false);
  buildExamples();
  buildLayers();
  chosen = { layer: Math.min(chosen.layer, view.model.layers.length - 1), neuron: 0 };
  if (name === "digits") answerPaper();
  else if (name === "events") answerEvents(view.index ?? 3);
  else if (onRecord()) answerRecord(view.index);
  else if (view.pixels) answerPicture(view.pixels, view.source);
  else if (view.records) answerRecord(0);
  else nothing();
  if (run) choose(chosen.layer, liveliest(chosen.layer));
}

function buildExamples() {
  const { thumbnails } = view.records ?? {};
  const labels = view === views.pictures ? (thumbnails ? view.records.labels : []) : view.card.labels;
  document.querySelector(".examples").replaceChildren(...labels.map((label, i) => {
    const button = document.createElement("button"), name = view.classes[label];
    button.type = "button";
    button.setAttribute("aria-label", `Example of ${name}`);
    button.addEventListener("click", () => useExample(i));
    if (thumbnails) {
      const image = new Image(PICTURE_SIDE, PICTURE_SIDE);
      image.src = `data:image/png;base64,${thumbnails[i]}`;
      image.alt = "";
      button.append(image);
    } else button.textContent = name;
    return button;
  }));
}

function useExample(index) {
  if (view === views.pictures) {
    if (!view.records?.thumbnails) return;
    answerRecord(index);
  } else if (view === views.digits) {
    showExample(bytesOf(view.card.samples[index]));
    answerPaper(false);
  } else answerEvents(index);
  choose(chosen.layer, liveliest(chosen.layer));
}

let opened = 0; // files so far: what comes late of an earlier one is not shown
let opening = false;

/** Take a picture, or a file of records. */
async function open(file) {
  const mine = ++opened;
  opening = true;
  if (view !== views.pictures) switchTo("pictures");
  testAll(false);
  $("refused").hidden = true;
  try {
    if (!file) throw new Refused("There was no file in it: open, drop or paste a picture.");
    const records = /\.bin$/i.test(file.name) ? await readRecords(file) : null;
    const pixels = records ? null : await pixelsOfPicture(file);
    if (mine !== opened || view !== views.pictures) return;
    if (records) {
      takeRecords(records);
      buildExamples();
      answerRecord(0);
    } else {
      answerPicture(pixels, file.name);
      tally();
    }
    choose(chosen.layer, liveliest(chosen.layer));
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    if (mine !== opened) return;
    $("refused").textContent = error.message;
    $("refused").hidden = false;
  } finally {
    if (mine === opened) opening = false;
  }
}

let testing = false;

/** Name all pictures of the file that were not looked at yet, a screen's time at once. */
async function testAll(on) {
  if (testing === on) return;
  testing = on;
  $("all").textContent = on ? "Stop" : "Test all";
  $("all").setAttribute("aria-pressed", String(on));
  if (!on) return;
  const { records } = view;
  if (!onRecord()) answerRecord(view.index);
  let at = 0;
  while (testing && at < records.said.length) {
    for (const end = performance.now() + 50; at < records.said.length && performance.now() < end; at++)
      if (records.said[at] < 0) records.said[at] = classOf(framesOf(records.pixels(at)));
    tally();
    await new Promise((done) => setTimeout(done));
  }
  if (testing) testAll(false);
}

function onPaperKey(event) {
  const move = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
  if (move) {
    const x = Math.min(Math.max(pen.x + 10 * move[0], 14), 266);
    const y = Math.min(Math.max(pen.y + 10 * move[1], 14), 266);
    if (pen.keys) {
      startInk();
      drawTo(x, y);
      answerPaper();
    } else [pen.x, pen.y] = [x, y];
  } else if (event.key === " ") {
    pen.keys = !pen.keys;
    if (pen.keys) {
      startInk();
      drawTo(pen.x, pen.y);
      answerPaper();
    }
  } else if (event.key === "Delete" || event.key === "Backspace") {
    clearPaper();
    pen.keys = false;
    answerPaper();
  } else return;
  $("hint").textContent = `pen ${pen.keys ? "down" : "up"} at ${pen.x}, ${pen.y} of 280`;
  event.preventDefault();
}

function listen() {
  const at = (event) => {
    const box = $("paper").getBoundingClientRect();
    return [((event.clientX - box.left) / box.width) * 280, ((event.clientY - box.top) / box.height) * 280];
  };
  $("paper").addEventListener("pointerdown", (event) => {
    $("paper").setPointerCapture(event.pointerId);
    startInk();
    pen.down = true;
    [pen.x, pen.y] = at(event);
    drawTo(pen.x, pen.y);
    answerPaper();
  });
  $("paper").addEventListener("pointermove", (event) => {
    if (!pen.down) return;
    drawTo(...at(event));
    answerPaper();
  });
  for (const end of ["pointerup", "pointercancel"])
    $("paper").addEventListener(end, () => {
      if (!pen.down) return;
      pen.down = false;
      answerPaper(false);
      choose(chosen.layer, liveliest(chosen.layer));
    });
  $("paper").addEventListener("keydown", onPaperKey);
  $("clear").addEventListener("click", () => {
    clearPaper();
    answerPaper();
  });
  $("play").addEventListener("click", () => play(!playing));
  $("step").addEventListener("input", () => {
    play(false);
    shown = Number($("step").value) - 1;
    show();
  });
  const names = Object.keys(VIEWS);
  names.forEach((name, k) => {
    $(`tab-${name}`).addEventListener("click", () => switchTo(name));
    $(`tab-${name}`).addEventListener("keydown", (event) => {
      const by = { ArrowLeft: names.length - 1, ArrowRight: 1 }[event.key];
      if (!by) return;
      const other = $(`tab-${names[(k + by) % names.length]}`);
      other.click();
      other.focus();
    });
  });
  listenForFiles();
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target === $("record")) return;
    if (/^[0-9]$/.test(event.key)) useExample(Number(event.key));
    if (event.key === "n") choose(chosen.layer, chosen.neuron + 1);
    if (event.key === "p") choose(chosen.layer, chosen.neuron - 1);
    if (event.key === "l") {
      choose(chosen.layer + 1, 0);
      if (run) choose(chosen.layer, liveliest(chosen.layer));
    }
  });
  $("theme").addEventListener("click", () => {
    const root = document.documentElement;
    const dark = root.dataset.theme
      ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
    recolor();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", recolor);
  addEventListener("resize", paintTrace);
}

function listenForFiles() {
  $("open").addEventListener("click", () => $("file").click());
  $("file").addEventListener("change", () => {
    if ($("file").files.length) open($("file").files[0]);
    $("file").value = ""; // the same file may be opened again
  });
  addEventListener("dragover", (event) => event.preventDefault());
  addEventListener("drop", (event) => {
    event.preventDefault(); // the browser would leave the page for the file
    open(event.dataTransfer.files[0]);
  });
  addEventListener("paste", (event) => {
    const [file] = event.clipboardData.files;
    if (file || view === views.pictures) open(file);
  });
  $("previous").addEventListener("click", () => answerRecord(view.index - 1));
  $("next").addEventListener("click", () => answerRecord(view.index + 1));
  $("record").addEventListener("change", () => answerRecord(Math.round($("record").value || 1) - 1));
  $("all").addEventListener("click", () => testAll(!testing));
}

/** Paint anew what lies on canvases. */
function recolor() {
  if (example) showExample(example);
  else {
    paper.globalCompositeOperation = "source-in";
    paper.fillStyle = color("--ink");
    paper.fillRect(0, 0, 280, 280);
    paper.globalCompositeOperation = "source-over";
  }
  if (view === views.digits) paintPixels($("seen").getContext("2d"), view.pixels);
  show();
}

async function start() {
  const engines = demoData.engines;
  const [simd, plain] = [await unpacked(engines["qsnn-simd.wasm"]), await unpacked(engines["qsnn.wasm"])];
  const engine = await qsnn.compileEngine(simd, plain);
  const runtime = (engine.simd ? simd : plain).length;
  for (const [name, card] of Object.entries(demoData.networks)) {
    const file = await unpacked(card.file), model = qsnn.load(file, engine);
    const classes = model.classes ?? model.outputs[0].shape.map((_, i) => String(i));
    views[name] = { name, model, card, file, classes, runtime, session: model.session() };
    if (card.mean === undefined) continue;
    const [means, stds] = [[card.mean].flat(), [card.std].flat()];
    views[name].tables = means.map((mean, channel) => model.pixelTable(mean, stds[channel], channel));
  }
  if (demoPictures) takeRecords(await recordsOfPictures(demoPictures));
  else
    VIEWS.pictures.hint += " CIFAR-10's pictures may not be passed on with this page: open <code>test_batch.bin</code> of its binary version (www.cs.toronto.edu/~kriz/cifar.html), or build the page with <code>make demo-web DATA_DIR=…</code>.";
  listen();
  play(playing);
  switchTo("digits");
  useExample(3);
  /** For tests: what is on show, in integers. */
  window.demo = {
    state: () => ({
      view: view.name, shown,
      answer: run ? view.classes[largest(run.steps.at(-1).total)] : null, said: $("answer").textContent,
      pixels: view.pixels ? [...view.pixels] : null, index: view.index ?? null,
      answers: run ? run.steps.map((s) => s.answer) : null,
      spikes: run ? run.steps.map((s) => s.spikes.map((l) => l.reduce((a, b) => a + b))) : null,
      membranes: run ? run.steps.map((s) => s.membranes[chosen.layer][chosen.neuron]) : null,
      truth: view.truth ?? null, tally: view.tally ?? null, testing, opened, opening, source: view.source ?? null,
      chosen, playing, ms: run ? run.ms : null, simd: engine.simd,
    }),
  };
}

function fail(message) {
  $("failure").hidden = false;
  $("failure").textContent = message;
}

if (typeof demoData === "undefined" || typeof qsnn === "undefined" || typeof demoPictures === "undefined")
  fail("bundle.js is missing: run `make demo-web`, which builds it.");
else if (typeof DecompressionStream === "undefined")
  fail("This browser cannot unpack what the page brings: it takes Chrome 80, Firefox 113, Safari 16.4, or newer.");
else start().catch((error) => fail(`The network could not be started: ${error.message}`));
