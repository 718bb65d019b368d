// Runs the bundle on stored inputs, compares with stored outputs, and draws them.
// `?inputs=DIR`: another folder than example. With a decoder, prompt.mjs generates instead of drawing.

import { drawHeat, drawPairs, listPairs } from "./draw.mjs";
import { parseNpy } from "./npy.mjs";
import { showPrompt } from "./prompt.mjs";
import { RotaryExportError, compareOutputs, openBundle } from "./rotary.mjs";

const find = (selector) => document.querySelector(selector);

async function main() {
  const ort = await importRuntime();
  ort.env.wasm.numThreads = 1; // more need headers for cross-origin isolation
  const kit = JSON.parse(new TextDecoder().decode(await read("kit.json")));
  const options = { executionProviders: ["wasm"] };
  const graph = await openBundle(ort, (name) => read(`bundle/${name}`), kit.graph, options);

  const folder = new URLSearchParams(location.search).get("inputs") ?? "example";
  const inputs = await readArrays(folder, kit.inputs);
  const expected = await readArrays(`${folder}/expected`, kit.outputs);
  const outputs = await graph.run(inputs);
  const results = compareOutputs(graph, outputs, expected);

  find("#facts").textContent = [
    `bundle ${graph.manifest.name}, graph ${kit.graph}, function body`,
    `onnxruntime-web ${ort.env.versions.web} (wasm)`,
    `inputs: ${folder}`,
    `expected values by ${kit.expected_by}`,
    "sha256 as in the manifest",
  ].join(" · ");
  showResults(results);
  const generated = graph.manifest.config.decoder && (await showPrompt(graph));
  if (!graph.manifest.config.decoder) showDrawing(graph, inputs, outputs);
  const passed = results.every((result) => result.passed);
  globalThis.report = { version: ort.env.versions.web, results, generated }; // for check.mjs
  finish(passed ? "passed" : "failed", passed ? "passed" : "failed: an output differs");
}

async function importRuntime() {
  try {
    return await import("onnxruntime-web/wasm");
  } catch {
    throw new RotaryExportError("onnxruntime-web is not installed: npm ci --ignore-scripts");
  }
}

async function read(file) {
  const response = await fetch(file);
  if (!response.ok) throw new RotaryExportError(`${file} can't be read: ${response.status}`);
  return new Uint8Array(await response.arrayBuffer());
}

async function readArrays(folder, names) {
  const arrays = {};
  for (const name of names) {
    const file = `${folder}/${name}.npy`;
    arrays[name] = parseNpy(await read(file), file);
  }
  return arrays;
}

function finish(state, text) {
  document.body.dataset.state = state;
  find("#verdict").textContent = text;
}

function showResults(results) {
  for (const { name, type, dims, maxError, allowed, exact, passed } of results) {
    const row = find("tbody").insertRow();
    row.insertCell().textContent = name;
    row.insertCell().textContent = `${type} (${dims.join(", ")})`;
    row.insertCell().textContent = exact ? "0, equal to the bit" : maxError.toExponential(1);
    row.insertCell().textContent = allowed.toExponential(1);
    const result = row.insertCell();
    [result.textContent, result.className] = passed ? ["pass", "pass"] : ["FAIL", "fail"];
  }
  find("table").hidden = false;
}

// ---- drawings

function showDrawing(graph, inputs, outputs) {
  if (graph.name === "rotate") showPairs(graph, inputs, outputs);
  else showHeat(inputs, outputs);
  find("section").hidden = false;
}

function showPairs({ manifest }, inputs, outputs) {
  const [table] = manifest.graphs.tables.outputs; // freqs has each angle twice, cos_cache once
  const count = table.shape.at(-1) / (table.name === "freqs" ? 2 : 1);
  const pairs = listPairs(count, manifest.config.interleaved);
  const redraw = () => {
    const name = tensor.value;
    const [before, after] = [inputs[name], outputs[`${name}_out`]];
    setChoices(batch, before.dims[0]);
    setChoices(head, before.dims[1]);
    const tokens = labelTokens(inputs, Number(batch.value), before.dims[2]);
    find("#drawing").replaceChildren(
      drawPairs(before, after, Number(batch.value), Number(head.value), pairs, tokens),
    );
  };
  const tensor = addChoice("tensor", redraw);
  const batch = addChoice("batch", redraw);
  const head = addChoice("head", redraw);
  tensor.append(new Option("query"), new Option("key"));
  find("h2").textContent = "Each pair of channels, before and after";
  find("#legend").innerHTML =
    '<span class="swatch before"></span>before &emsp; <span class="swatch after"></span>after, as ' +
    "onnxruntime-web computes it &emsp; below: the angle between them, which grows with the position " +
    "id, fast in the first pairs and slowly in the last";
  redraw();
}

function labelTokens(inputs, batch, length) {
  const ids = inputs.position_ids;
  if (ids === undefined) return Array.from({ length }, (_, row) => `position ${row}`);
  // Multimodal positions have a first axis more: several ids for each token.
  const [batches] = ids.dims.slice(-2);
  const axes = ids.data.length / (batches * length);
  return Array.from({ length }, (_, row) => {
    const all = Array.from(
      { length: axes },
      (_, axis) => ids.data[(axis * batches + batch) * length + row],
    );
    return `position ${all.join(", ")}`;
  });
}

function showHeat(inputs, outputs) {
  const [[name, output]] = Object.entries(outputs);
  const redraw = () => find("#drawing").replaceChildren(drawHeat(output, Number(batch.value)));
  const batch = addChoice("batch", redraw);
  setChoices(batch, output.dims[0]);
  find("h2").textContent =
    `${name}: a row for each token, a column for each of ${output.dims.at(-1)} values`;
  find("#legend").textContent = "blue: negative, red: positive; the darker, the larger";
  redraw();
}

function addChoice(label, redraw) {
  const select = document.createElement("select");
  select.addEventListener("change", redraw);
  const element = document.createElement("label");
  element.append(label, select);
  find("#controls").append(element);
  return select;
}

function setChoices(select, count) {
  while (select.options.length > count) select.remove(count);
  while (select.options.length < count) select.append(new Option(String(select.options.length)));
}

try {
  await main();
} catch (error) {
  finish("error", error.message || String(error));
}
