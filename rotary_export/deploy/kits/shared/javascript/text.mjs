// Text to token ids and back, by the tokenizer of a bundle: the package @huggingface/tokenizers.

import { RotaryExportError } from "./rotary.mjs";

const UNFINISHED = "\ufffd"; // what a decoder shows of a character whose last bytes are missing

export class Text {
  constructor(tokenizer) {
    this.tokenizer = tokenizer;
  }

  /**
   * Open the tokenizer of a bundle.
   * @param {import("./rotary.mjs").Graph} graph
   * @returns {Promise<Text>}
   * @throws {RotaryExportError} The bundle has no tokenizer, or the package is not installed.
   */
  static async open(graph) {
    if (!("tokenizer.json" in graph.manifest.files)) {
      throw new RotaryExportError("the bundle has no tokenizer.json: pass token ids");
    }
    const [tokenizer, config] = await Promise.all(
      ["tokenizer.json", "tokenizer_config.json"].map((name) => graph.readJson(name)),
    );
    const { Tokenizer } = await import("@huggingface/tokenizers").catch(() => {
      throw new RotaryExportError(
        "@huggingface/tokenizers is not installed: npm ci --ignore-scripts",
      );
    });
    return new Text(new Tokenizer(tokenizer, config));
  }

  encode(text) {
    return this.tokenizer.encode(text).ids;
  }

  decode(ids) {
    return this.tokenizer.decode(ids, { skip_special_tokens: true });
  }

  /** Return a function that takes one token after another and returns what each adds to the text. */
  startStream() {
    const ids = [];
    let shown = "";
    return (token) => {
      ids.push(token);
      const text = this.decode(ids);
      if (text.endsWith(UNFINISHED)) return "";
      const added = text.slice(shown.length);
      shown = text;
      return added;
    };
  }
}
