"""What a request wants of a model's thinking, in the variables of the model's chat template."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from mlx_lm_server.errors import InvalidRequestError
from mlx_lm_server.server.models.chat_template import ChatTemplate
from mlx_lm_server.server.models.template_traits import USER

SWITCH = "enable_thinking"
# Names that stand for the same, in the order in which they are tried.
SWITCHES = (
    SWITCH,
    "thinking",
    "thinking_mode",
    "enable_reasoning",
    "reasoning",
    "reasoning_mode",
    "think",
    "thinking_effort",
    "reasoning_effort",
    "thinking_budget",
)
ON_WORDS = ("enabled", "on", "thinking", "think", "true", "high", "max", "medium")
OFF_WORDS = ("disabled", "off", "no_think", "nothink", "none", "chat", "false", "non-thinking")
EFFORT_NAMES = ("reasoning_effort", "thinking_effort", "reasoning_strength")
# Words for how much to think → words that templates have for the same.
EFFORT_WORDS: Mapping[str, tuple[str, ...]] = {
    "none": ("none", "no_think", "nothink", "no_thinking", "off", "disabled"),
    "minimal": ("minimal", "min"),
    "low": ("low",),
    "medium": ("medium", "mid", "normal"),
    "high": ("high",),
    "xhigh": ("xhigh", "max", "maximum"),
}
NO_EFFORT = "reasoning_effort has no effect on this model"
BUDGETS = frozenset({"thinking_budget"})


@dataclass(frozen=True)
class Thinking:
    """`variables` are for the template. `ends`: what it cannot switch off is ended at once.
    `warnings` say what has no effect."""

    variables: dict[str, Any] = field(default_factory=dict)
    ends: bool = False
    warnings: tuple[str, ...] = ()


def thinking_of(
    given: Mapping[str, Any],
    effort: str | None,
    template: ChatTemplate,
    *,
    can_think: bool,
    can_be_ended: bool,
) -> Thinking:
    """Returns what a request's variables and its effort mean for a template.

    Raises InvalidRequestError for a variable that the template has none like.
    """
    variables = _given_variables(given, template, can_think)
    if effort is None:
        return Thinking(variables)
    by_effort = _of_effort(effort, template)
    if by_effort or (effort == "none" and not can_think):
        return Thinking({**by_effort, **variables})
    if effort == "none" and can_be_ended:
        return Thinking(variables, ends=True)
    return Thinking(variables, warnings=(NO_EFFORT,))


def _given_variables(
    given: Mapping[str, Any], template: ChatTemplate, can_think: bool
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in given.items():
        if template.reads(name):
            found[name] = value
        elif name in (SWITCH, "thinking") and isinstance(value, bool):
            found |= _switched(name, value, template, can_think)
        else:
            raise InvalidRequestError(
                f"the model's chat template has no variable `{name}`",
                param=f"chat_template_kwargs.{name}",
            )
    return found


def _switched(
    name: str, thinks: bool, template: ChatTemplate, can_think: bool
) -> Mapping[str, Any]:
    """Raises InvalidRequestError where the template has no such switch."""
    switch = switch_of(template, thinks)
    if switch is not None:
        return switch
    if thinks == can_think:
        return {}  # it cannot do otherwise
    raise InvalidRequestError(
        f"this model {'does not think' if thinks else 'always thinks'}: its chat template has no "
        f"variable `{name}`, and none like it",
        param=f"chat_template_kwargs.{name}",
        code="unsupported_parameter",
    )


@lru_cache(maxsize=64)
def switch_of(
    template: ChatTemplate, thinks: bool, names: tuple[str, ...] = SWITCHES
) -> Mapping[str, Any] | None:
    """Returns the variable that turns thinking on or off: the first of those that a template reads
    whose value makes a difference to the prompt. None where there is none."""
    for name in names:
        if not template.reads(name):
            continue
        on, off = (_value(name, value, template) for value in (True, False))
        if on == off:
            continue
        prompts = [_prompt(template, {} if value is None else {name: value}) for value in (on, off)]
        if None not in prompts and prompts[0] != prompts[1]:
            chosen = on if thinks else off
            return {} if chosen is None else {name: chosen}
    return None


def _value(name: str, thinks: bool, template: ChatTemplate) -> Any:
    """Returns a switch's value; None leaves it to the template."""
    if name in BUDGETS:
        return None if thinks else 0
    words = template.names.words.get(name, frozenset())
    known = next((word for word in (ON_WORDS if thinks else OFF_WORDS) if word in words), None)
    if known is not None:
        return known
    is_word = not words.isdisjoint((*ON_WORDS, *OFF_WORDS)) or name in EFFORT_NAMES
    return None if is_word else thinks


@lru_cache(maxsize=64)
def _of_effort(effort: str, template: ChatTemplate) -> Mapping[str, Any]:
    """Returns the variables for an effort; empty where the template has none, or not this word."""
    found: dict[str, Any] = {}
    for name in EFFORT_NAMES:
        if template.reads(name):
            known = template.names.words.get(name, frozenset())
            word = next((w for w in EFFORT_WORDS[effort] if w in known), None)
            value = effort if word is None else word
            prompt = _prompt(template, {name: value})
            is_known = word is not None or prompt != _prompt(template, {})
            if word is None and effort == "none":
                is_known = False  # it may take any word, but none that means not to think
            if prompt is not None and is_known:
                found[name] = value
            break
    if template.reads(SWITCH):
        found[SWITCH] = effort != "none"
    if not found:
        others = tuple(name for name in SWITCHES if name not in EFFORT_NAMES)
        found |= switch_of(template, effort != "none", others) or {}
    return found


def _prompt(template: ChatTemplate, variables: Mapping[str, Any]) -> str | None:
    return template.attempt([USER], None, variables, add_generation_prompt=True)
