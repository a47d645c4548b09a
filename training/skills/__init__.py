"""The skills nano is trained on; each is a generator of exchanges."""

from __future__ import annotations

from ..exchange import Generator
from .knowledge import calendar, capital
from .numbers import add, count
from .structured import call_tool, fill_schema
from .system import in_language, of_length
from .talk import open_question, small_talk, story
from .text import repeat, replace_in_phrase, replace_word, reverse, spell

SKILLS: dict[str, Generator] = {
    "repeat": repeat,
    "replace": replace_word,
    "phrase": replace_in_phrase,
    "spell": spell,
    "reverse": reverse,
    "count": count,
    "sum": add,
    "capital": capital,
    "calendar": calendar,
    "talk": small_talk,
    "unknown": open_question,
    "story": story,
    "json": fill_schema,
    "tool": call_tool,
    "language": in_language,
    "length": of_length,
}
WEIGHTS: dict[str, float] = {
    "repeat": 3.0,
    "replace": 3.0,
    "phrase": 2.0,
    "spell": 2.0,
    "reverse": 2.2,
    "count": 3.6,
    "sum": 2.2,
    "capital": 0.6,
    "calendar": 0.6,
    "talk": 1.0,
    "unknown": 0.3,
    "story": 0.4,
    "json": 3.0,
    "tool": 3.4,
    "language": 1.6,
    "length": 0.8,
}
# Two layers learn the letters of words last, and they are most of what a draft could gain.
DRAFT_WEIGHTS: dict[str, float] = {**WEIGHTS, "spell": 6.0, "story": 1.0, "unknown": 0.2}
