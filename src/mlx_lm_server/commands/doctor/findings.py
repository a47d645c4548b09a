"""What a look at something found, in one line."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Level(Enum):
    """How it is: `NOTE` is worth knowing, `WRONG` keeps the server from doing what it should."""

    OK = "ok"
    NOTE = "note"
    WRONG = "wrong"


@dataclass(frozen=True)
class Finding:
    """`advice` is what to do about it, where there is something to do."""

    subject: str
    words: str
    level: Level = Level.OK
    advice: str = ""


def note(subject: str, words: str, advice: str = "") -> Finding:
    return Finding(subject, words, Level.NOTE, advice)


def wrong(subject: str, words: str, advice: str) -> Finding:
    return Finding(subject, words, Level.WRONG, advice)
