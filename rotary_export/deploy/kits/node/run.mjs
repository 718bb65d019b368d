// Runs a bundle in ONNX Runtime for Node.js.

import { mkdir, writeFile } from "node:fs/promises";
import path from "node:path";
import { parseArgs } from "node:util";

import { KIT, importRuntime, read, readJson } from "./files.mjs";
import { formatNpy, parseNpy } from "./npy.mjs";
import { compareOutputs, openBundle } from "./rotary.mjs";

const USAGE = `usage: node run.mjs [--inputs DIR] [--out DIR] [--check]
  --inputs DIR  folder with NAME.npy of each input (default: example)
  --out DIR     write NAME.npy of each output there
  --check       compare the outputs with those in DIR/expected of the inputs`;

async function main() {
  const options = readArguments();
  const ort = await importRuntime();
  const kit = await readJson("kit.json");
  const graph = await openBundle(ort, (name) => read(path.join(KIT, "bundle", name)), kit.graph);

  const inputs = await readArrays(options.inputs, kit.inputs);
  const expected = options.check
    ? await readArrays(path.join(options.inputs, "expected"), kit.outputs)
    : undefined;
  const outputs = await graph.run(inputs);
  const results = expected && compareOutputs(graph, outputs, expected);

  console.log(`${kit.graph}, function body, onnxruntime-node ${ort.env.versions.node}`);
  for (const [name, { type, dims }] of Object.entries(outputs)) {
    const result = results?.find((r) => r.name === name);
    console.log(`${name} ${type} (${dims.join(", ")})${result ? describe(result) : ""}`);
    if (result && !result.passed) process.exitCode = 1;
  }
  if (options.out === undefined) return;
  await mkdir(options.out, { recursive: true });
  for (const [name, tensor] of Object.entries(outputs)) {
    await writeFile(path.join(options.out, `${name}.npy`), formatNpy(tensor));
  }
}

function describe({ maxError, allowed, exact, passed }) {
  const [error, most] = [maxError, allowed].map((number) => number.toExponential(1));
  const found = exact ? "equal to the bit" : `max error ${error} of ${most} allowed`;
  return `: ${found}: ${passed ? "pass" : "FAIL"}`;
}

function readArguments() {
  try {
    return parseArgs({
      options: {
        inputs: { type: "string", default: path.join(KIT, "example") },
        out: { type: "string" },
        check: { type: "boolean", default: false },
      },
    }).values;
  } catch (error) {
    console.error(`error: ${error.message.split("\n")[0]}\n${USAGE}`);
    process.exit(2);
  }
}

async function readArrays(folder, names) {
  const arrays = {};
  for (const name of names) {
    const file = path.join(folder, `${name}.npy`);
    arrays[name] = parseNpy(await read(file), file);
  }
  return arrays;
}

try {
  await main();
} catch (error) {
  console.error(`error: ${error.message.trim()}`);
  process.exitCode = 1;
}
