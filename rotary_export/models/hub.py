"""Fetches a model from the Hugging Face hub: weights and descriptions, never code."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

from rotary_export.errors import RotaryExportError, first_line

# Of the top folder. Pickled weights and Python files can execute code, so they stay on the hub.
_FETCHED = (
    "*.safetensors",
    "*.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "*.tiktoken",
    "chat_template.jinja",
)
_LEFT_OUT = ("*/*", "consolidated*.safetensors")  # the same weights in another library's layout


def is_hub_id(source: str) -> bool:
    """Whether a source is `org/name`, and not the path of a folder."""
    match = re.fullmatch(r"([\w-][\w.-]*)/([\w-][\w.-]*)", source, re.ASCII)
    return match is not None and not source.endswith(".json") and not Path(match[1]).exists()


def fetch_model(name: str, revision: str | None) -> Path:
    """Fetch a model into the cache of huggingface_hub, or find it there.

    Args:
        name: `org/name`.
        revision: A branch, a tag or a commit; None: the default branch.

    Returns:
        Its folder, whose name is the commit.

    Raises:
        RotaryExportError: It doesn't exist, needs permission, or can't be fetched.
    """
    hub = _import_hub()
    had_bars = not hub.utils.are_progress_bars_disabled()
    hub.utils.disable_progress_bars()
    try:
        return Path(
            hub.snapshot_download(
                name,
                revision=revision,
                allow_patterns=list(_FETCHED),
                ignore_patterns=list(_LEFT_OUT),
            )
        )
    except hub.errors.GatedRepoError:
        reason = "its licence must be accepted on its page; then log in by `hf auth login`"
    except hub.errors.RevisionNotFoundError:
        reason = f"it has no revision {revision!r}"
    except hub.errors.RepositoryNotFoundError:
        reason = "the hub has no such model, or it is private: log in by `hf auth login`"
    except Exception as error:  # whatever the client raises: offline, a proxy, a full disk
        options = "" if revision is None else f" --revision {revision}"
        patterns = " ".join(f"--include '{each}'" for each in _FETCHED[:2])
        reason = (
            f"{first_line(error)}. Where there is a network: hf download {name}{options} "
            f"{patterns} --include '*token*' --local-dir FOLDER; then name FOLDER"
        )
    finally:
        if had_bars:
            hub.utils.enable_progress_bars()
    raise RotaryExportError(
        f"{name} can't be fetched from the Hugging Face hub, and no such folder exists: {reason}"
    )


def _import_hub() -> Any:
    try:
        for module in ("errors", "utils"):  # attributes of the package once imported
            importlib.import_module(f"huggingface_hub.{module}")
        return importlib.import_module("huggingface_hub")
    except ImportError as error:
        raise RotaryExportError(
            f"a model of the Hugging Face hub requires transformers: pip install transformers: "
            f"{error}"
        ) from None
