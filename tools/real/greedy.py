"""Greedy decoding of text by a bundle, compared token by token with `model.generate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rotary_export.bundle.dims import BATCH, PAST, is_past, name_output
from rotary_export.proof.models.cases import Case
from rotary_export.proof.models.noise import NoiseMeter
from rotary_export.runtime.session import Session, resolve_shape

# Of different lengths: all but the longest are padded at the left.
PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a small village by the sea, there lived an old fisherman who",
    "Water boils at a lower temperature on a high mountain because",
)
_PAST, _STEP = 8, 4  # tokens of the example with a cache


@dataclass(frozen=True)
class Generated:
    """What `model.generate` returns for the prompts.

    Attributes:
        prompts: (B, S) token ids, padded at the left.
        mask: (B, S), 1: a token, 0: padding.
        tokens: (B, T) token ids.
        logits: (B, T, V), from which `tokens` were chosen.
        keep: (B, T) bool: tokens up to the one that ends the text.
    """

    prompts: Tensor
    mask: Tensor
    tokens: Tensor
    logits: Tensor
    keep: Tensor


@dataclass(frozen=True)
class Difference:
    """A token for which a bundle chooses another one than eager, after the same tokens.

    Attributes:
        prompt: Index of the prompt.
        token: Index of the token, from the end of the prompt.
        gap: Eager's logit of its own token, less that of the bundle's.
        noise: By how much rounding alone moves eager's logits there.
    """

    prompt: int
    token: int
    gap: float
    noise: float

    @property
    def explained(self) -> bool:
        """Whether rounding alone can exchange the two tokens."""
        return self.gap < self.noise


def load_model(folder: Path) -> tuple[nn.Module, Any]:
    """Load a model and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, padding_side="left")
    return model.eval(), tokenizer


def make_text_example(model: Any, tokenizer: Any, cached: bool) -> dict[str, Any]:
    """Make example inputs of text; with a key/value cache, the model itself fills it."""
    from transformers import DynamicCache

    total = _PAST + _STEP
    ids = torch.cat([tokenizer(text, return_tensors="pt").input_ids for text in PROMPTS[1:]], dim=1)
    ids = ids[:, : 2 * total].reshape(2, total)
    positions = torch.arange(total).repeat(2, 1)
    example = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": positions}
    if cached:
        cache = DynamicCache()  # without a config: layers with a window keep every position
        with torch.no_grad():
            model(input_ids=ids[:, :_PAST], past_key_values=cache, use_cache=True)
        example |= {"input_ids": ids[:, _PAST:], "position_ids": positions[:, _PAST:]}
        example["past_key_values"] = cache
    return example


def generate_eager(model: Any, tokenizer: Any, count: int) -> Generated:
    """Generate `count` tokens after each prompt with transformers' own loop."""
    prompts = tokenizer(list(PROMPTS), return_tensors="pt", padding=True)
    ids, mask = prompts["input_ids"], prompts["attention_mask"]
    made = model.generate(
        input_ids=ids,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=count,
        output_logits=True,
        return_dict_in_generate=True,
    )
    tokens = made.sequences[:, ids.shape[1] :]
    ends = (tokens == model.generation_config.eos_token_id).long()
    return Generated(ids, mask, tokens, torch.stack(made.logits, dim=1), ends.cumsum(1) - ends == 0)


def choose_tokens(session: Session, want: Generated) -> Tensor:
    """Return the bundle's best token after the prompts and each of eager's tokens.

    The bundle is fed eager's tokens, so that one difference does not hide what follows. If it
    chooses the same ones, this is its own greedy decoding.

    Args:
        session: Of a graph with a key/value cache or without.
        want: What eager generated.

    Returns:
        (B, T) token ids.
    """
    rows = len(want.prompts)
    infos = [info for info in session.graph.inputs if is_past(info.name)]
    past = {
        info.name: torch.zeros(
            resolve_shape(info, {BATCH: rows, PAST: 0}), dtype=getattr(torch, info.dtype)
        )
        for info in infos
    }
    ids, mask, chosen = want.prompts, want.mask, []
    new = ids.shape[1]
    for token in want.tokens.split(1, dim=1):
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        outputs = session(
            input_ids=ids[:, -new:].contiguous(),
            attention_mask=mask,
            position_ids=positions[:, -new:].contiguous(),
            **past,
        )
        chosen.append(torch.as_tensor(outputs["logits"])[:, -1].argmax(-1))
        past = {name: outputs[name_output(name)] for name in past}
        ids, mask = torch.cat([ids, token], 1), torch.cat([mask, torch.ones_like(token)], 1)
        new = 1 if past else ids.shape[1]
    return torch.stack(chosen, dim=1)


def find_differences(model: nn.Module, session: Session, want: Generated) -> list[Difference]:
    """List the tokens for which a bundle chooses another one than `model.generate`."""
    chosen = choose_tokens(session, want)
    found = []
    for row, step in ((chosen != want.tokens) & want.keep).nonzero().tolist():
        logits = want.logits[row, step].double()
        gap = logits[want.tokens[row, step]] - logits[chosen[row, step]]
        noise = measure_position_noise(model, want, row, step)
        found.append(Difference(row, step, float(gap), noise))
    return found


def measure_position_noise(model: Any, want: Generated, row: int, step: int) -> float:
    """Return by how much rounding alone moves eager's logits at one position."""
    prompt = want.prompts[row][want.mask[row].bool()]
    case = Case("one text", (torch.cat([prompt, want.tokens[row, :step]])[None],))

    def run(tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        with torch.no_grad():
            return {"logits": model(input_ids=tensors[0], use_cache=False).logits[:, -1:]}

    return NoiseMeter(model, run).measure(case, case.read_outputs(run(case.tensors)))["logits"]
