"""What `generate` is asked for: its arguments, `generation_config.json`, transformers' defaults."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rotary_export.errors import RotaryExportError

FILE = "generation_config.json"
# Entries that change tokens and are not applied here, and the values at which they do not.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "num_beams": (None, 1),
    "no_repeat_ngram_size": (None, 0),
    "bad_words_ids": (None, []),
    "sequence_bias": (None, []),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "begin_suppress_tokens": (None, []),
    "exponential_decay_length_penalty": (None,),
    "guidance_scale": (None, 1),
    "penalty_alpha": (None, 0),
    "stop_strings": (None, []),
    "watermarking_config": (None,),
}
_UNSUPPORTED_IN_SAMPLING: dict[str, tuple[Any, ...]] = {
    "min_p": (None, 0),
    "typical_p": (None, 1),
    "top_h": (None,),
    "epsilon_cutoff": (None, 0),
    "eta_cutoff": (None, 0),
    "renormalize_logits": (None, False),
}


@dataclass(frozen=True)
class Settings:
    """How tokens are chosen, and when to stop.

    Attributes:
        max_new_tokens: How many at most, >= 1.
        eos_token_ids: Tokens that end a row.
        pad_token_id: The token of a row that has ended, and of padding; None: no row ends.
        do_sample: Draw tokens; False: the best one.
        temperature: > 0; logits are divided by it.
        top_k: Only the k best tokens are drawn; 0: all.
        top_p: Only the best tokens whose probabilities add up to it are drawn.
        seed: Of the draws; None: another one each time.
        repetition_penalty: > 0; above 1 tokens that are there already become less likely.
        suppress_tokens: Tokens that are never chosen.
    """

    max_new_tokens: int
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    seed: int | None = None
    repetition_penalty: float = 1.0
    suppress_tokens: tuple[int, ...] = ()


def make_settings(
    config: Mapping[str, Any],
    max_new_tokens: int,
    eos_token_id: int | Sequence[int] | None,
    pad_token_id: int | None,
    do_sample: bool,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    seed: int | None,
) -> Settings:
    """Complete what was asked for by the model's own generation config.

    Args:
        config: The content of `generation_config.json`.
        max_new_tokens: As `Decoder.generate`.
        eos_token_id: Likewise, as the others.
        pad_token_id: None: that of the config, else the first token that ends a row.
        do_sample: Asked for; the config's is ignored.
        temperature: For sampling.
        top_k: For sampling.
        top_p: For sampling.
        seed: For sampling.

    Raises:
        RotaryExportError: A value is out of range, one is for sampling alone, or the config has an
            entry that changes tokens and is not applied here.
    """
    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    if not isinstance(do_sample, bool):
        raise RotaryExportError(f"do_sample must be a bool, got {do_sample!r}")
    for name, value in sampling.items():
        if value is not None and not do_sample:
            raise RotaryExportError(f"{name}={value!r} is for sampling: pass do_sample=True, too")
    _check_supported(config, do_sample)

    def pick(asked: Any, name: str, default: Any) -> Any:
        found = config.get(name) if asked is None else asked
        return default if found is None else found

    ends = read_ends({"eos_token_id": pick(eos_token_id, "eos_token_id", None)})
    settings = Settings(
        max_new_tokens,
        ends,
        pick(pad_token_id, "pad_token_id", ends[0] if ends else None),
        do_sample,
        pick(temperature, "temperature", 1.0),
        pick(top_k, "top_k", 50),
        pick(top_p, "top_p", 1.0),
        seed,
        pick(None, "repetition_penalty", 1.0),
        _read_ids("suppress_tokens", pick(None, "suppress_tokens", [])),
    )
    _check_values(settings)
    return settings


def read_ends(config: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the tokens that end a row: `eos_token_id` of a generation config.

    Raises:
        RotaryExportError: They are not ints.
    """
    ends = config.get("eos_token_id")
    return _read_ids("eos_token_id", [] if ends is None else [ends] if type(ends) is int else ends)


def _check_supported(config: Mapping[str, Any], do_sample: bool) -> None:
    names = _UNSUPPORTED | (_UNSUPPORTED_IN_SAMPLING if do_sample else {})
    for name, neutral in names.items():
        if config.get(name) not in neutral:
            raise RotaryExportError(
                f"{FILE} has {name}={config[name]!r}, which is not applied here: transformers, "
                "optimum or onnxruntime-genai open the same bundle"
            )


def _read_ids(name: str, ids: Any) -> tuple[int, ...]:
    if not isinstance(ids, Sequence) or not all(type(each) is int for each in ids):
        raise RotaryExportError(f"{name} must be an int or a list of ints, got {ids!r}")
    return tuple(ids)


def _check_values(settings: Settings) -> None:
    def is_number(value: Any) -> bool:
        return isinstance(value, (int, float)) and not isinstance(value, bool)

    is_int = {name: type(value) is int for name, value in vars(settings).items()}
    temperature, top_p = settings.temperature, settings.top_p
    penalty, seed, pad = settings.repetition_penalty, settings.seed, settings.pad_token_id
    for name, required, is_right in (
        ("max_new_tokens", ">= 1", is_int["max_new_tokens"] and settings.max_new_tokens >= 1),
        ("pad_token_id", "an int", pad is None or is_int["pad_token_id"]),
        ("temperature", "> 0", is_number(temperature) and 0 < temperature < float("inf")),
        ("top_k", "an int >= 0", is_int["top_k"] and settings.top_k >= 0),
        ("top_p", "> 0 and <= 1", is_number(top_p) and 0 < top_p <= 1),
        ("repetition_penalty", "> 0", is_number(penalty) and penalty > 0),
        ("seed", "an int >= 0", seed is None or (is_int["seed"] and seed >= 0)),
    ):
        if not is_right:
            raise RotaryExportError(f"{name} must be {required}, got {getattr(settings, name)!r}")
