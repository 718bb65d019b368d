"""`rotary-export bench --past`: how long a decoder reads a prompt and generates the next token."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rotary_export.errors import RotaryExportError
from rotary_export.measure.machine import describe_machine
from rotary_export.measure.timing import MIN_ROUNDS, Spread
from rotary_export.runtime.decoder.decoder import Decoder
from rotary_export.runtime.decoder.load_decoder import load_decoder
from rotary_export.runtime.providers import CPU
from rotary_export.runtime.ways import FUNCTION_BODY, OP_LIBRARY
from rotary_export.types import Progress, ignore_progress

MAX_STEPS = 64  # after a prompt: what is measured is its length, not one that has grown


@dataclass(frozen=True)
class DecodingTimes:
    """One runtime after one prompt.

    Attributes:
        past: Tokens of the prompt.
        run: Name of the `Way`.
        kernel_path: As `Session.kernel_path`.
        prefill: Seconds to read the prompt; None: there is none.
        decode: Seconds of one token.
    """

    past: int
    run: str
    kernel_path: str
    prefill: Spread | None
    decode: Spread

    def to_dict(self) -> dict[str, Any]:
        """Return the row as values that JSON can express."""
        return {
            "past": self.past,
            "run": self.run,
            "kernel_path": self.kernel_path,
            "prefill_seconds": self.prefill and self.prefill.to_dict(),
            "decode_seconds": self.decode.to_dict(),
        }


@dataclass(frozen=True)
class DecodingReport:
    """What `bench_decoder` found.

    Attributes:
        bundle: Its name.
        machine: As `describe_machine`.
        rows: One per prompt and run.
        skipped: Ways that are not available, and why.
    """

    bundle: str
    machine: dict[str, object]
    rows: list[DecodingTimes]
    skipped: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Return the report as values that JSON can express."""
        rows = [row.to_dict() for row in self.rows]
        return {**vars(self), "rows": rows}

    def tabulate(self) -> tuple[list[str], list[list[object]]]:
        """Return headers and human-readable cells, in milliseconds."""
        headers = ["past", "run", "kernel", "prefill ms", "prefill tokens/s"]
        cells: list[list[object]] = []
        for row in self.rows:
            prefill = row.prefill.median if row.prefill else 0.0
            speed = f"{row.past / prefill:.0f}" if prefill else "-"
            spread = [f"{1e3 * value:.2f}" for value in row.decode.to_dict().values()]
            read = f"{1e3 * prefill:.1f}" if prefill else "-"
            names = [row.past, row.run, row.kernel_path, read, speed]
            cells.append([*names, *spread, f"{1 / row.decode.median:.1f}"])
        spreads = [f"decode {name} ms" for name in ("min", "median", "max")]
        return [*headers, *spreads, "decode tokens/s"], cells


def bench_decoder(
    path: Path, pasts: Sequence[int], seconds: float, progress: Progress = ignore_progress
) -> DecodingReport:
    """Time a decoder on the CPU, with the op library and without it.

    Args:
        path: The bundle's folder.
        pasts: Tokens of the prompts; 0: the first token alone.
        seconds: About how long to measure one prompt.
        progress: Called with what is being done.

    Raises:
        RotaryExportError: The bundle is not a decoder, or a prompt is too long for it.
    """
    decoders: dict[str, Decoder] = {}
    skipped: dict[str, str] = {}
    for way in (FUNCTION_BODY, OP_LIBRARY):
        if refusal := way.find_refusal():
            skipped[way.name] = refusal
            continue
        progress(f"load {way.name}")
        decoders[way.name] = load_decoder(path, providers=[CPU], use_op_library=way.use_op_library)
    if not decoders:
        raise RotaryExportError(f"nothing here can run {path}: {'; '.join(skipped.values())}")
    rows = []
    for past in pasts:
        for decoder in decoders.values():
            _check_room(decoder, past)
        progress(f"time past={past}")
        rows += _time(decoders, past, seconds)
    return DecodingReport(path.name, describe_machine(), rows, skipped)


def _check_room(decoder: Decoder, past: int) -> None:
    most = decoder.max_positions
    if most is not None and past + MIN_ROUNDS > most:
        raise RotaryExportError(
            f"past must be <= {most - MIN_ROUNDS}, as the model has {most} positions, got {past}"
        )


def _time(decoders: dict[str, Decoder], past: int, seconds: float) -> list[DecodingTimes]:
    """Time in turns, so that a slow moment hits all of them."""
    prompt = [[3 + index % 7 for index in range(max(past, 1))]]
    prefills: dict[str, list[float]] = {name: [] for name in decoders}
    decodes: dict[str, list[float]] = {name: [] for name in decoders}
    for name, decoder in decoders.items():  # the last one leaves the batch of the steps below
        repeats = 2 if past else 1
        for _ in range(repeats):
            prefills[name].append(_measure(lambda d=decoder: d.prefill(prompt)))
        decoder.step([3])
    most = min(d.max_positions or MAX_STEPS + past + 2 for d in decoders.values())
    end = time.perf_counter() + seconds
    for done in range(min(MAX_STEPS, most - len(prompt[0]) - 1)):
        if done >= MIN_ROUNDS and time.perf_counter() > end:
            break
        for name, decoder in decoders.items():
            decodes[name].append(_measure(lambda d=decoder: d.step([3])))
    return [
        DecodingTimes(
            past,
            name,
            decoder.session.kernel_path,
            Spread(tuple(prefills[name][-1:])) if past else None,
            Spread(tuple(decodes[name])),
        )
        for name, decoder in decoders.items()
    ]


def _measure(call: Any) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
