// Generates tokens with a graph that has a key/value cache: token ids in, token ids out.

import { RotaryExportError, toNumbers } from "./rotary.mjs";

const ARRAYS = { float32: Float32Array, float16: Uint16Array, float64: Float64Array };

/** Greedy generation; it keeps the keys and values of one batch of rows. */
export class Decoder {
  /**
   * @param {import("./rotary.mjs").Graph} graph Of a causal language model exported with its cache.
   * @param {{eos_token_id?: number | number[]}} [generation] The bundle's generation_config.json.
   * @throws {RotaryExportError} The graph has no cache, or one that this loop does not run.
   */
  constructor(graph, generation = {}) {
    const facts = graph.manifest.config.decoder;
    if (facts === undefined || facts.cache === "window") {
      throw new RotaryExportError(
        `${graph.name} must have a key/value cache, got ${facts?.cache ?? "none"}: export the model with --cache full or static`,
      );
    }
    this.graph = graph;
    this.isStatic = facts.cache === "static";
    this.maxLength = Math.min(facts.max_cache_len ?? Infinity, facts.max_positions ?? Infinity);
    this.facts = facts;
    this.ends = [generation.eos_token_id ?? []].flat();
    this.names = new Set(graph.info.inputs.map((input) => input.name));
    this.caches = graph.info.inputs.filter(({ name }) => name.startsWith("past_key_values."));
  }

  /**
   * Generate after prompts, as transformers' greedy `generate` does.
   * @param {number[][]} prompts Token ids of each row; their lengths may differ.
   * @param {{maxNewTokens: number, ends?: number[]}} options `ends`: tokens that end a row; default:
   *   those of the generation config.
   * @yields {(number | undefined)[]} The next token of each row; undefined: the row has ended.
   * @throws {RotaryExportError} A prompt is empty, too long, or has an unknown token.
   */
  async *stream(prompts, { maxNewTokens, ends = this.ends }) {
    this.checkPrompts(prompts, maxNewTokens);
    const rows = prompts.map((prompt) => [...prompt]);
    const open = rows.map(() => true);
    let logits = await this.fill(rows);
    for (let left = maxNewTokens - 1; ; left--) {
      const tokens = logits.map(findBest);
      yield tokens.map((token, row) => (open[row] ? token : undefined));
      tokens.forEach((token, row) => {
        rows[row].push(token); // of a row that has ended, too: a batch stays of one length
        open[row] &&= !ends.includes(token);
      });
      if (left <= 0 || !open.includes(true)) return;
      logits = await this.append(rows);
    }
  }

  checkPrompts(prompts, maxNewTokens) {
    if (!Number.isInteger(maxNewTokens) || maxNewTokens < 1) {
      throw new RotaryExportError(`maxNewTokens must be an integer >= 1, got ${maxNewTokens}`);
    }
    const count = this.graph.info.outputs.find(({ name }) => name === "logits").shape.at(-1);
    for (const [row, prompt] of prompts.entries()) {
      if (!prompt.length) throw new RotaryExportError(`prompt ${row} must have tokens, got none`);
      const bad = prompt.find((id) => !Number.isInteger(id) || id < 0 || id >= count);
      if (bad !== undefined) {
        throw new RotaryExportError(`token ids must be in [0, ${count}), got ${bad} in prompt ${row}`);
      }
      if (prompt.length + maxNewTokens - 1 > this.maxLength) {
        throw new RotaryExportError(
          `prompt and new tokens must be <= ${this.maxLength + 1}, got ${prompt.length} + ${maxNewTokens}`,
        );
      }
    }
    if (!prompts.length) throw new RotaryExportError("prompts must have a row, got none");
    const isPadded = prompts.some(({ length }) => length !== prompts[0].length);
    if (isPadded && !this.names.has("attention_mask")) {
      throw new RotaryExportError("prompts must have one length: the graph has no attention_mask");
    }
    if (isPadded && this.isStatic && this.facts.logits === "last") {
      throw new RotaryExportError(
        "prompts must have one length: a static cache is padded at the right, and the graph has the logits of the last column alone",
      );
    }
  }

  /** Compute the cache of whole rows; return the logits after each. */
  async fill(rows) {
    const width = Math.max(...rows.map((row) => row.length));
    this.padding = rows.map((row) => width - row.length);
    this.past = Object.fromEntries(this.caches.map((info) => [info.name, this.makeEmpty(info, rows)]));
    return this.run(rows, 0, width);
  }

  /** Add the last token of each row. */
  append(rows) {
    const width = Math.max(...rows.map((row) => row.length));
    // transformers computes its cache anew past these lengths: the angles of all tokens change.
    if (this.facts.length_thresholds.includes(width - 1)) return this.fill(rows);
    return this.run(rows, width - 1, width);
  }

  /** Run the columns from `past` to `width`; a shorter row is padded left or, if static, right. */
  async run(rows, past, width) {
    const size = [rows.length, width - past];
    const columns = Array.from({ length: size[1] }, (_, column) => past + column);
    // The index of a token in its row. In a static cache it is its slot: later steps of a shorter
    // row overwrite its padding.
    const isPrefill = past === 0;
    const place = (row, column) => {
      if (!this.isStatic) return column - this.padding[row];
      return isPrefill ? column : column - this.padding[row];
    };
    const each = (make) => rows.flatMap((row, r) => columns.map((c) => make(row, place(r, c), r)));
    const feeds = {
      input_ids: makeIds(each((row, index) => row[index] ?? 0), size),
      position_ids: makeIds(each((row, index) => Math.max(index, 0)), size),
      attention_mask: this.makeMask(rows, width),
      ...this.past,
    };
    for (const name of Object.keys(feeds)) if (!this.names.has(name)) delete feeds[name];
    const outputs = await this.graph.run(feeds);
    for (const name of Object.keys(this.past)) {
      this.past[name] = outputs[name.replace("past_key_values", "present")];
    }
    const last = (row) => size[1] - 1 - (this.isStatic && isPrefill ? this.padding[row] : 0);
    return rows.map((_, row) => takeRow(outputs.logits, row, last(row)));
  }

  makeMask(rows, width) {
    const length = this.isStatic ? this.facts.max_cache_len : width;
    const isToken = (row, slot) =>
      this.isStatic ? slot < rows[row].length : slot >= this.padding[row];
    const items = rows.flatMap((_, row) =>
      Array.from({ length }, (_, slot) => Number(isToken(row, slot))),
    );
    return makeIds(items, [rows.length, length]);
  }

  makeEmpty({ dtype, shape }, rows) {
    const dims = [rows.length, shape[1], this.isStatic ? shape[2] : 0, shape[3]];
    return { type: dtype, dims, data: new ARRAYS[dtype](dims.reduce((a, b) => a * b)) };
  }
}

function makeIds(items, dims) {
  return { type: "int64", dims, data: BigInt64Array.from(items, BigInt) };
}

/** Take (vocab_size,) of logits (batch_size, seq_len or 1, vocab_size). */
function takeRow({ type, dims: [, length, count], data }, row, column) {
  const start = (row * length + Math.min(column, length - 1)) * count;
  return toNumbers({ type, data: data.subarray(start, start + count) });
}

function findBest(logits) {
  let best = 0;
  for (let i = 1; i < logits.length; i++) if (logits[i] > logits[best]) best = i;
  return best;
}
