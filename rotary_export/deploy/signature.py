"""`signature.txt` and `decoder.txt`: facts of a graph, for programs without a JSON parser."""

from __future__ import annotations

from pathlib import Path

from rotary_export.bundle.dims import PAST
from rotary_export.bundle.json_file import read_json_object
from rotary_export.bundle.manifest import GraphInfo, Manifest
from rotary_export.errors import RotaryExportError
from rotary_export.runtime.decoder.decoder import CHUNK
from rotary_export.runtime.decoder.graph import (
    MASK,
    POSITIONS,
    check_growth,
    count_tokens,
    find_logits,
    find_room,
    find_tokens,
)
from rotary_export.runtime.decoder.settings import FILE, make_settings

DECODER = "decoder.txt"


def write_signature(staging: Path, manifest: Manifest, graph: str) -> None:
    """Write a line for each input and output, and limit.

    `input NAME DTYPE DIM... [in LOW HIGH]`, `output NAME`, and `max_size DIM SIZE`, `min_size DIM
    SIZE` for axes of limited size. A sum or a multiple of sizes is written without spaces. HIGH is
    the largest legal value.

    Args:
        staging: The folder to write it in.
        manifest: Of the bundle.
        graph: Which graph.
    """
    info = manifest.graphs[graph]
    lines = []
    for tensor in info.inputs:
        words = ["input", tensor.name, tensor.dtype]
        words += [str(dim).replace(" ", "") for dim in tensor.shape]
        if tensor.limits is not None:
            words += ["in", *map(str, tensor.limits)]
        lines.append(" ".join(words))
    lines += [f"output {tensor.name}" for tensor in info.outputs]
    lines += [f"max_size {dim} {size}" for dim, size in info.max_size.items()]
    lines += [f"min_size {dim} {size}" for dim, size in info.min_size.items()]
    (staging / "signature.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_decoder(staging, manifest, graph)


def write_decoder(staging: Path, manifest: Manifest, graph: str) -> None:
    """Write what a loop over a graph with a key/value cache must know; other graphs have no file.

    A line is a name and its values, as `Decoder` of the package reads them from the manifest and
    from generation_config.json. A graph that the loop can't run has one line, `refused WHY`.

    Args:
        staging: The folder to write it in, with the bundle in `bundle/`.
        manifest: Of the bundle.
        graph: Which graph.
    """
    if "decoder" not in manifest.config:
        return
    try:
        lines = _describe_decoder(staging / "bundle", manifest, manifest.graphs[graph])
    except RotaryExportError as error:
        lines = [f"refused {error}"]
    (staging / DECODER).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _describe_decoder(bundle: Path, manifest: Manifest, info: GraphInfo) -> list[str]:
    """Return the lines of decoder.txt.

    Raises:
        RotaryExportError: As `load_decoder`; or a mask or positions are not int64.
    """
    if len(manifest.graphs) > 1:
        raise RotaryExportError(
            f"the kit's loop runs a bundle of one graph, got {', '.join(manifest.graphs)}"
        )
    tokens, logits = find_tokens(info), find_logits(info)
    check_growth(info)
    for tensor in info.inputs:
        is_plain = tensor.dtype == "int64" and len(tensor.shape) == 2
        if tensor.name in (MASK, POSITIONS) and not is_plain:
            raise RotaryExportError(
                f"{tensor.name} must be int64 of 2 dimensions for the kit's loop, got "
                f"{tensor.dtype} {tensor.shape}"
            )
    # A model's own config names its last token, where there is no generation config.
    given = [name for name in (FILE, "config.json") if name in manifest.files]
    generation = read_json_object(bundle / given[0]) if given else {}
    settings = make_settings(generation, 1, None, None, False, None, None, None, None)
    facts, (most, holder) = manifest.config["decoder"], find_room(manifest.config)
    entries = {
        "tokens": [tokens.name],
        "num_tokens": [count_tokens(tokens, logits)],
        "logits": [logits.name],
        "logits_dtype": [logits.dtype],
        "last_logits": [int(facts["logits"] == "last")],
        "vocab_size": [logits.shape[2]],
        "chunk": [CHUNK],
        "max_cache_len": [facts["max_cache_len"] or 0],
        "max_positions": [-1 if most is None else most],
        "max_past_len": [info.max_size.get(PAST, -1)],
        "holder": [holder],
        "eos_token_ids": settings.eos_token_ids,
        "suppress_tokens": settings.suppress_tokens,
        "repetition_penalty": [settings.repetition_penalty],
        "cache_resets": facts["length_thresholds"],
        "length_thresholds": manifest.config.get("length_thresholds", []),
    }
    return [" ".join(map(str, (name, *values))) for name, values in entries.items()]
