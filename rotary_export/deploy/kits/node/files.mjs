// Files of this folder, and the runtime that opens its bundle.

import { readFile } from "node:fs/promises";
import path from "node:path";

import { RotaryExportError } from "./rotary.mjs";

export const KIT = import.meta.dirname;

export async function importRuntime() {
  try {
    const ort = await import("onnxruntime-node");
    ort.env.logLevel = "fatal"; // what it logs, it throws as well
    return ort;
  } catch (error) {
    if (error.code !== "ERR_MODULE_NOT_FOUND") throw error;
    throw new RotaryExportError("onnxruntime-node is not installed: npm ci --ignore-scripts");
  }
}

export async function read(file) {
  try {
    return await readFile(file);
  } catch (error) {
    throw new RotaryExportError(`${file} can't be read: ${error.message.split(",")[0]}`);
  }
}

export async function readJson(name) {
  return JSON.parse(new TextDecoder().decode(await read(path.join(KIT, name))));
}
