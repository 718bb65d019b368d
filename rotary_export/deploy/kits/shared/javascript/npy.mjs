// `.npy` files: from bytes to { type, dims, data } and back, as ort.Tensor names these.

export class RotaryExportError extends Error {}

// numpy's code, the name in manifests and ONNX Runtime, the array of its items. float16
// is kept as bits, since Float16Array is missing before Node.js 24; bool as bytes, as in ort.Tensor.
// numpy lacks bfloat16 and writes it as raw items of two bytes.
// prettier-ignore
const TYPES = [
  ["<f4", "float32", Float32Array], ["<f2", "float16", Uint16Array], ["<f8", "float64", Float64Array],
  ["|i1", "int8", Int8Array], ["<i2", "int16", Int16Array], ["<i4", "int32", Int32Array],
  ["|u1", "uint8", Uint8Array], ["<u2", "uint16", Uint16Array], ["<u4", "uint32", Uint32Array],
  ["<i8", "int64", BigInt64Array], ["<u8", "uint64", BigUint64Array],
  ["|b1", "bool", Uint8Array], ["|V2", "bfloat16", Uint16Array],
];
const MAGIC = "\x93NUMPY";

/**
 * Read an array.
 * @param {Uint8Array} bytes The file.
 * @param {string} name Of the file, for messages.
 * @returns {{type: string, dims: number[], data: ArrayBufferView}} In C order.
 * @throws {RotaryExportError} It is not an .npy file, is truncated, or has a type that can't be read.
 */
export function parseNpy(bytes, name) {
  if ([...MAGIC].some((char, i) => char.charCodeAt(0) !== bytes[i])) {
    throw new RotaryExportError(`${name} must be an .npy file, but lacks its signature`);
  }
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const start = bytes[6] === 1 ? 10 : 12; // of the header; its length is before it
  const end =
    bytes.length < start
      ? NaN
      : start + (start === 10 ? view.getUint16(8, true) : view.getUint32(8, true));
  const header = new TextDecoder().decode(bytes.subarray(start, end));
  const code = /'descr': *'([^']+)'/.exec(header)?.[1].replace("<V2", "|V2");
  const shape = /'shape': *\(([\d, ]*)\)/.exec(header)?.[1];
  if (!(end <= bytes.length) || code === undefined || shape === undefined) {
    throw new RotaryExportError(`${name} has a damaged header`);
  }
  const known = TYPES.find(([numpy]) => numpy === code);
  if (known === undefined) {
    throw new RotaryExportError(`${name} must contain numbers, little-endian, got numpy's '${code}'`);
  }
  if (/'fortran_order': *True/.test(header)) {
    throw new RotaryExportError(`${name} must be in C order, got Fortran order`);
  }
  const [, type, Items] = known;
  const dims = shape
    .split(",")
    .filter((size) => size.trim())
    .map(Number);
  const expected = dims.reduce((a, b) => a * b, Items.BYTES_PER_ELEMENT);
  if (bytes.length - end !== expected) {
    throw new RotaryExportError(
      `${name} must have ${expected} bytes of data, got ${bytes.length - end}`,
    );
  }
  // A copy, as typed arrays must begin at a multiple of their item's size; the slice of a Buffer of
  // Node.js would be none.
  const data = bytes.buffer.slice(bytes.byteOffset + end, bytes.byteOffset + bytes.length);
  return { type, dims, data: new Items(data) };
}

/**
 * Write an array.
 * @param {{type: string, dims: readonly number[], data: ArrayBufferView}} tensor For example an ort.Tensor.
 * @returns {Uint8Array} The file.
 */
export function formatNpy({ type, dims, data }) {
  const [code] = TYPES.find(([, name]) => name === type);
  const shape = dims.length === 1 ? `${dims[0]},` : dims.join(", ");
  const header = `{'descr': '${code}', 'fortran_order': False, 'shape': (${shape}), }`;
  const length = Math.ceil((10 + header.length + 1) / 64) * 64 - 10;
  const bytes = new Uint8Array(10 + length + data.byteLength);
  const text = `${MAGIC}\x01\x00${String.fromCharCode(length & 255, length >> 8)}${header.padEnd(length - 1)}\n`;
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  bytes.set(new Uint8Array(data.buffer, data.byteOffset, data.byteLength), text.length);
  return bytes;
}
