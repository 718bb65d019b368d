"""How much of a decoder's step is Python: all but ONNX Runtime's own run.

    python tools/bench/measure_decoder_step.py BUNDLE

prints microseconds of a step of `Decoder.generate`, greedy, and of its parts.
"""

from __future__ import annotations

import argparse
import gc
import time
from pathlib import Path
from statistics import median

from rotary_export import load_decoder

WARMING = 8


def measure(bundle: Path, past: int, steps: int, batch_size: int) -> dict[str, float]:
    """Return the least and the median microseconds of Python, and the median of the run."""
    decoder = load_decoder(bundle)
    run_bound, inside = decoder.session.run_bound, []

    def run(binding: object) -> None:
        start = time.perf_counter()
        run_bound(binding)
        inside.append(time.perf_counter() - start)

    decoder.session.run_bound = run
    prompts = [[3] * past] * batch_size
    stream = decoder.stream(prompts, max_new_tokens=steps + WARMING, eos_token_id=[])
    for _ in range(WARMING):
        next(stream)
    inside.clear()
    gc.disable()
    own = []
    for _ in range(steps):
        start = time.perf_counter()
        next(stream)
        own.append(time.perf_counter() - start - inside[-1])
    gc.enable()
    found = {"Python, least": min(own), "Python, median": median(own), "run": median(inside)}
    return {name: 1e6 * seconds for name, seconds in found.items()}


def main() -> None:
    """Print the times of a bundle."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--past", type=int, default=64, help="tokens of the prompt")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=1)
    asked = parser.parse_args()
    found = measure(asked.bundle, asked.past, asked.steps, asked.batch_size)
    for name, microseconds in found.items():
        print(f"{name}: {microseconds:.0f} us")


if __name__ == "__main__":
    main()
