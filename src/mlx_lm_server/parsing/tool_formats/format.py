"""What all formats of tool calls share."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from mlx_lm_server.parsing.message import MessageBuilder
from mlx_lm_server.parsing.reader import Reader, Script, UnparsableError
from mlx_lm_server.parsing.tool_schemas import ToolSchemas

__all__ = ["ToolFormat", "ToolSchemas", "dump", "load", "load_object"]

# Reads the calls after a mark that begins them, which is the last argument.
ReadCalls = Callable[[Reader, MessageBuilder, ToolSchemas, str], Script[None]]
WriteCalls = Callable[[Sequence[tuple[str, Mapping[str, Any]]]], str]


@dataclass(frozen=True)
class ToolFormat:
    """How a family of models writes calls of tools.

    `starts` are marks that begin calls. `bare` are beginnings of calls without a mark, which count
    at the start of an answer only. `likely` begin calls anywhere, but what turns out to be none is
    text without a warning. `dropped` are marks that belong to nothing; after one of them calls may
    be bare again. `marks` are all texts of which special tokens may be a part. `read` begins after
    the start. `write` gives the text of some calls, for templates that do not write them.
    """

    name: str
    read: ReadCalls
    starts: tuple[str, ...] = ()
    bare: tuple[str, ...] = ()
    likely: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    marks: tuple[str, ...] = ()
    write: WriteCalls | None = None
    id_letters: int = 0  # length of an id of letters and digits; 0: OpenAI's `call_…`

    def is_open_after(self, prompt: str) -> bool:
        """Tells whether the prompt's last letters are a mark that begins calls."""
        return any(prompt.endswith(start) for start in self.starts)


def dump(value: Any) -> str:
    """Returns JSON text. Raises UnparsableError for what JSON or Unicode has no words for."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode()
    except ValueError as error:
        raise UnparsableError(str(error)) from error
    return text


def load(text: str) -> Any:
    """Returns the value of JSON text. Raises UnparsableError, also for NaN and Infinity."""
    try:
        return json.loads(text, parse_constant=refuse, parse_float=finite)
    except (ValueError, RecursionError) as error:
        raise UnparsableError(str(error)) from error


def load_object(text: str) -> dict[str, Any]:
    """Returns a JSON object. Raises UnparsableError for anything else."""
    value = load(text)
    if not isinstance(value, dict):
        raise UnparsableError("arguments are no object")
    return value


def finite(text: str) -> float:
    """Reads a number of JSON. Raises ValueError for one that is too large."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:100]} is too large a number")
    return number


def refuse(word: str) -> NoReturn:
    """Raises ValueError for NaN and Infinity, which are no JSON."""
    raise ValueError(f"{word} is no JSON number")
