"""The proof of a decoder: greedy tokens against the model's own `generate`, in four ways."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from rotary_export.bundle.dims import BATCH
from rotary_export.bundle.manifest import DECODER, EMBED, ENCODER, MODEL, Manifest
from rotary_export.errors import RotaryExportError
from rotary_export.models.configs import get_field
from rotary_export.models.decoder.cache import is_of_transformers
from rotary_export.models.decoder.encoder import make_first_tokens
from rotary_export.models.error_text import describe_error
from rotary_export.models.trace.snapshot import Snapshot
from rotary_export.proof.generated import Difference, Generated
from rotary_export.proof.models.cases import MASKS, Case, CaseSpec, make_case
from rotary_export.proof.models.compare import read_sources
from rotary_export.proof.models.noise import NoiseMeter
from rotary_export.runtime.decoder.decoder import START, Decoder
from rotary_export.runtime.load import open_session
from rotary_export.runtime.ort import OrtSession
from rotary_export.types import Array, Progress

NEW_TOKENS, QUICK_TOKENS = 32, 8
_LENGTHS = (11, 5, 8, 3)  # of prompts that are made
_ENCODED = 3  # rows that an encoder reads
_CHUNK = 3
_NOISE_RUNS = 8
NOT_COMPARED = "tokens against the model's own generate"


@dataclass(frozen=True)
class _Wanted:
    """What `model.generate` returns.

    Attributes:
        ids: (B, S), padded at the left; of an encoder-decoder (B, 1).
        mask: (B, S), 1: a token, 0: padding.
        encoded: What the encoder read, by name; {}: there is no encoder.
        tokens: (B, T).
        logits: (B, T, V), from which the tokens were chosen.
    """

    ids: Array
    mask: Array
    encoded: Mapping[str, Tensor]
    tokens: Array
    logits: Tensor


def compare_generated(
    model: nn.Module,
    folder: Path,
    manifest: Manifest,
    prompts: Sequence[Sequence[int]] | None,
    snapshot: Snapshot,
    quick: bool,
    seed: int,
    progress: Progress,
) -> tuple[list[Generated], dict[str, str]]:
    """Generate with a bundle's ONNX graph and with its model, and compare token by token.

    - One prompt, and all of them padded at the left, by `Decoder.generate`. What follows a token
      that differs is not compared.
    - All of them in chunks, and with rows that change places midway. Each step is fed the model's
      own token, so that every one is compared.
    - Of an encoder-decoder, rows begin with its first token, and its encoder reads inputs of
      unequal lengths, if it has a mask. There are no chunks.

    Args:
        model: What was exported.
        folder: The bundle's.
        manifest: Of the bundle.
        prompts: Token ids; None: random ones.
        snapshot: Of the model, restored after each run.
        quick: Fewer tokens.
        seed: Of prompts that are made.
        progress: Called with the current step.

    Returns:
        What was found, and what was left out, with the reason.
    """
    facts, has_encoder = manifest.config.get("decoder"), ENCODER in manifest.graphs
    name = DECODER if has_encoder else MODEL
    if facts is None or "onnx" not in manifest.graphs[name].files:
        return [], {}
    if not is_of_transformers(model) or not hasattr(model, "generate"):
        return [], {NOT_COMPARED: f"{type(model).__name__} has no generate of transformers"}
    if manifest.config.get("float32_tables"):
        return [], {NOT_COMPARED: "the graph's tables are float32, the model's own are not"}
    progress(f"generate: {name}")
    start = int(make_first_tokens(model, 1)) if has_encoder else None
    try:
        decoder = _open_decoder(folder, manifest, name, start)
    except RotaryExportError as error:  # as ONNX Runtime's CPU for bfloat16
        return [], {NOT_COMPARED: str(error)}
    count = QUICK_TOKENS if quick else NEW_TOKENS
    encoded = make_encoded(manifest, seed) if has_encoder else {}
    rows = [[start]] * _ENCODED if start is not None else prompts or _make_prompts(manifest, seed)
    most = decoder.max_positions
    if most is not None:
        count = min(count, most - max(map(len, rows)))
    if count < 1:
        return [], {NOT_COMPARED: f"there are {most} positions alone"}
    first = {key: value[:1] for key, value in encoded.items()}
    try:
        one = _run_eager(model, rows[:1], first, count, snapshot)
        all_rows = _run_eager(model, rows, encoded, count, snapshot)
    except Exception as error:  # whatever the model's own generate raises
        return [], {NOT_COMPARED: f"the model's own generate fails: {describe_error(error)}"}
    batch = f"batch {len(rows)}" + ("" if has_encoder else ", padded at the left")
    ways: list[tuple[str, _Wanted, Callable[[Decoder, _Wanted], Array]]] = [
        ("batch 1", one, _generate),
        (batch, all_rows, _generate),
        (f"{batch}, in chunks of {_CHUNK}", all_rows, _step),
        (f"{batch}, rows reordered midway", all_rows, _step_reordered),
    ]
    if has_encoder:
        del ways[2]  # a prompt is one token
    found = []
    for way, wanted, run in ways:
        progress(f"generate: {name}: {way}")
        if has_encoder:
            decoder.encode(**{key: value.numpy() for key, value in wanted.encoded.items()})
        got = run(decoder, wanted)
        found.append(_compare(way, got, wanted, model, snapshot, is_free=run is _generate))
        if not found[-1].passed:
            break
    return found, {}


def _open_decoder(folder: Path, manifest: Manifest, name: str, start: int | None) -> Decoder:
    sessions = {
        graph: cast(OrtSession, open_session(folder, manifest, graph, "onnxruntime"))
        for graph in (name, EMBED, ENCODER)
        if graph in manifest.graphs
    }
    others = sessions.get(EMBED), sessions.get(ENCODER)
    return Decoder(sessions[name], manifest.config, {START: start}, *others)


def encode_prompts(
    prompts: Sequence[str | Sequence[int]] | None, folder: Path | None
) -> list[list[int]] | None:
    """Return prompts as token ids; None: there are none.

    Args:
        prompts: Texts, or token ids.
        folder: Of the model, with its tokenizer.

    Raises:
        RotaryExportError: There is no tokenizer for texts, or a prompt is empty.
    """
    if prompts is None:
        return None
    if isinstance(prompts, str) or not prompts:
        raise RotaryExportError(f"prompts must be a list of texts or of token ids, got {prompts!r}")
    encode: Callable[[str], list[int]] | None = None
    rows: list[list[int]] = []
    for each in prompts:
        if isinstance(each, str):
            encode = encode or _load_tokenizer(folder)
            rows.append(encode(each))
        else:
            rows.append([*each])
    for each, row in zip(prompts, rows, strict=True):
        if not row or not all(type(token) is int for token in row):
            raise RotaryExportError(f"a prompt must have at least one token, got {each!r}")
    return rows


def _load_tokenizer(folder: Path | None) -> Callable[[str], list[int]]:
    if folder is None:
        raise RotaryExportError("prompts of text need the tokenizer in the model's folder: none")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # whatever transformers raises
        raise RotaryExportError(
            f"prompts of text need the tokenizer in the model's folder: {describe_error(error)}"
        ) from error
    return lambda text: [int(token) for token in tokenizer(text)["input_ids"]]


def make_encoded(manifest: Manifest, seed: int) -> dict[str, Tensor]:
    """Make inputs of an encoder: rows of unequal lengths, padded at the right, if it has a mask."""
    graph = manifest.select(ENCODER)
    sources, infos = read_sources(graph), graph.graphs[ENCODER].inputs
    sizes = {**graph.config["traced_sizes"], BATCH: _ENCODED}
    case = make_case(infos, sources, CaseSpec(sizes, seed=1000 + seed))
    made = {info.name: value for info, value in zip(infos, case.tensors, strict=True)}
    for name, source in sources.items():
        if source.role in MASKS and made[name].dim() == 2:
            lengths = made[name].shape[1] - made[name].shape[1] // 4 * torch.arange(_ENCODED)
            made[name] *= torch.arange(made[name].shape[1]) < lengths[:, None]
    return made


def _make_prompts(manifest: Manifest, seed: int) -> list[list[int]]:
    """Make prompts of different lengths, of random token ids."""
    name = EMBED if EMBED in manifest.graphs else MODEL
    ids = manifest.graphs[name].inputs[0]
    low, high = ids.limits or (0, 1)
    generator = np.random.default_rng(seed)
    return [generator.integers(low, high + 1, length).tolist() for length in _LENGTHS]


def _run_eager(
    model: Any,
    rows: Sequence[Sequence[int]],
    encoded: Mapping[str, Tensor],
    count: int,
    snapshot: Snapshot,
) -> _Wanted:
    """Generate with the model, greedily, `count` tokens whatever they are."""
    from transformers import GenerationConfig

    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    config = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=count,
        do_sample=False,
        num_beams=1,
        eos_token_id=None,  # a text that ends would prove less
        pad_token_id=0,
        decoder_start_token_id=rows[0][0] if encoded else None,
        output_logits=True,
        return_dict_in_generate=True,
    )
    inputs = encoded or {"input_ids": ids, "attention_mask": mask}
    own, model.generation_config = get_field(model, "generation_config"), config
    try:
        with torch.no_grad():
            made = model.generate(**inputs, generation_config=config)
    finally:
        model.generation_config = own
        snapshot.restore_state()
    tokens = made.sequences[:, longest:]
    logits = torch.stack(made.logits, dim=1)
    return _Wanted(ids.numpy(), mask.numpy(), encoded, tokens.numpy(), logits)


def _generate(decoder: Decoder, wanted: _Wanted) -> Array:
    count, width = wanted.tokens.shape[1], wanted.ids.shape[1]
    made = decoder.generate(wanted.ids, wanted.mask, max_new_tokens=count, eos_token_id=[])
    return made[:, width:]


def _step(decoder: Decoder, wanted: _Wanted) -> Array:
    logits = decoder.prefill(wanted.ids, wanted.mask, chunk=_CHUNK)
    chosen = [logits.argmax(axis=-1)]
    for column in wanted.tokens.T[:-1]:
        chosen.append(decoder.step(column).argmax(axis=-1))
    return np.stack(chosen, axis=1)


def _step_reordered(decoder: Decoder, wanted: _Wanted) -> Array:
    """Step with each row in its neighbour's place from the middle on; return the rows in order."""
    size, middle = len(wanted.ids), wanted.tokens.shape[1] // 2
    order = np.roll(np.arange(size), 1)
    back = np.argsort(order)
    chosen = [decoder.prefill(wanted.ids, wanted.mask).argmax(axis=-1)]
    for index, column in enumerate(wanted.tokens.T[:-1]):
        if index == middle:
            decoder.reorder(order)
        if index < middle:
            chosen.append(decoder.step(column).argmax(axis=-1))
        else:
            chosen.append(decoder.step(column[order]).argmax(axis=-1)[back])
    return np.stack(chosen, axis=1)


