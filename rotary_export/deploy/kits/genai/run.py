"""Generate with this folder's model, greedily, with onnxruntime-genai.

python run.py "Once upon a time"            continue a text; several are one batch
python run.py --chat "What is a rotation?"  in the chat template of the model
python run.py --ids 5,7,11                  token ids instead of text

One line of JSON for each prompt: its ids, the new ones included, and the text of the new ones.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime_genai as og

HERE = Path(__file__).resolve().parent
OP_LIBRARY = "librotary_export.so"  # genai loads it from this folder only


class Model:
    """The model of this folder."""

    def __init__(self, op_library=False):
        """Open it; with `op_library`, rotations run in the kernel of OP_LIBRARY."""
        config = og.Config(str(HERE))
        if op_library:
            options = {"custom_ops_library": OP_LIBRARY}
            config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self.model = og.Model(config)
        self.tokenizer = og.Tokenizer(self.model)
        self.facts = json.loads((HERE / "genai_config.json").read_text(encoding="utf-8"))["model"]

    def generate(self, prompts, max_new_tokens):
        """Return the ids of each prompt and its new tokens, up to the end of the text."""
        pad = self.facts["pad_token_id"]
        if len(prompts) > 1 and any(pad in ids for ids in prompts):
            # In a batch, genai treats each such token as padding.
            return [self.generate([ids], max_new_tokens)[0] for ids in prompts]
        longest = max(map(len, prompts))
        params = og.GeneratorParams(self.model)
        length = longest + max_new_tokens
        params.set_search_options(batch_size=len(prompts), max_length=length, do_sample=False)
        generator = og.Generator(self.model, params)
        rows = [[*ids, *[pad] * (longest - len(ids))] for ids in prompts]  # on the right only
        generator.append_tokens(np.array(rows if len(rows) > 1 else rows[0], np.int32))
        new = [[] for _ in prompts]
        is_done = [False] * len(prompts)
        while not generator.is_done() and not all(is_done):
            generator.generate_next_token()
            for row, token in enumerate(generator.get_next_tokens()):
                if not is_done[row]:
                    new[row].append(int(token))
                    is_done[row] = int(token) in self.facts["eos_token_id"]
        return [[*ids, *more] for ids, more in zip(prompts, new, strict=True)]

    def encode(self, text, chat):
        """Return the token ids of a prompt."""
        if chat:
            messages = json.dumps([{"role": "user", "content": text}])
            text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        return [int(token) for token in self.tokenizer.encode(text)]

    def check(self, prompts, max_new_tokens):
        """Stop at what genai would fail at, or read wrongly."""
        tokens, length = self.facts["vocab_size"], self.facts["context_length"]
        if max_new_tokens < 1:
            sys.exit(f"--max-new-tokens must be >= 1, got {max_new_tokens}")
        for row, ids in enumerate(prompts):
            if not ids:
                sys.exit(f"prompt {row} must have at least one token, got none")
            bad = [token for token in ids if not 0 <= token < tokens]
            if bad:
                sys.exit(f"prompt {row} must have ids in [0, {tokens}), got {bad[0]}")
            if len(ids) + max_new_tokens > length:
                sys.exit(
                    f"prompt and new tokens must be at most {length}, got {len(ids)} + "
                    f"{max_new_tokens} of prompt {row}"
                )


def read_ids(text):
    """Read ids like 1,2,3."""
    return [int(token) for token in text.split(",")]


def main():
    """Read the command line, and generate."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("prompts", nargs="*", metavar="TEXT")
    parser.add_argument("--ids", action="append", type=read_ids, default=[])
    parser.add_argument("--chat", action="store_true", help="each text is a user's message")
    parser.add_argument("--max-new-tokens", type=int, default=32, metavar="N")
    parser.add_argument("--op-library", action="store_true", help=f"use {OP_LIBRARY}")
    given = parser.parse_args()
    if not (given.prompts or given.ids):
        parser.error("TEXT or --ids is needed")
    model = Model(given.op_library)
    prompts = [model.encode(text, given.chat) for text in given.prompts] + given.ids
    model.check(prompts, given.max_new_tokens)
    rows = model.generate(prompts, given.max_new_tokens)
    for prompt, ids in zip(prompts, rows, strict=True):
        text = model.tokenizer.decode(np.array(ids[len(prompt) :], np.int32))
        print(json.dumps({"ids": ids, "text": text}, ensure_ascii=False))


if __name__ == "__main__":
    main()
