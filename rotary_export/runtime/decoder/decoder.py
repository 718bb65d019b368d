"""`Decoder`: from prompts to generated tokens, by the graphs of a bundle."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from rotary_export.bundle.dims import PAST, SEQ
from rotary_export.errors import RotaryExportError
from rotary_export.runtime.decoder.graph import DecoderGraph, find_room
from rotary_export.runtime.decoder.prompts import (
    Prompts,
    align_left,
    check_ids,
    read_prompts,
    read_row,
)
from rotary_export.runtime.decoder.sampling import choose_tokens
from rotary_export.runtime.decoder.settings import Settings, make_settings, read_ends
from rotary_export.runtime.ort import OrtSession
from rotary_export.types import Array

CHUNK = 512
START = "decoder_start_token_id"


class Decoder:
    """Generates tokens; made by `load_decoder`.

    It holds one batch of rows and their keys and values: `prefill` begins a new one. It is for one
    thread.

    Attributes:
        session: Of the graph: `session.kernel_path` names what computes its rotary nodes.
        encoder: Of the encoder's graph, of an encoder-decoder: `encode` runs it; else None.
        max_positions: How many tokens a row may have; None: any number.
        eos_token_ids: Tokens that end a row, by the bundle's `generation_config.json`.
    """

    def __init__(
        self,
        session: OrtSession,
        config: Mapping[str, Any],
        generation: Mapping[str, Any],
        embed: OrtSession | None = None,
        encoder: OrtSession | None = None,
    ) -> None:
        facts = config.get("decoder", {})
        self.session, self.encoder = session, encoder
        self.max_positions, self._holder = find_room(config)
        self._slots: int | None = facts.get("max_cache_len")
        self._graph = DecoderGraph(session, self._slots, embed)
        self._generation = generation
        self.eos_token_ids = read_ends(generation)
        self._resets: list[int] = facts.get("length_thresholds", [])
        self._lengths: list[int] = config.get("length_thresholds", [])
        self._ids = self._mask = np.empty((0, 0), np.int64)  # (B, at least width)
        self._width = 0  # how many of their columns are in the cache; 0: there is no batch
        self._prompt_len = 0
        self._batch = object()
        self._counts = np.empty(0, np.int64)  # (B,), tokens of each row, without padding

    def encode(self, **inputs: Any) -> Array:
        """Run the encoder of an encoder-decoder: what follows attends to its rows.

        Args:
            **inputs: Of the encoder's graph, numpy arrays, one row for each text.

        Returns:
            (B, 1) int64: the token that each text starts with, to be passed as `input_ids`.

        Raises:
            RotaryExportError: There is no encoder, an input is wrong, or the bundle's config names
                no first token.
        """
        if self.encoder is None:
            raise RotaryExportError("encode is for an encoder-decoder, the model has no encoder")
        start = self._generation.get(START)
        if type(start) is not int:
            raise RotaryExportError(f"the bundle's config must have {START}, got {start!r}")
        self._width, self._batch = 0, object()  # no batch attends to other rows than it had
        return np.full((self._graph.set_encoded(self.encoder(**inputs)), 1), start)

    def generate(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        *,
        max_new_tokens: int,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        do_sample: bool = False,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
    ) -> Array:
        """Generate tokens after each prompt, as transformers' `generate` does.

        What is None is read from the bundle's `generation_config.json`, else it is transformers'
        default: temperature 1.0, top_k 50, top_p 1.0.

        Args:
            input_ids: (B, S) of integers, padded at the left; or a list of ids for each row.
            attention_mask: (B, S), 1: a token, 0: padding; None: as transformers, all but
                `pad_token_id`, if that ends no row.
            max_new_tokens: How many tokens to generate at most.
            eos_token_id: Ends a row; a list: each of them does; an empty one: none.
            pad_token_id: Fills a row that has ended.
            do_sample: Draw tokens instead of the best one.
            temperature: Logits are divided by it.
            top_k: Draw from the k best tokens; 0: from all.
            top_p: Draw from the best tokens whose probabilities add up to it.
            seed: Of the draws; None: another one each time.

        Returns:
            (B, S + new) int64, the prompts included.

        Raises:
            RotaryExportError: An argument or a prompt is wrong, or too long for the model; nothing
                has run.
        """
        new = self.stream(
            input_ids,
            attention_mask,
            max_new_tokens=max_new_tokens,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
            do_sample=do_sample,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
        )
        tokens = np.stack([*new], axis=1)
        return np.concatenate([self._ids[:, : self._prompt_len], tokens], axis=1)

    def stream(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        *,
        max_new_tokens: int,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        do_sample: bool = False,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
    ) -> Iterator[Array]:
        """Generate as `generate`, and return an iterator over the new tokens, (B,) int64 each.

        Arguments are checked at once; the model runs as the iterator is read.
        """
        settings = make_settings(
            self._generation,
            max_new_tokens,
            eos_token_id,
            pad_token_id,
            do_sample,
            temperature,
            top_k,
            top_p,
            seed,
        )
        return self._iterate(self._read(input_ids, attention_mask, settings), settings)

    def prefill(self, input_ids: Any, attention_mask: Any = None, chunk: int = CHUNK) -> Array:
        """Begin a new batch: fill the cache with prompts.

        Args:
            input_ids: As `generate`.
            attention_mask: As `generate`; None: all are tokens.
            chunk: How many tokens a run has at most. Past a length at which the model's angles
                change, the first run is longer: all tokens must have the same angles.

        Returns:
            (B, V), the logits of the last position.

        Raises:
            RotaryExportError: An argument is wrong, or a prompt too long for the model.
        """
        prompts = read_prompts(input_ids, attention_mask, self._graph.num_tokens)
        if type(chunk) is not int or chunk < 1:
            raise RotaryExportError(f"chunk must be an int >= 1, got {chunk!r}")
        self._check_fits(prompts, 1)
        self._start(prompts, 1)
        return self._fill(self._prompt_len, chunk).copy()

    def step(self, tokens: Any) -> Array:
        """Append a token to each row.

        Args:
            tokens: (B,) of integers.

        Returns:
            (B, V), the logits of the next one.

        Raises:
            RotaryExportError: There is no batch, a token is unknown, or a row is full.
        """
        if not self._width:
            raise RotaryExportError("step must follow prefill, which begins a batch")
        row = read_row("tokens", tokens, len(self._counts))
        check_ids(row, self._graph.num_tokens)
        count = int(self._counts.max())
        if self.max_positions is not None and count >= self.max_positions:
            raise RotaryExportError(
                f"rows must have <= {self.max_positions} tokens, the {self._holder}'s positions, "
                f"and one has {count}"
            )
        return self._append(row).copy()

    def reorder(self, order: Any) -> None:
        """Replace row i by row order[i], as beams are; `order` may be longer or shorter than B.

        Args:
            order: (new B,) of integers in [0, B).

        Raises:
            RotaryExportError: There is no batch, or no such row.
        """
        if not self._width:
            raise RotaryExportError("reorder must follow prefill, which begins a batch")
        rows, size = read_row("order", order), len(self._counts)
        bad = rows[(rows < 0) | (rows >= size)]
        if len(bad) or not len(rows):
            got = bad[0] if len(bad) else "none"
            raise RotaryExportError(f"order must have rows >= 0 and < {size}, got {got}")
        self._graph.reorder(rows, size, self._width)
        self._ids, self._mask = self._ids[rows], self._mask[rows]
        self._counts = self._counts[rows]

    def _read(self, input_ids: Any, attention_mask: Any, settings: Settings) -> Prompts:
        """Read prompts and check that they and what is generated fit the model."""
        pad, count = settings.pad_token_id, self._graph.num_tokens
        is_padding = pad is not None and pad not in settings.eos_token_ids
        prompts = read_prompts(input_ids, attention_mask, count, pad or 0, is_padding)
        if pad is not None and len(prompts.ids) > 1 and not 0 <= pad < count:
            raise RotaryExportError(f"pad_token_id must be >= 0 and < {count}, got {pad}")
        self._check_fits(prompts, settings.max_new_tokens)
        return prompts

    def _check_fits(self, prompts: Prompts, new: int) -> None:
        """Refuse what does not fit the model; the last new token is never read."""
        self._graph.check_encoded(len(prompts.ids))
        if not self._graph.has_mask and not prompts.mask.all():
            raise RotaryExportError(
                "rows must be of the same length, without padding: the graph has no attention_mask"
            )
        for dim, largest in self.session.graph.max_size.items():
            used = {SEQ: 1, PAST: prompts.ids.shape[1] + new - 2}.get(dim, 0)
            if used > largest:
                raise RotaryExportError(f"{dim} must be <= {largest}, {used} would be needed")
        most, longest = self.max_positions, prompts.longest
        if most is None:
            return
        if longest > most:
            raise RotaryExportError(
                f"prompts must have <= {most} tokens, the {self._holder}'s positions, got {longest}"
            )
        if longest + new - 1 > most:
            raise RotaryExportError(
                f"max_new_tokens must be <= {most - longest + 1} after a prompt of {longest} "
                f"tokens, the {self._holder} has {most} positions, got {new}"
            )

    def _iterate(self, prompts: Prompts, settings: Settings) -> Iterator[Array]:
        """Generate until every row has ended."""
        generator = np.random.default_rng(settings.seed)
        ends = np.array(settings.eos_token_ids, np.int64)
        batch = self._start(prompts, settings.max_new_tokens)
        logits = self._fill(self._prompt_len)
        is_open = np.ones(len(prompts.ids), bool)
        for left in reversed(range(settings.max_new_tokens)):
            tokens = choose_tokens(logits, self._ids[:, : self._width], settings, generator)
            if len(ends):
                tokens = np.where(is_open, tokens, settings.pad_token_id or 0)
                is_open &= ~np.isin(tokens, ends)
            yield tokens.copy()
            if not left or not is_open.any():
                return
            if self._batch is not batch:
                raise RotaryExportError("the decoder has begun another batch: read a stream first")
            logits = self._append(tokens)

    def _start(self, prompts: Prompts, new: int) -> object:
        """Begin a batch of prompts that are not in the cache yet, with room for new tokens.

        Returns:
            What tells the batch from others.
        """
        batch_size, seq_len = prompts.ids.shape
        room = seq_len + new
        self._ids, self._mask = (np.ones((batch_size, room), np.int64) for _ in range(2))
        self._ids[:, :seq_len], self._mask[:, :seq_len] = prompts.ids, prompts.mask
        self._counts = prompts.mask.sum(axis=1)
        self._width, self._prompt_len = 0, seq_len
        self._graph.begin(batch_size, room)
        self._batch = object()
        return self._batch

    def _fill(self, total: int, chunk: int = CHUNK) -> Array:
        """Compute the cache of the first columns of the batch; return the last logits."""
        self._width = 0
        if self._slots is not None:
            return self._fill_slots(total, chunk)
        positions = self._mask[:, :total].cumsum(axis=1) - 1
        positions[self._mask[:, :total] == 0] = 0
        for past, end in self._split(positions, chunk):
            logits = self._graph.run(
                self._ids[:, past:end], positions[:, past:end], self._mask[:, :end], past
            )
        self._width = total
        return logits

    def _fill_slots(self, total: int, chunk: int) -> Array:
        """As `_fill`, of a static cache, whose rows begin in slot 0 and are padded at the right."""
        ids, counts = align_left(self._ids[:, :total], self._mask[:, :total])
        assert self._slots is not None
        slots, size = np.arange(self._slots), int(counts.max())
        positions = np.broadcast_to(slots[:size], (len(ids), size))
        for past, end in self._split(positions, chunk):
            mask = slots < np.minimum(counts, end)[:, None]
            logits = self._graph.run(ids[:, past:end], positions[:, past:end], mask, past)
        if counts.min() < size:  # the last column has padding: each row's last token once more
            last = counts[:, None] - 1
            tokens = np.take_along_axis(ids, last, axis=1)
            logits = self._graph.run(tokens, last, slots < counts[:, None], size)
        self._width = total
        return logits

    def _split(self, positions: Array, chunk: int) -> Iterator[tuple[int, int]]:
        """Return where each run of a prompt begins and ends."""
        size, first = positions.shape[1], self._find_first_chunk(positions, chunk)
        return pairwise([0, *range(first, size, chunk), size])

    def _find_first_chunk(self, positions: Array, chunk: int) -> int:
        """Return how many columns run at first, so that all have the angles of the whole prompt."""
        longest = int(positions.max()) + 1
        passed = [length for length in self._lengths if length < longest]
        if any(length not in self._resets for length in passed):
            return int(positions.shape[1])  # the angles depend on the length itself
        columns = [int((positions >= length).any(axis=0).argmax()) + 1 for length in passed]
        return max(chunk, *columns) if columns else chunk

    def _append(self, tokens: Array) -> Array:
        """Add a column and run it; past some lengths, as transformers, all columns anew."""
        past, self._width = self._width, 0  # a run that fails leaves no batch
        if past == self._ids.shape[1]:
            self._ids, self._mask = (
                np.pad(array, ((0, 0), (0, past)), constant_values=1)
                for array in (self._ids, self._mask)
            )
        self._ids[:, past] = tokens
        self._counts += 1
        if past in self._resets:
            return self._fill(past + 1)
        counts = self._counts[:, None]
        mask = self._mask[:, : past + 1]
        if self._slots is not None:
            mask = (np.arange(self._slots) < counts).astype(np.int64)
        logits = self._graph.run(tokens[:, None], counts - 1, mask, past)
        self._width = past + 1
        return logits
