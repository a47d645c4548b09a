"""Counting and small sums."""

from __future__ import annotations

import random

from ..exchange import Exchange, ask

COUNT = (
    "Count from {} to {}.",
    "Count from {} to {}",
    "Please count from {} to {}.",
    "Can you count from {} to {}?",
    "Count {} to {}.",
    "List the numbers from {} to {}.",
    "Write the numbers from {} to {}.",
)
COUNT_DOWN = ("Count down from {} to {}.", "Please count down from {} to {}.")
COUNT_TO = ("Count to {}.", "Count up to {}.", "Can you count to {}?", "Please count to {}.")
SUM = (
    "What is {} + {}?",
    "{} + {}",
    "{} + {} =",
    "What is {} plus {}?",
    "How much is {} + {}?",
    "How much is {} plus {}?",
    "Add {} and {}.",
    "What is the sum of {} and {}?",
    "Calculate {} + {}.",
    "Compute {} + {}.",
    "Tell me {} + {}.",
)


def count(rng: random.Random) -> Exchange:
    """Count up or down by one, up to 60 numbers between 0 and 200."""
    span = min(int(rng.expovariate(1 / 14)) + 2, 60)
    low = rng.randint(0, 20) if rng.random() < 0.6 else rng.randint(0, 200 - span)
    high = low + span
    roll = rng.random()
    if roll < 0.2:
        question = rng.choice(COUNT_TO).format(1 + span)
        numbers = list(range(1, span + 2))
    elif roll < 0.6:
        question = rng.choice(COUNT).format(low, high)
        numbers = list(range(low, high + 1))
    else:
        template = rng.choice(COUNT_DOWN if rng.random() < 0.8 else COUNT)
        question = template.format(high, low)
        numbers = list(range(high, low - 1, -1))
    thought = f"I start with {numbers[0]} and stop at {numbers[-1]}."
    return ask("count", question, ", ".join(map(str, numbers)), thought)


def add_key(a: int, b: int) -> str:
    """The held-out key of a sum, the same for both orders."""
    return f"{min(a, b)}+{max(a, b)}"


def pair(rng: random.Random) -> tuple[int, int]:
    """Two numbers; most often their sum is at most 50, sometimes up to 99."""
    total = rng.randint(0, 50) if rng.random() < 0.75 else rng.randint(0, 99)
    a = rng.randint(0, total)
    return a, total - a


def add_thought(a: int, b: int) -> str:
    """Column by column."""
    ones = a % 10 + b % 10
    carry = ones // 10
    tens = a // 10 + b // 10
    ones_text = f"Ones: {a % 10} + {b % 10} = {ones}."
    return f"{ones_text} Tens: {a // 10} + {b // 10} + {carry} = {tens + carry}."


def add(rng: random.Random) -> Exchange:
    """A sum of two numbers."""
    a, b = pair(rng)
    question = rng.choice(SUM).format(a, b)
    return ask("sum", question, f"{a} + {b} = {a + b}", add_thought(a, b), key=add_key(a, b))
