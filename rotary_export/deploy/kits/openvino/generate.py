"""Generate token ids with this folder's decoder, greedily.

python generate.py MAX_NEW_TOKENS IDS...    as: python generate.py 32 5,6,7 8,9

It prints each prompt's ids and its new ones, then what OpenVINO fused and the speed on stderr.
"""

import re
import sys
import time

import numpy as np
from arrays import HERE
from run import Model

PAST = "past_key_values"
LISTS = ("eos_token_ids", "suppress_tokens", "cache_resets", "length_thresholds")
TEXTS = ("tokens", "logits", "logits_dtype", "holder")


class Decoder:
    """A model exported with its cache; one row at a time."""

    def __init__(self, facts):
        """Compile the graph."""
        self.facts = facts
        self.model = Model()
        self.caches = {i["name"]: i for i in self.model.inputs if i["name"].startswith(PAST)}
        self.arrays = {}  # the inputs of the next run

    def generate(self, prompt, max_new_tokens):
        """Return a prompt and its new tokens, as transformers' greedy `generate`."""
        row, end = [*prompt], len(prompt) + max_new_tokens
        scores = self.fill(row)
        while True:
            row.append(self.choose(scores, row))
            if len(row) == end or row[-1] in self.facts["eos_token_ids"]:
                return row
            past = len(row) - 1
            # transformers computes its cache anew past these lengths.
            is_reset = past in self.facts["cache_resets"]
            scores = self.fill(row) if is_reset else self.run(row[past:], past)

    def fill(self, row):
        """Compute the cache of a row anew; return the scores after it."""
        slots = self.facts["max_cache_len"]
        for name, info in self.caches.items():
            heads, size = info["shape"][1], info["shape"][3]
            self.arrays[name] = np.zeros((1, heads, slots, size), info["dtype"])
        # Past a threshold all tokens need the angles of the whole length.
        is_whole = any(length < len(row) for length in self.facts["length_thresholds"])
        chunk = len(row) if is_whole else self.facts["chunk"]
        for past in range(0, len(row), chunk):
            scores = self.run(row[past : past + chunk], past)
        return scores

    def run(self, ids, past):
        """Run tokens after so many; return the scores after the last, (vocab_size,)."""
        total, slots = past + len(ids), self.facts["max_cache_len"]
        self.arrays[self.facts["tokens"]] = np.array([ids])
        self.arrays["position_ids"] = np.arange(past, total)[None]
        self.arrays["attention_mask"] = (np.arange(slots or total) < total).astype(np.int64)[None]
        results = self.model({i["name"]: self.arrays[i["name"]] for i in self.model.inputs})
        for name in self.caches:
            self.arrays[name] = results[name.replace(PAST, "present")]
        return results[self.facts["logits"]][0, -1].astype(np.float32)

    def choose(self, scores, row):
        """Return the best token, as the model's generation config has it."""
        penalty = np.float32(self.facts["repetition_penalty"])
        seen = scores[row]
        scores[row] = np.where(seen < 0, seen * penalty, seen / penalty)
        scores[[i for i in self.facts["suppress_tokens"] if i < len(scores)]] = -np.inf
        return int(scores.argmax())

    def describe(self):
        """Return the version, and what OpenVINO fused to operations of its own."""
        attentions = 0
        for node in self.model.compiled.get_runtime_model().get_ordered_ops():
            names = node.get_rt_info()["originalLayersNames"].value
            attentions += "Softmax" in names and "ScaledDotProductAttention" in names
        return f"{self.model.describe()}, {attentions} are a whole attention"


def read_facts():
    """Return the lines of decoder.txt by name: a list, a text or a number each."""
    file, facts = HERE / "decoder.txt", {}
    if not file.is_file():
        sys.exit(f"{file} can't be read: deploy writes it for a model exported with its cache")
    for line in file.read_text(encoding="utf-8").splitlines():
        name, *values = line.split()
        if name == "refused":
            sys.exit(line.removeprefix("refused "))
        if name not in TEXTS:
            values = [
                int(value) if value.lstrip("-").isdigit() else float(value) for value in values
            ]
        facts[name] = values if name in LISTS else values[0]
    return facts


def check(facts, row, prompt, max_new_tokens):
    """Stop at what does not fit the model."""
    if max_new_tokens < 1:
        sys.exit(f"max_new_tokens must be >= 1, got {max_new_tokens}")
    known, most = facts["num_tokens"], facts["max_positions"]
    largest, holder = facts["max_past_len"], facts["holder"]
    for column, token in enumerate(prompt):
        if token >= known:
            sys.exit(
                f"token ids must be >= 0 and < {known}, got {token} in row {row}, column {column}"
            )
    past = len(prompt) + max_new_tokens - 2
    if 0 <= largest < past:
        sys.exit(f"past_seq_len must be <= {largest}, {past} would be needed")
    if 0 <= most < len(prompt):
        sys.exit(f"prompts must have <= {most} tokens, the {holder}'s positions, got {len(prompt)}")
    if 0 <= most < len(prompt) + max_new_tokens - 1:
        sys.exit(
            f"max_new_tokens must be <= {most - len(prompt) + 1} after a prompt of "
            f"{len(prompt)} tokens, the {holder} has {most} positions, got {max_new_tokens}"
        )


def read_integers(text):
    """Read integers that are not negative, with commas between them."""
    for part in text.split(","):
        if not re.fullmatch("[0-9]{1,18}", part):
            sys.exit(f"{part!r} is not an integer >= 0")
    return [int(part) for part in text.split(",")]


def main():
    """Read the command line, and generate."""
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    (count,), *prompts = map(read_integers, sys.argv[1:])
    facts = read_facts()
    for row, prompt in enumerate(prompts):
        check(facts, row, prompt, count)
    decoder = Decoder(facts)
    print(decoder.describe(), file=sys.stderr)
    start, new = time.perf_counter(), 0
    for prompt in prompts:
        ids = decoder.generate(prompt, count)
        new += len(ids) - len(prompt)
        print(",".join(map(str, ids)), flush=True)
    seconds = time.perf_counter() - start
    print(f"{new} tokens in {seconds:.4g} s: {new / seconds:.4g} tokens/s", file=sys.stderr)


if __name__ == "__main__":
    main()
