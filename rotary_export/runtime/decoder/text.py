"""Text to token ids and back, by the tokenizer and the chat template that a bundle contains."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rotary_export.bundle.json_file import read_json_object
from rotary_export.bundle.manifest import check_files, read_manifest
from rotary_export.errors import RotaryExportError, explain_damage, first_line
from rotary_export.package import describe_missing
from rotary_export.runtime.decoder.chat import render_chat

TOKENIZER, CONFIG = "tokenizer.json", "tokenizer_config.json"
TEMPLATE, OLD_TEMPLATE = "chat_template.jinja", "chat_template.json"


def find_text(bundle_dir: Path) -> Text | None:
    """Load the tokenizer of a bundle, if it has one and the package is installed."""
    has_package = find_spec("tokenizers") is not None
    return (
        Text(bundle_dir) if has_package and TOKENIZER in read_manifest(bundle_dir).files else None
    )


class Text:
    """The tokenizer of a bundle.

    Args:
        bundle_dir: The bundle's folder.

    Raises:
        RotaryExportError: The bundle has no tokenizer, it is damaged, or a package is missing.
    """

    def __init__(self, bundle_dir: Path) -> None:
        manifest = read_manifest(bundle_dir)
        if TOKENIZER not in manifest.files:
            raise RotaryExportError(
                f"the bundle {bundle_dir} has no {TOKENIZER}: pass token ids (--ids)"
            )
        try:
            import tokenizers
        except ImportError:
            raise RotaryExportError(
                describe_missing("text (--prompt)", "tokenizers", "generate")
            ) from None
        names = (TOKENIZER, CONFIG, TEMPLATE, OLD_TEMPLATE)
        found = [name for name in names if name in manifest.files]
        check_files(bundle_dir, manifest, found)
        with explain_damage(f"{bundle_dir / TOKENIZER} can't be read"):
            self._tokenizer = tokenizers.Tokenizer.from_file(str(bundle_dir / TOKENIZER))
        self._config = read_json_object(bundle_dir / CONFIG) if CONFIG in found else {}
        self._template = _find_template(bundle_dir, found, self._config)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, with the special tokens that begin or end one."""
        return self._encode(text, add_special_tokens=True)

    def encode_chat(self, message: str) -> list[int]:
        """Return the ids of a user's message in a chat, up to where the answer begins.

        Raises:
            RotaryExportError: The bundle has no chat template, or it can't be rendered.
        """
        text = render_chat(self._template, message, self._config)
        return self._encode(text, add_special_tokens=False)

    def decode_after(self, prompt: Sequence[int]) -> Callable[[int], str]:
        """Return a function that decodes the tokens after a prompt, one after the other.

        It returns "" where a character is not complete yet, and for special tokens.
        """
        from tokenizers.decoders import DecodeStream

        stream = DecodeStream(skip_special_tokens=True)

        def decode(token: int) -> str:
            return stream.step(self._tokenizer, token) or ""

        for token in prompt:  # whether a space comes first depends on what is before
            decode(token)
        return decode

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        try:
            encoded = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        except Exception as error:  # such as halves of surrogates
            raise RotaryExportError(f"{text!r:.60} has no token ids: {first_line(error)}") from None
        if not encoded.ids:
            raise RotaryExportError(f"the prompt {text!r:.60} has no tokens")
        return [*encoded.ids]


def _find_template(bundle_dir: Path, found: Sequence[str], config: Mapping[str, Any]) -> str:
    """Return the chat template, or "" where there is none."""
    if TEMPLATE in found:
        with explain_damage(f"{bundle_dir / TEMPLATE} can't be read"):
            return (bundle_dir / TEMPLATE).read_text(encoding="utf-8")
    template = config.get("chat_template")
    if template is None and OLD_TEMPLATE in found:
        template = read_json_object(bundle_dir / OLD_TEMPLATE).get("chat_template")
    if isinstance(template, list):  # several, by name
        named = [each for each in template if isinstance(each, Mapping)]
        template = {each.get("name"): each.get("template") for each in named}.get("default")
    return template if isinstance(template, str) else ""
