// Opens a graph of a bundle in ONNX Runtime's JavaScript: onnxruntime-node or onnxruntime-web.

import { RotaryExportError } from "./npy.mjs";

export { RotaryExportError };

const MANIFEST = "manifest.json";

/**
 * Open a graph of a bundle, once its sha256 is the one in the manifest.
 * @param ort The module onnxruntime-node or onnxruntime-web.
 * @param {(name: string) => Promise<Uint8Array>} read Reads a file of the bundle.
 * @param {string} name Of the graph: "rotate", "model" or "tables".
 * @param {object} [options] Of ort.InferenceSession.create.
 * @returns {Promise<Graph>}
 * @throws {RotaryExportError} A file is damaged, or ONNX Runtime's JavaScript does not support it.
 */
export async function openBundle(ort, read, name, options) {
  const manifest = readManifest(await read(MANIFEST));
  const info = manifest.graphs[name];
  const file = info?.files.onnx;
  if (file === undefined) {
    const known = Object.keys(manifest.graphs).join(", ");
    throw new RotaryExportError(
      `the graph must be one of ${known}, with an ONNX file, got ${name}`,
    );
  }
  for (const { name: tensor, dtype } of [...info.inputs, ...info.outputs]) {
    if (dtype === "bfloat16") {
      throw new RotaryExportError(
        `${tensor} is bfloat16, of which ONNX Runtime's JavaScript has no tensors; export float32 or float16`,
      );
    }
  }
  const oldest = manifest.minimum_onnxruntime.portable;
  if (compareVersions(ort.env.versions.common, oldest) < 0) {
    throw new RotaryExportError(
      `the bundle needs ONNX Runtime >= ${oldest}, got ${ort.env.versions.common}`,
    );
  }
  const readFile = (name) => readHashed(read, manifest, name);
  const data = `${file}_data`; // a large model's weights
  const externalData = data in manifest.files ? [await readData(readFile, data)] : [];
  const session = await ort.InferenceSession.create(await readFile(file), {
    ...options,
    externalData,
  });
  return new Graph(ort, manifest, name, session, readFile);
}

async function readHashed(read, manifest, name) {
  const bytes = await read(name);
  if ((await hash(bytes)) !== manifest.files[name]) {
    throw new RotaryExportError(
      `${name} is not the file that was exported: its sha256 differs from the one in ${MANIFEST}`,
    );
  }
  return bytes;
}

// The graph names the file without its folder.
async function readData(readFile, name) {
  return { path: name.split("/").at(-1), data: await readFile(name) };
}

function readManifest(bytes) {
  let manifest;
  try {
    manifest = JSON.parse(new TextDecoder().decode(bytes));
  } catch (error) {
    throw new RotaryExportError(`${MANIFEST} is not valid JSON: ${error.message}`);
  }
  const { format, format_version: version } = manifest;
  if (format !== "rotary_export.bundle" || version !== 1) {
    throw new RotaryExportError(
      `${MANIFEST} must be of a rotary_export.bundle, version 1, got ${format}, version ${version}`,
    );
  }
  return manifest;
}

function compareVersions(left, right) {
  const [[major, minor], [otherMajor, otherMinor]] = [left, right].map((v) =>
    v.split(".").map(Number),
  );
  return major - otherMajor || minor - otherMinor;
}

