"""Seeded training batches: conversations and a little plain text."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from .chat import Part, Style, conversation_parts
from .exchange import Exchange, draw
from .skills import SKILLS, WEIGHTS
from .skills.talk import story_text
from .skills.text import passage
from .words import ANIMALS, sentence

BUCKETS = {128: 0.2, 256: 0.25, 512: 0.2, 768: 0.35}
PLAIN_TEXT_SHARE = 0.04
LITTLE_ROOM = 24
MOST_MISSES = 4
NEUTRAL_SYSTEMS = (
    "You are a helpful assistant.",
    "You are nano.",
    "You are a friendly assistant.",
    "Be helpful.",
    "You are a helpful AI assistant. Be polite.",
    "You are nano, a demonstration model.",
)
Shares = Mapping[str, float]


@dataclass(frozen=True)
class Row:
    """Token ids and, for each, the weight of predicting it."""

    ids: list[int]
    weights: list[float]


@dataclass(frozen=True)
class Batch:
    """Tokens `[rows, length]` and weights of predicting each of them, same shape."""

    tokens: np.ndarray
    weights: np.ndarray


def draw_exchange(rng: random.Random, shares: Shares = WEIGHTS) -> Exchange:
    """An exchange that may be trained on, of a skill drawn by `shares`."""
    skill = rng.choices(list(shares), list(shares.values()))[0]
    return draw(SKILLS[skill], rng, "train")


def plain_text(rng: random.Random) -> str:
    """Text without chat marks, so that plain completions work too."""
    roll = rng.random()
    if roll < 0.4:
        return story_text(rng.choice(ANIMALS), rng.randint(2, 7))
    if roll < 0.6:
        low = rng.randint(0, 50)
        return ", ".join(str(n) for n in range(low, low + rng.randint(5, 30)))
    if roll < 0.8:
        text = passage(rng, rng.randint(5, 25))
        return f"{text}\n{text}\n{text}"
    return " ".join(sentence(rng) for _ in range(rng.randint(2, 6)))


def conversation(
    rng: random.Random, most_exchanges: int, shares: Shares = WEIGHTS
) -> list[list[Part]]:
    """Parts of one conversation, a list for each of its exchanges."""
    exchanges = [draw_exchange(rng, shares)]
    first = exchanges[0]
    style = Style(thinking=rng.random() < 0.25, as_generated=rng.random() < 0.6)
    system = first.system
    if not system and rng.random() < 0.25:
        system = rng.choice(NEUTRAL_SYSTEMS)
    while not first.system and len(exchanges) < most_exchanges:
        following = draw_exchange(rng, shares)
        if not following.system and not following.tools:
            exchanges.append(following)
    if first.tools and rng.random() < 0.3:
        rng.shuffle(exchanges)
    return list(conversation_parts(exchanges, system, first.tools, style))


def encode_parts(tokenizer: Tokenizer, parts: list[Part]) -> Row:
    """Ids of the parts; the targets of one exchange share a weight of sqrt(their number)."""
    ids: list[int] = []
    is_target: list[bool] = []
    for part in parts:
        piece = tokenizer.encode(part.text, add_special_tokens=False).ids
        ids += piece
        is_target += [part.is_target] * len(piece)
        if part.skip_first and piece:
            is_target[-len(piece)] = False
    each = max(1, sum(is_target)) ** -0.5
    return Row(ids, [each * t for t in is_target])


def make_row(
    tokenizer: Tokenizer, rng: random.Random, length: int, shares: Shares = WEIGHTS
) -> Row:
    """One row of at most `length` tokens: documents one after the other while there is room."""
    row, misses = Row([], []), 0
    while misses < MOST_MISSES and length - len(row.ids) > LITTLE_ROOM:
        document = _document(tokenizer, rng, length - len(row.ids), shares)
        misses += not document.ids
        row = Row(row.ids + document.ids, row.weights + document.weights)
    return row


def _document(tokenizer: Tokenizer, rng: random.Random, room: int, shares: Shares) -> Row:
    """A conversation cut between exchanges to fit, perhaps to nothing; or plain text."""
    if rng.random() < PLAIN_TEXT_SHARE:
        parts = [Part("<|endoftext|>"), Part(plain_text(rng) + "<|endoftext|>", is_target=True)]
        row = encode_parts(tokenizer, parts)
        return Row(row.ids[:room], row.weights[:room])
    most = 1 if rng.random() < 0.4 else rng.randint(2, 6)
    ids: list[int] = []
    weights: list[float] = []
    for parts in conversation(rng, most, shares):
        row = encode_parts(tokenizer, parts)
        if len(ids) + len(row.ids) > room:
            break
        ids += row.ids
        weights += row.weights
    return Row(ids, weights)


def batch_at(
    tokenizer: Tokenizer, seed: int, step: int, tokens_per_batch: int, shares: Shares = WEIGHTS
) -> Batch:
    """The batch of one step: rows of one bucket length, the same each time it is asked for."""
    rng = random.Random(f"{seed} {step}")
    length = rng.choices(list(BUCKETS), list(BUCKETS.values()))[0]
    rows = max(1, tokens_per_batch // length)
    tokens = np.zeros((rows, length), dtype=np.int64)
    weights = np.zeros((rows, length), dtype=np.float32)
    for i in range(rows):
        row = make_row(tokenizer, rng, length, shares)
        tokens[i, : len(row.ids)] = row.ids
        weights[i, : len(row.ids)] = row.weights
    return Batch(tokens, weights)
