"""The help of a command as text, for a terminal of any width.

A name is never cut and never broken: one that is too long for its column stands on a line of its
own, and what it means begins on the next.

    ─ model ──────────────────────────────
      --model ID_OR_PATH      Hub id, local folder, or …
      --served-model-name NAME
                              Name that clients may use …
"""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Iterator, Sequence
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.text import Text
from typer.core import TyperCommand

MARGIN = 2
# Where meanings begin, and where they do in a terminal that is too narrow for two columns.
MEANING_COLUMN = 28
NARROW_COLUMN = 6
NARROW = 64
# Lines that are longer are hard to read.
MAX_WIDTH = 100
OPTIONS_PANEL = "options"


class HelpfulCommand(TyperCommand):
    """A command whose help is laid out here. `examples` are calls, and what they do."""

    examples: tuple[tuple[str, str], ...] = ()

    def format_help(self, ctx: Any, formatter: Any) -> None:
        console = Console()
        with console.capture() as captured:
            for line in help_lines(self, ctx, min(console.width, MAX_WIDTH)):
                console.print(line, soft_wrap=True)
        formatter.write(captured.get())


def help_lines(command: Any, ctx: Any, width: int) -> Iterator[Text]:
    """Usage, what the command does, examples, and its arguments and options by panel."""
    yield Text.assemble(("Usage: ", "bold"), " ".join((ctx.command_path, *_usage(command, ctx))))
    yield Text()
    yield from map(Text, _wrapped(command.help or "", width))
    yield Text()
    if command.examples:
        for call, meaning in command.examples:
            yield from _entry(Text(call, style="bold"), meaning, width)
        yield Text()
    shown = [param for param in command.get_params(ctx) if not getattr(param, "hidden", False)]
    panels = [OPTIONS_PANEL, *dict.fromkeys(map(_panel, shown))]
    shown.sort(key=lambda param: panels.index(_panel(param)))
    for panel, params in groupby(shown, key=_panel):
        yield Text(f"─ {panel} ".ljust(width, "─"), style="dim")
        for param in params:
            yield from _entry(_names(param), _meaning(param), width)
        yield Text()


def _wrapped(text: str, width: int) -> list[str]:
    """Lines that break between words only: a flag within a text stays whole too."""
    return textwrap.wrap(text, width, break_on_hyphens=False, break_long_words=False)


def _usage(command: Any, ctx: Any) -> list[str]:
    arguments = [f"[{_metavar(p)}]" for p in command.get_params(ctx) if _is_argument(p)]
    return [*arguments, "[OPTIONS]"]


def _panel(param: Any) -> str:
    return getattr(param, "rich_help_panel", None) or OPTIONS_PANEL


def _entry(names: Text, meaning: str, width: int) -> Iterator[Text]:
    column = MEANING_COLUMN if width >= NARROW else NARROW_COLUMN
    lines = [Text(line) for line in _wrapped(meaning, max(20, width - column))]
    first = Text(" " * MARGIN) + names
    if len(first) <= column - 2 and lines:
        first.pad_right(column - len(first))
        first += lines.pop(0)
    yield first
    for line in lines:
        yield Text(" " * column) + line


def _names(param: Any) -> Text:
    """`-h, --help`, `--port N`, `--this / --no-this`, or an argument's MODEL."""
    if _is_argument(param):
        return Text(_metavar(param), style="bold")
    flags = sorted(param.opts, key=len)
    names = Text(", ".join(flags), style="bold cyan")
    if param.secondary_opts:
        names.append(" / ").append(", ".join(param.secondary_opts))
    if not param.is_flag:
        names.append(f" {_metavar(param)}", style="yellow")
    return names


def _meaning(param: Any) -> str:
    facts = [_default(param)] if _default(param) else []
    if getattr(param, "envvar", None):
        facts.append(f"variable {param.envvar}")
    return " ".join([param.help or "", f"[{'; '.join(facts)}]" if facts else ""]).strip()


def _default(param: Any) -> str:
    """What `show_default` says where it is a text, else the value, as far as there is one."""
    if isinstance(param.show_default, str):
        return f"default {param.show_default}"
    is_value = param.show_default and param.default not in (None, (), []) and not _is_switch(param)
    return f"default {_short(param.default)}" if is_value else ""


def _short(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _is_argument(param: Any) -> bool:
    return bool(param.param_type_name == "argument")


def _is_switch(param: Any) -> bool:
    return not _is_argument(param) and bool(param.is_flag)


def _metavar(param: Any) -> str:
    return str(param.metavar or "VALUE")


def value_of_switch(
    params: Sequence[Any], args: Sequence[str], values: Collection[str]
) -> tuple[str, str] | None:
    """The first switch among `args` that is given a value, `--switch=value` or followed by one of
    `values`, and that value."""
    options = [param for param in params if not _is_argument(param)]
    by_flag = {f: p for p in options for f in (*p.opts, *p.secondary_opts)}
    place = 0
    while place < len(args):
        flag, equals, value = args[place].partition("=")
        after = args[place + 1] if place + 1 < len(args) else ""
        is_switch = flag in by_flag and _is_switch(by_flag[flag])
        if is_switch and (equals or after.lower() in values):
            return flag, value if equals else after
        place += 2 if flag in by_flag and not is_switch and not equals else 1
    return None