async function hash(bytes) {
  const digest = await crypto.subtle.digest("SHA-256", bytes);
  return Array.from(new Uint8Array(digest), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** One graph of a bundle, loaded. */
export class Graph {
  constructor(ort, manifest, name, session, readFile) {
    this.ort = ort;
    this.manifest = manifest;
    this.name = name;
    this.info = manifest.graphs[name];
    this.session = session;
    this.readFile = readFile;
  }

  /**
   * Read a JSON file of the bundle, such as generation_config.json.
   * @param {string} name
   * @returns {Promise<object>} {}: the bundle has no such file.
   * @throws {RotaryExportError} It is damaged.
   */
  async readJson(name) {
    if (!(name in this.manifest.files)) return {};
    return JSON.parse(new TextDecoder().decode(await this.readFile(name)));
  }

  /**
   * Run the graph.
   * @param {Record<string, {type: string, dims: readonly number[], data: ArrayBufferView}>} inputs
   *   By name; ort.Tensor, or what parseNpy returns.
   * @returns {Promise<Record<string, ort.Tensor>>} By name.
   * @throws {RotaryExportError} An input is missing, unknown, of a wrong type or shape, or out of
   *   its limits.
   */
  async run(inputs) {
    checkInputs(this.name, this.info, inputs);
    const feeds = {};
    for (const [name, { type, dims, data }] of Object.entries(inputs)) {
      feeds[name] = new this.ort.Tensor(type, data, dims);
      // Where JavaScript has Float16Array, ort.Tensor makes one of the bits, and onnxruntime-node
      // reads it as empty (github.com/microsoft/onnxruntime/pull/32323).
      if (type === "float16") feeds[name].cpuData = toBits(data);
    }
    return this.session.run(feeds);
  }
}

function checkInputs(graph, info, inputs) {
  const known = info.inputs.map((input) => input.name);
  const accepts = `it accepts ${known.join(", ")}`;
  for (const name of Object.keys(inputs)) {
    if (!known.includes(name))
      throw new RotaryExportError(`${graph} has no input '${name}'; ${accepts}`);
  }
  const sizes = {};
  const isSum = (dim) => String(dim).includes(" + ");
  const sumsLast = info.inputs.toSorted((a, b) => a.shape.some(isSum) - b.shape.some(isSum));
  for (const input of sumsLast) {
    const value = inputs[input.name];
    if (value === undefined) {
      throw new RotaryExportError(`${graph} needs the input '${input.name}'; ${accepts}`);
    }
    if (value.type !== input.dtype) {
      throw new RotaryExportError(`${input.name} must be ${input.dtype}, got ${value.type}`);
    }
    checkShape(input, value.dims, sizes);
    if (input.limits) checkLimits(input, value);
  }
  for (const [dim, largest] of Object.entries(info.max_size)) {
    if (sizes[dim] > largest) {
      throw new RotaryExportError(`${dim} must be <= ${largest}, got ${sizes[dim]}`);
    }
  }
  for (const [dim, smallest] of Object.entries(info.min_size ?? {})) {
    if (sizes[dim] < smallest) {
      throw new RotaryExportError(`${dim} must be >= ${smallest}, got ${sizes[dim]}`);
    }
  }
}

// The terms of a size: [factor, name] for "8 * height", [3, ""] for a number.
const readTerms = (dim) =>
  `${dim}`.split(" + ").map((text) => {
    const [name, factor] = text.split(" * ").reverse();
    return /^\d+$/.test(name) ? [Number(name), ""] : [Number(factor ?? 1), name];
  });

// An axis is a size, a name that means the same size wherever it occurs, a sum or a multiple.
function checkShape({ name, shape }, dims, sizes) {
  const resolve = (axis, size) => {
    const terms = readTerms(axis);
    const names = terms.filter(([, name]) => name);
    const constant = terms.reduce((sum, [number, name]) => sum + (name ? 0 : number), 0);
    if (names.length === 1) {
      const [factor, name] = names[0];
      sizes[name] ??= Math.floor((size - constant) / factor);
    }
    return names.reduce((sum, [factor, name]) => sum + factor * sizes[name], constant);
  };
  if (
    dims.length === shape.length &&
    shape.every((axis, i) => resolve(axis, dims[i]) === dims[i])
  ) {
    return;
  }
  const known = Object.entries(sizes).filter(([axis]) =>
    shape.some((dim) => readTerms(dim).some(([, name]) => name === axis)),
  );
  const where = known.map(([axis, size]) => `, ${axis}=${size}`).join("");
  throw new RotaryExportError(
    `${name} must have shape (${shape.join(", ")})${where}, got (${dims.join(", ")})`,
  );
}

function checkLimits({ name, limits }, { dims, data }) {
  const [low, high] = limits;
  const bad = data.findIndex((item) => item < low || item > high);
  if (bad < 0) return;
  const [batch, row] = [Math.floor(bad / dims.at(-1)) % dims.at(-2), bad % dims.at(-1)];
  const where = dims.length > 1 ? ` at batch ${batch}, row ${row}` : "";
  throw new RotaryExportError(`${name} must be in [${low}, ${high + 1}), got ${data[bad]}${where}`);
}

// ---- comparison with stored values

const EPSILON = { float16: 2 ** -10, float32: 2 ** -23, float64: 2 ** -52 };

/**
 * Compare outputs with expected values.
 *
 * The tolerance is that of the function body in the manifest's parity report, in ulp of the output's
 * largest magnitude; 0: equal to the bit.
 * @param {Graph} graph
 * @param {Record<string, object>} outputs Of Graph.run.
 * @param {Record<string, object>} expected By name.
 * @returns {{name: string, type: string, dims: number[], maxError: number, allowed: number,
 *   exact: boolean, passed: boolean}[]}
 * @throws {RotaryExportError} An expected value is of another type or shape.
 */
export function compareOutputs(graph, outputs, expected) {
  return graph.info.outputs.map(({ name }) => {
    const [got, want] = [outputs[name], expected[name]];
    const describe = ({ type, dims }) => `${type} (${dims.join(", ")})`;
    if (describe(got) !== describe(want)) {
      throw new RotaryExportError(
        `${name} must be ${describe(want)} as expected, got ${describe(got)}`,
      );
    }
    const row = graph.manifest.parity.rows.find(
      (r) => r.graph === graph.name && r.output === name && r.runtime === "ONNX Runtime, function body",
    );
    const [left, right] = [toNumbers(got), toNumbers(want)];
    let [maxError, largest, exact] = [0, 0, true];
    for (let i = 0; i < right.length; i++) {
      if (Number.isFinite(right[i])) largest = Math.max(largest, Math.abs(right[i]));
      if (Object.is(left[i], right[i])) continue;
      exact = false;
      maxError = Math.max(maxError, Math.abs(left[i] - right[i])); // NaN, if either is, for good
    }
    const allowed = (row?.eager_allowed ?? 0) * (EPSILON[got.type] ?? 0) * largest;
    const passed = exact || (allowed > 0 && maxError <= allowed);
    return { name, type: got.type, dims: [...got.dims], maxError, allowed, exact, passed };
  });
}

function toBits({ buffer, byteOffset, length }) {
  return new Uint16Array(buffer, byteOffset, length);
}

/** Return a tensor's items as numbers. */
export function toNumbers({ type, data }) {
  if (type === "float16" && data instanceof Uint16Array) return Float64Array.from(data, decodeHalf);
  return type.endsWith("int64") ? Float64Array.from(data, Number) : data;
}

function decodeHalf(bits) {
  const [sign, exponent, fraction] = [bits >> 15 ? -1 : 1, (bits >> 10) & 31, bits & 1023];
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return exponent ? sign * 2 ** (exponent - 25) * (1024 + fraction) : sign * 2 ** -24 * fraction;
}
