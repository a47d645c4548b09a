"""Chat templates: jinja in a sandbox, with what `transformers` gives them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mlx_lm_server.errors import ConfigError, InvalidRequestError, ModelError

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
    """One compiled template, or two where a model has another for requests with tools, `tool_use`.

    `variables` hold the special tokens and --chat-template-args.
    """

    def __init__(
        self, source: str, variables: Mapping[str, Any], *, tool_use: str | None = None
    ) -> None:
        """Raises ModelError where a source is no template, ConfigError for a reserved name."""
        for name in RESERVED_NAMES & variables.keys():
            raise ConfigError(f"--chat-template-args: `{name}` is set by the server")
        self._template = _compiled(source)
        self._tool_use = None if tool_use is None else _compiled(tool_use)
        self.source = source
        self.source_with_tools = source if tool_use is None else tool_use
        self._variables = dict(variables)
        self.takes_argument_objects = self._takes_argument_objects()

    def reads(self, name: str) -> bool:
        """Whether the template mentions a variable."""
        pattern = rf"\b{re.escape(name)}\b"
        return any(re.search(pattern, text) for text in (self.source, self.source_with_tools))

    def _takes_argument_objects(self) -> bool:
        """Whether a call's arguments are to be an object, as most templates have it, or JSON text;
        tried out with a call."""
        call = {"type": "function", "function": {"name": "f", "arguments": {"key": "x"}}}
        messages = [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "", "tool_calls": [{"id": "abcdefghi", **call}]},
        ]
        try:
            template = self._tool_use or self._template
            text = template.render(messages=messages, tools=[call], **self._variables)
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
        template = (None if tools is None else self._tool_use) or self._template
        try:
            return template.render(
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


def _compiled(source: str) -> jinja2.Template:
    try:
        return _environment().from_string(source)
    except jinja2.TemplateError as error:
        raise ModelError(f"the chat template cannot be compiled: {error}") from error
