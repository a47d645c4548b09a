"""Chat templates: jinja in a sandbox, with what `transformers` gives them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property, reduce
from operator import or_
from typing import Any, NoReturn

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mlx_lm_server.errors import ConfigError, InvalidRequestError, ModelError
from mlx_lm_server.server.models.template_names import TemplateNames
from mlx_lm_server.server.models.template_traits import NO_FIELDS, TemplateTraits

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
    """A model's template, and the one that it has for requests with tools, if any. `variables` hold
    the special tokens and --chat-template-args. Immutable; any thread may render."""

    def __init__(
        self, source: str, variables: Mapping[str, Any], *, tool_use: str | None = None
    ) -> None:
        """Raises ModelError where a source is no template, ConfigError for a reserved name."""
        for name in RESERVED_NAMES & variables.keys():
            raise ConfigError(f"--chat-template-args: `{name}` is set by the server")
        self.sources = (source,) if tool_use is None else (source, tool_use)
        environment = _environment()
        try:
            self._default = environment.from_string(source)
            self._tool_use = None if tool_use is None else environment.from_string(tool_use)
        except jinja2.TemplateError as error:
            raise ModelError(f"the chat template cannot be compiled: {error}") from error
        self._variables = dict(variables)

    @property
    def source(self) -> str:
        """The text of all its templates."""
        return "\n".join(self.sources)

    @cached_property
    def names(self) -> TemplateNames:
        """What any of its templates reads."""
        environment = _environment()
        first, *others = [TemplateNames.of(source, environment) for source in self.sources]
        return reduce(or_, others, first)

    @cached_property
    def traits(self) -> TemplateTraits:
        return TemplateTraits(self)

    def try_out(self) -> None:
        """Finds out now what requests will ask of its names and traits."""
        self.traits.try_out()

    def reads(self, name: str) -> bool:
        """Tells whether a variable has a meaning here."""
        return name in self.names.variables

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        variables: Mapping[str, Any],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = True,
    ) -> str:
        """Returns the prompt, as a rule up to where the assistant speaks.

        Raises InvalidRequestError.
        """
        for name in RESERVED_NAMES & variables.keys():
            raise InvalidRequestError(
                f"`{name}` is set by the server", param=f"chat_template_kwargs.{name}"
            )
        template = (None if tools is None else self._tool_use) or self._default
        known = {**self._variables, **variables}
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

    def attempt(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] = NO_FIELDS,
        *,
        add_generation_prompt: bool = False,
    ) -> str | None:
        """Returns what it makes of messages, or None where it refuses them."""
        try:
            return self.render(
                messages, variables, tools, add_generation_prompt=add_generation_prompt
            )
        except InvalidRequestError:
            return None