def _compare(
    way: str,
    got: Array,
    wanted: _Wanted,
    model: nn.Module,
    snapshot: Snapshot,
    *,
    is_free: bool,
) -> Generated:
    """Compare tokens; of a free run, up to the first that differs in each row."""
    differing = got != wanted.tokens
    compared = np.ones_like(differing)
    if is_free:
        compared = differing.cumsum(axis=1) - differing == 0
    found = []
    for row, token in np.argwhere(differing & compared).tolist():
        logits = wanted.logits[row, token].double()
        mine, other = int(wanted.tokens[row, token]), int(got[row, token])
        noise = _measure_noise(model, wanted, row, token, snapshot)
        gap = float(logits[mine] - logits[other])
        found.append(Difference(row, token, mine, other, gap, noise))
        if not found[-1].is_tie:  # the proof has failed; each noise takes many runs
            break
    return Generated(way, int(compared.sum()), found)


def _measure_noise(model: Any, wanted: _Wanted, row: int, token: int, snapshot: Snapshot) -> float:
    """Return by how much rounding alone moves the model's logits of one token."""
    prompt = wanted.ids[row][wanted.mask[row] == 1]
    ids = np.concatenate([prompt, wanted.tokens[row, :token]])
    case = Case("one text", (torch.from_numpy(ids)[None],))
    encoded = {name: value[row : row + 1] for name, value in wanted.encoded.items()}
    key = "decoder_input_ids" if encoded else "input_ids"

    def run(tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        snapshot.restore_state()
        with torch.no_grad():
            outputs = model(**encoded, **{key: tensors[0]}, use_cache=False)
            return {"logits": outputs.logits[:, -1:]}

    eager = case.read_outputs(run(case.tensors))
    meter = NoiseMeter(model, run)
    both = [meter.measure(case, eager, _NOISE_RUNS, every_operator=each) for each in (False, True)]
    return max(noise["logits"] for noise in both)
