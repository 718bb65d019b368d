"""Chat templates, which are Jinja: other people's code, rendered in Jinja's sandbox."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from rotary_export.errors import RotaryExportError, first_line
from rotary_export.package import describe_missing


def render_chat(template: str, message: str, config: Mapping[str, Any]) -> str:
    """Render a chat template for one message of a user, as transformers does.

    Args:
        template: In Jinja; "": there is none.
        message: The user's.
        config: The content of `tokenizer_config.json`, which names special tokens.

    Returns:
        The text up to where the answer begins.

    Raises:
        RotaryExportError: There is no template, it fails, or Jinja is not installed.
    """
    if not template:
        raise RotaryExportError("the bundle has no chat template: leave out --chat")
    environment = _make_environment()
    tokens = {name: _read_token(value) for name, value in config.items() if name.endswith("_token")}
    try:
        text: str = environment.from_string(template).render(
            messages=[{"role": "user", "content": message}],
            add_generation_prompt=True,
            tools=None,
            documents=None,
            **tokens,
        )
    except Exception as error:  # whatever the expressions of a template raise
        raise RotaryExportError(f"the chat template fails: {first_line(error)}") from None
    return text


def _make_environment() -> Any:
    """Return the environment of transformers: its names, and no attribute with an underscore."""
    try:
        from jinja2 import nodes
        from jinja2.exceptions import SecurityError, TemplateError
        from jinja2.ext import Extension
        from jinja2.sandbox import ImmutableSandboxedEnvironment
        from jinja2.utils import Namespace
    except ImportError:
        raise RotaryExportError(describe_missing("--chat", "jinja2", "generate")) from None

    class GenerationBlock(Extension):
        """`{% generation %}`, which marks answers for training."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    class PlainNamespace(Namespace):
        def __init__(*args: Any, **attributes: Any) -> None:
            found = dict(*args[1:], **attributes)
            for name in found:
                PlainNamespace.check_name(name)
            Namespace.__init__(args[0], found)

        def __setitem__(self, name: str, value: Any) -> None:
            self.check_name(name)
            super().__setitem__(name, value)

        @staticmethod
        def check_name(name: Any) -> None:
            if isinstance(name, str) and name.startswith("_"):
                raise SecurityError(f"a namespace must have no attribute {name!r}")

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)  # Jinja's escapes HTML

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[GenerationBlock, "jinja2.ext.loopcontrols"],
    )
    environment.filters["tojson"] = to_json
    environment.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "namespace": PlainNamespace,
    }
    return environment


def _read_token(value: Any) -> Any:
    """Return a special token, which a config has as a text or with its properties."""
    return value.get("content") if isinstance(value, Mapping) else value
