// The .qsnn file: a safetensors container that holds one integer program
// (docs/integer-program.md). The reader trusts nothing: every size is checked before it is used.

import { QSNNError } from "./errors.js";
import { sha256 } from "./sha256.js";
import { validate } from "./program.js";

const VERSIONS = ["1", "2"];
const MAX_HEADER = 8 * 2 ** 20;
const TYPES = { U32: Uint32Array, I32: Int32Array, I8: Int8Array, U8: Uint8Array };
// Fields of operations: numbers and text, then tensors with their type.
const FIELDS = {
  Conv: [
    ["name", "source", "target", "kernel", "stride", "padding", "dilation", "groups"],
    { weight: ["U32", "I8"], multiplier: ["I32"], shift: ["U8"], bias: ["I32"] },
  ],
  Affine: [["name", "source", "target"], { multiplier: ["I32"], shift: ["U8"], bias: ["I32"] }],
  Add: [["name", "sources", "factors", "target"], {}],
  Logic: [["name", "sources", "target", "function"], {}],
  Pool: [["name", "source", "target", "function", "kernel", "stride", "padding"], {}],
  Gather: [["name", "source", "target"], { channel: ["I32"], row: ["I32"], column: ["I32"] }],
  Concat: [["name", "sources", "target"], {}],
  Matmul: [["name", "sources", "target", "heads", "transpose"], {}],
  Delay: [["name", "source", "target"], {}],
  Neuron: [
    ["name", "source", "target", "bits", "reset", "order", "delay", "ceiling", "initial", "membrane"],
    {
      leak: ["I32"], threshold: ["I32"], bounds: ["I32"], reset_value: ["I32"], reading: ["I32"],
    },
  ],
};

const isObject = (x) => typeof x === "object" && x !== null && !Array.isArray(x);
const isSize = (n) => Number.isInteger(n) && n >= 0 && n <= 2 ** 31;

/**
 * Read and check the bytes of a .qsnn file.
 * @param {Uint8Array} content
 */
export function parse(content) {
  try {
    return read(content);
  } catch (error) {
    // Nested too deep, for one.
    throw error instanceof QSNNError ? error : new QSNNError(`it is malformed (${error.message})`);
  }
}

function read(content) {
  if (content.length < 8) throw new QSNNError("it is too short to be a .qsnn file");
  const view = new DataView(content.buffer, content.byteOffset, content.byteLength);
  const length = view.getUint32(0, true);
  if (view.getUint32(4, true) || length > MAX_HEADER || length > content.length - 8)
    throw new QSNNError(`its header claims ${length} bytes; the file is truncated or no .qsnn file`);
  const header = decode(content.subarray(8, 8 + length), "header");
  const metadata = header.__metadata__;
  delete header.__metadata__;
  if (!isObject(metadata) || metadata.format !== "qsnn")
    throw new QSNNError("it is a safetensors file but holds no qsnn program");
  if (!VERSIONS.includes(metadata.version))
    throw new QSNNError(
      `it has format version ${metadata.version} and this module reads versions ${VERSIONS.join(" and ")}`);
  const data = content.subarray(8 + length);
  if (metadata.sha256 !== checksum(String(metadata.program), header, data))
    throw new QSNNError("its checksum does not match: the file is damaged");
  const program = assemble(decode(metadata.program, "program"), tensorsOf(header, data));
  validate(program);
  return program;
}

function decode(text, what) {
  let found;
  try {
    found = JSON.parse(
      typeof text === "string" ? text : new TextDecoder("utf-8", { fatal: true }).decode(text));
  } catch (error) {
    throw new QSNNError(`its ${what} is malformed: ${error.message}`);
  }
  if (!isObject(found)) throw new QSNNError(`its ${what} is not a JSON object`);
  return found;
}

/** Over program text, tensor table (sorted keys, no spaces) and tensor bytes. */
function checksum(text, header, data) {
  const sorted = (x) =>
    isObject(x) ? Object.fromEntries(Object.keys(x).sort().map((k) => [k, sorted(x[k])])) : x;
  const parts = [text, JSON.stringify(sorted(header))].map((s) => new TextEncoder().encode(s));
  const whole = new Uint8Array(parts[0].length + parts[1].length + data.length);
  whole.set(parts[0]);
  whole.set(parts[1], parts[0].length);
  whole.set(data, parts[0].length + parts[1].length);
  return sha256(whole);
}

/** Copies of all tensors, which must tile the data exactly. */
function tensorsOf(header, data) {
  const tensors = new Map(), spans = [];
  for (const [name, entry] of Object.entries(header)) {
    const { dtype, shape, data_offsets: offsets } = isObject(entry) ? entry : {};
    const Type = Object.hasOwn(TYPES, dtype) ? TYPES[dtype] : undefined;
    const fits = Type && Array.isArray(shape) && shape.length <= 4 && shape.every(isSize) &&
      Array.isArray(offsets) && offsets.length === 2 && offsets.every(isSize);
    if (!fits) throw new QSNNError(`tensor ${name.slice(0, 60)} has a malformed entry`);
    const size = shape.reduce((a, b) => a * b, Type.BYTES_PER_ELEMENT);
    const [start, end] = offsets;
    if (end - start !== size || end > data.length)
      throw new QSNNError(`tensor ${name.slice(0, 60)} does not fit the file`);
    spans.push([start, end]);
    tensors.set(name, { dtype, shape, data: new Type(data.slice(start, end).buffer) });
  }
  let at = 0;
  for (const [start, end] of spans.sort((a, b) => a[0] - b[0] || a[1] - b[1])) {
    if (start !== at) throw new QSNNError("its tensors leave a gap or overlap");
    at = end;
  }
  if (at !== data.length) throw new QSNNError("bytes follow its last tensor");
  return tensors;
}

function assemble(d, tensors) {
  if (!Array.isArray(d.values) || !Array.isArray(d.ops) || !isObject(d.metadata))
    throw new QSNNError("its program is malformed");
  const values = d.values.map((entry) => {
    if (!Array.isArray(entry) || entry.length !== 4) throw new QSNNError("a value is malformed");
    const [name, shape, planes, scale] = entry;
    return { name, shape, planes, scale };
  });
  const ops = d.ops.map((record, k) => {
    const kind = isObject(record) && Object.hasOwn(FIELDS, record.op) ? record.op : undefined;
    if (!kind) throw new QSNNError(`operation ${k} is of an unknown kind`);
    const [plain, arrays] = FIELDS[kind];
    const op = { ...record };
    if (Object.keys(op).length !== plain.length + 1 || !plain.every((f) => Object.hasOwn(op, f)))
      throw new QSNNError(`operation ${k} lacks a field or has one too many`);
    for (const [name, dtypes] of Object.entries(arrays)) {
      const tensor = tensors.get(`${k}.${name}`);
      if (!tensor || !dtypes.includes(tensor.dtype))
        throw new QSNNError(`operation ${k} has no ${name} of type ${dtypes.join(" or ")}`);
      tensors.delete(`${k}.${name}`);
      op[name] = tensor;
    }
    return op;
  });
  if (tensors.size) throw new QSNNError("a tensor belongs to no operation");
  return {
    values, ops, outputs: d.outputs, reduction: d.reduction, inputScale: d.input_scale,
    inputRange: d.input_range, timesteps: d.timesteps, metadata: d.metadata,
  };
}
