"""What each workload asks for: pure, and the same for the same seed, workload and round.

Every prompt is made of words drawn for this round only, so no cache of an earlier round helps,
except where sharing a prefix is the point of the workload.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from random import Random
from typing import Any

from mlx_lm_server.bench.client import Call
from mlx_lm_server.bench.words import make_text

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
GREEDY: dict[str, Any] = {"temperature": 0.0}

MIXED_PROMPT_SCALES = (0.25, 0.5, 0.75, 1.0, 1.0, 1.25, 1.5, 1.75)
MIXED_OUTPUT_SCALES = (0.5, 0.75, 1.0, 1.0, 1.25, 1.5)


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes, in tokens and counts. `num_requests` is what each client of a closed loop sends."""

    prompt_tokens: int = 128
    output_tokens: int = 64
    num_requests: int = 2
    long_prompt_tokens: int = 3000
    decoder_tokens: int = 1024
    shared_tokens: int = 512
    turns: int = 5
    answer_tokens: int = 256  # of each turn of a conversation
    idle_samples: int = 6
    busy_samples: int = 12


@dataclass(frozen=True, slots=True)
class Calibration:
    """How many tokens the target makes of our words."""

    tokens_per_word: float = 1.0
    overhead_tokens: float = 0.0

    def num_words(self, num_tokens: int) -> int:
        return max(1, round((num_tokens - self.overhead_tokens) / self.tokens_per_word))


@dataclass(frozen=True, slots=True)
class Maker:
    """Makes the calls of one round of one workload."""

    rng: Random
    shape: Shape
    calibration: Calibration

    def text(self, num_tokens: int) -> str:
        return make_text(self.rng, self.calibration.num_words(num_tokens))

    def completion(
        self,
        role: str,
        prompt_tokens: int | None = None,
        max_tokens: int | None = None,
        sampling: dict[str, Any] = GREEDY,
    ) -> Call:
        prompt = self.text(prompt_tokens or self.shape.prompt_tokens)
        tokens = max_tokens or self.shape.output_tokens
        return Call(role, COMPLETIONS, tokens, {"prompt": prompt, **sampling})

    def decoders(self) -> Callable[[], Call]:
        """A source of long-running background requests."""
        return lambda: self.completion("decoder", max_tokens=self.shape.decoder_tokens)


def make_maker(
    seed: int,
    workload: str,
    round_index: int,
    shape: Shape,
    calibration: Calibration,
    deal: int = 0,
) -> Maker:
    """Makers of another `deal` draw other words for the same round."""
    source = f"{seed}/{workload}/{round_index}" + (f"/{deal}" if deal else "")
    return Maker(Random(source), shape, calibration)


@dataclass(frozen=True, slots=True)
class ClosedLoop:
    """Each client sends its next call when the one before has ended."""

    clients: tuple[tuple[Call, ...], ...]


@dataclass(frozen=True, slots=True)
class Newcomers:
    """Calls alone, then `beside` decoders: each newcomer after a pause, so that it falls anywhere
    within a step."""

    idle: tuple[Call, ...]
    decoders: Callable[[], Call]
    beside: int
    busy: tuple[tuple[float, Call], ...]


@dataclass(frozen=True, slots=True)
class SharedPrefix:
    """One call computes the prefix, then all others that begin with it come at once."""

    first: Call
    others: tuple[Call, ...]


@dataclass(frozen=True, slots=True)
class Conversation:
    """User messages; each is sent with all that was said before, the model's answers included."""

    system: str
    turns: tuple[str, ...]
    max_tokens: int

    def call(self, messages: list[dict[str, str]]) -> Call:
        return Call("turn", CHAT, self.max_tokens, {"messages": messages, **GREEDY})


def closed_loop(num_clients: int) -> Callable[[Maker], ClosedLoop]:
    def plan(make: Maker) -> ClosedLoop:
        def calls() -> tuple[Call, ...]:
            return tuple(make.completion("client") for _ in range(make.shape.num_requests))

        return ClosedLoop(tuple(calls() for _ in range(num_clients)))

    return plan


def mixed(make: Maker, num_clients: int = 16) -> ClosedLoop:
    """Lengths are dealt like cards: every round has the same ones, in another order."""
    num_calls = num_clients * make.shape.num_requests
    prompts = _deal(make, MIXED_PROMPT_SCALES, make.shape.prompt_tokens, num_calls)
    outputs = _deal(make, MIXED_OUTPUT_SCALES, make.shape.output_tokens, num_calls)

    def call() -> Call:
        return make.completion("client", next(prompts), next(outputs), _own_sampling(make.rng))

    def client() -> tuple[Call, ...]:
        return tuple(call() for _ in range(make.shape.num_requests))

    return ClosedLoop(tuple(client() for _ in range(num_clients)))


def _deal(make: Maker, scales: tuple[float, ...], tokens: int, num_cards: int) -> Iterator[int]:
    cards = [max(1, round(scales[i % len(scales)] * tokens)) for i in range(num_cards)]
    make.rng.shuffle(cards)
    return iter(cards)


def _own_sampling(rng: Random) -> dict[str, Any]:
    return {
        "temperature": round(rng.uniform(0.5, 1.2), 2),
        "top_p": round(rng.uniform(0.8, 0.98), 2),
        "seed": rng.randrange(2**31),
    }


def long_prompt(make: Maker) -> Newcomers:
    def call(role: str) -> Call:
        return make.completion(role, make.shape.long_prompt_tokens, max_tokens=8)

    return Newcomers((call("idle"),), make.decoders(), 4, ((0.0, call("busy")),))


def ttft(make: Maker) -> Newcomers:
    def call(role: str) -> Call:
        return make.completion(role, max_tokens=4)

    idle = tuple(call("idle") for _ in range(make.shape.idle_samples))
    busy = tuple((make.rng.uniform(0.0, 0.2), call("busy")) for _ in range(make.shape.busy_samples))
    return Newcomers(idle, make.decoders(), 8, busy)


def shared_prefix(make: Maker, num_clients: int = 8) -> SharedPrefix:
    prefix = make.text(make.shape.shared_tokens)

    def call(role: str) -> Call:
        body = {"prompt": prefix + make.text(32), **GREEDY}
        return Call(role, COMPLETIONS, make.shape.output_tokens, body)

    return SharedPrefix(call("first"), tuple(call("other") for _ in range(num_clients)))


def conversation(make: Maker) -> Conversation:
    turns = tuple(make.text(make.shape.prompt_tokens // 2) for _ in range(make.shape.turns))
    return Conversation(make.text(make.shape.prompt_tokens), turns, make.shape.answer_tokens)


def probes(seed: int) -> Iterator[Call]:
    """Short calls of growing length, by which a target is warmed up and its tokens counted."""
    rng = Random(f"{seed}/probe")
    for step in count(1):
        body = {"prompt": make_text(rng, 64 * step), **GREEDY}
        yield Call("probe", COMPLETIONS, 4, body)
