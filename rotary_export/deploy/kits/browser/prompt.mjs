// The form by which a decoder's bundle generates: text, if it has a tokenizer, else token ids.

import { Decoder } from "./decoder.mjs";
import { RotaryExportError } from "./rotary.mjs";
import { Text } from "./text.mjs";

const find = (selector) => document.querySelector(selector);

/**
 * Show the form, and fill it from the page's address: `?prompt=TEXT` or `?ids=1,2,3`, and
 * `max_new_tokens=N`.
 * @param {import("./rotary.mjs").Graph} graph
 * @returns {Promise<{ids: number[], text: string | null, pieces: string[]} | undefined>} What it
 *   generated, if the address has a prompt.
 */
export async function showPrompt(graph) {
  const decoder = new Decoder(graph, await graph.readJson("generation_config.json"));
  const wanted = new URLSearchParams(location.search);
  const isText = "tokenizer.json" in graph.manifest.files && !wanted.has("ids");
  const text = isText ? await Text.open(graph) : null;
  find("#prompt").value = wanted.get("prompt") ?? wanted.get("ids") ?? "";
  find("#prompt").placeholder = isText ? "Once upon a time" : "token ids: 1, 2, 3";
  find("#count").value = wanted.get("max_new_tokens") ?? find("#count").value;
  const run = () => generate(decoder, text, find("#prompt").value, Number(find("#count").value));
  find("#generate").addEventListener("submit", async (event) => {
    event.preventDefault();
    find("#generate button").disabled = true;
    await run().catch((error) => (find("#made").textContent = error.message));
    find("#generate button").disabled = false;
  });
  find("#generate").hidden = false;
  if (wanted.has("prompt") || wanted.has("ids")) return run();
}

async function generate(decoder, text, words, maxNewTokens) {
  const prompt = text ? text.encode(words) : readIds(words);
  const [ids, pieces] = [[...prompt], []];
  const add = text ? text.startStream() : (token) => ` ${token}`;
  const start = performance.now();
  find("#made").textContent = "";
  for await (const [token] of decoder.stream([prompt], { maxNewTokens })) {
    ids.push(token);
    pieces.push(add(token));
    find("#made").append(pieces.at(-1)); // text, never HTML
    await new Promise((resolve) => setTimeout(resolve)); // wasm runs here, too: let the page draw
  }
  const seconds = (performance.now() - start) / 1000;
  find("#speed").textContent = `${pieces.length} tokens, ${(pieces.length / seconds).toFixed(1)}/s`;
  const made = ids.slice(prompt.length);
  return { ids, text: text?.decode(made) ?? null, pieces, tokensPerSecond: made.length / seconds };
}

function readIds(words) {
  if (!words.trim()) throw new RotaryExportError("prompt 0 must have tokens, got none");
  return words.split(",").map(Number);
}
