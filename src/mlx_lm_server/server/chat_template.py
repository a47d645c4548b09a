"""Chat templates: jinja in a sandbox, with what `transformers` gives them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mlx_lm_server.errors import ConfigError, InvalidRequestError, ModelError
from mlx_lm_server.folders import expanded

OURS = Path(__file__).parent / "chat_templates"
# Variables that the server sets; a request cannot.
RESERVED_NAMES = frozenset({"messages", "add_generation_prompt", "tools", "documents"})
# What a template may raise when the messages are not those it was written for.
TEMPLATE_FAULTS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)


class GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` marks what the assistant said, for training; here it is only its body."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON for a model to read: no HTML escapes, unlike jinja's own filter."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class ChatTemplate:
    """One compiled template. `variables` hold the special tokens and --chat-template-args."""

    def __init__(self, source: str, variables: Mapping[str, Any]) -> None:
        """Raises ModelError where the source is no template, ConfigError for a reserved name."""
        for name in RESERVED_NAMES & variables.keys():
            raise ConfigError(f"--chat-template-args: `{name}` is set by the server")
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise ModelError(f"the chat template cannot be compiled: {error}") from error
        self.source = source
        self._variables = dict(variables)
        self.takes_argument_objects = self._takes_argument_objects()

    def reads(self, name: str) -> bool:
        """Whether the template mentions a variable."""
        return re.search(rf"\b{re.escape(name)}\b", self.source) is not None

    def _takes_argument_objects(self) -> bool:
        """Whether a call's arguments are to be an object, as most templates have it, or JSON text;
        tried out with a call."""
        call = {"type": "function", "function": {"name": "f", "arguments": {"key": "x"}}}
        messages = [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "", "tool_calls": [{"id": "abcdefghi", **call}]},
        ]
        try:
            text = self._template.render(messages=messages, tools=[call], **self._variables)
        except TEMPLATE_FAULTS:
            return False
        return "{'key'" not in text

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        variables: Mapping[str, Any],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = True,
    ) -> str:
        """The prompt up to where the assistant speaks. Raises InvalidRequestError."""
        for name in RESERVED_NAMES & variables.keys():
            raise InvalidRequestError(
                f"`{name}` is set by the server", param=f"chat_template_kwargs.{name}"
            )
        known = {**self._variables, **variables}
        try:
            return self._template.render(
                messages=messages,
                tools=tools,
                add_generation_prompt=add_generation_prompt,
                **known,
            )
        except TEMPLATE_FAULTS as error:
            reason = str(error) or type(error).__name__
            raise InvalidRequestError(
                f"the model's chat template refuses these messages: {reason}", param="messages"
            ) from error


def find_template(
    folder: Path, tokenizer_config: Mapping[str, Any], override: str | None
) -> str | None:
    """The template's text: the user's, else one of ours that the folder names as mlx-lm's, else the
    folder's file, else tokenizer_config's."""
    if override is not None:
        return _read_override(override)
    if (ours := _ours(tokenizer_config.get("chat_template_type"))) is not None:
        return ours
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    given = tokenizer_config.get("chat_template")
    if isinstance(given, list):
        named = {item.get("name"): item.get("template") for item in given if isinstance(item, dict)}
        given = named.get("default")
    return given if isinstance(given, str) else None


def _ours(kind: Any) -> str | None:
    """What mlx-lm keeps as code, by the name that it goes by there."""
    file = OURS / f"{kind}.jinja"
    is_name = isinstance(kind, str) and kind.isidentifier()
    return file.read_text(encoding="utf-8") if is_name and file.is_file() else None


def _read_override(override: str) -> str:
    if "{" in override or "\n" in override:
        return override
    try:
        return expanded(override).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--chat-template {override}: no template and no such file") from error
