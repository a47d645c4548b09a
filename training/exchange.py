"""What a generator gives: a question with its answer, and whether it is held out for scoring."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

HELD_OUT_ONE_IN = 16

Split = Literal["train", "held_out"]
Message = dict[str, Any]


@dataclass(frozen=True)
class Exchange:
    """Messages of one exchange, starting with a user message and ending with an assistant one.

    `key` names what must not be seen in training when it is held out; the first user text by
    default. `thought` is the reasoning used when thinking is on. `also` are other right answers.
    """

    skill: str
    messages: tuple[Message, ...]
    thought: str
    key: str = ""
    system: str = ""
    tools: tuple[dict[str, Any], ...] = field(default=())
    also: tuple[str, ...] = ()

    @property
    def question(self) -> str:
        """The text of the first user message."""
        return str(self.messages[0]["content"])

    @property
    def answer(self) -> str:
        """The text of the last assistant message."""
        return str(self.messages[-1]["content"])

    @property
    def split(self) -> Split:
        """Whether this exchange may be trained on."""
        return split_of(self.key or self.question)


Generator = Callable[[random.Random], Exchange]


def split_of(key: str) -> Split:
    """One key in `HELD_OUT_ONE_IN` is held out, by its hash."""
    digest = hashlib.blake2b(key.encode(), digest_size=4).digest()
    return "held_out" if int.from_bytes(digest, "big") % HELD_OUT_ONE_IN == 0 else "train"


def ask(skill: str, question: str, answer: str, thought: str, **rest: Any) -> Exchange:
    """An exchange of one question and one answer."""
    messages = ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
    return Exchange(skill, messages, thought, **rest)


def draw(generator: Generator, rng: random.Random, split: Split) -> Exchange:
    """Draw until an exchange of the wanted split comes."""
    while True:
        exchange = generator(rng)
        if exchange.split == split:
            return exchange
