// Generates with a bundle of a decoder: text of its tokenizer, or token ids.

import path from "node:path";
import { parseArgs } from "node:util";

import { Decoder } from "./decoder.mjs";
import { KIT, importRuntime, read, readJson } from "./files.mjs";
import { RotaryExportError, openBundle } from "./rotary.mjs";
import { Text } from "./text.mjs";

const USAGE = `usage: node generate.mjs --prompt TEXT ... | --ids 1,2,3 ... [--max-new-tokens N] [--json]
  --prompt TEXT         continue a text; the bundle must have a tokenizer
  --ids IDS             continue token ids; print token ids
  --max-new-tokens N    at most (default: 32)
  --json                print {"ids": [[...]], "text": [...] or null, "tokens_per_second": x}`;

async function main() {
  const options = readArguments();
  const ort = await importRuntime();
  const kit = await readJson("kit.json");
  const readBundle = (name) => read(path.join(KIT, "bundle", name));
  const graph = await openBundle(ort, readBundle, kit.graph);
  const decoder = new Decoder(graph, await graph.readJson("generation_config.json"));
  const text = options.prompt && (await Text.open(graph));
  const prompts = text ? options.prompt.map((words) => text.encode(words)) : options.ids;

  const streams = text && prompts.map(() => text.startStream());
  const made = prompts.map(() => []);
  const start = performance.now();
  const maxNewTokens = Number(options["max-new-tokens"]);
  for await (const tokens of decoder.stream(prompts, { maxNewTokens })) {
    tokens.forEach((token, row) => {
      if (token === undefined) return;
      made[row].push(token);
      if (options.json || prompts.length > 1) return;
      process.stdout.write(text ? streams[row](token) : `${token} `);
    });
  }
  const seconds = (performance.now() - start) / 1000;
  const count = made.flat().length;
  const texts = text ? made.map((ids) => text.decode(ids)) : null;
  if (options.json) {
    const ids = prompts.map((prompt, row) => [...prompt, ...made[row]]);
    console.log(JSON.stringify({ ids, text: texts, tokens_per_second: count / seconds }));
    return;
  }
  if (prompts.length > 1) console.log((texts ?? made.map((ids) => ids.join(" "))).join("\n"));
  else console.log();
  console.log(`${count} tokens in ${seconds.toFixed(2)} s, ${(count / seconds).toFixed(1)} tokens/s`);
}

function readArguments() {
  try {
    const { values } = parseArgs({
      options: {
        prompt: { type: "string", multiple: true },
        ids: { type: "string", multiple: true },
        "max-new-tokens": { type: "string", default: "32" },
        json: { type: "boolean", default: false },
      },
    });
    if (Boolean(values.prompt) === Boolean(values.ids)) throw new Error("pass --prompt or --ids");
    return { ...values, ids: values.ids?.map((text) => text.split(",").map(Number)) };
  } catch (error) {
    console.error(`error: ${error.message.split("\n")[0]}\n${USAGE}`);
    process.exit(2);
  }
}

try {
  await main();
} catch (error) {
  if (!(error instanceof RotaryExportError)) error.message = error.message.split("\n")[0];
  console.error(`error: ${error.message.trim()}`);
  process.exitCode = 1;
}
