"""The self-test: the same requests alone, together and once more, where the cache has them. The
tokens have to be the same."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from random import Random
from time import perf_counter

from mlx_lm_server.commands.doctor.findings import Finding, note, wrong
from mlx_lm_server.commands.doctor.probed_engine import Answer
from mlx_lm_server.protocol import AddRequest, Ready, SamplingParams

PROMPT_TOKENS = (24, 70, 9, 130)
ANSWER_TOKENS = 24
# Rows that share a forward, or begin elsewhere in it, may be rounded otherwise. Where the two
# likeliest tokens lie closer than this, in nats, that may decide between them.
EXACT_TIE, ROUNDED_TIE = 0.001, 0.5
ASK_FOR_HELP = "please file a bug with `mlx-lm-server doctor --report`"

Ask = Callable[[Sequence[AddRequest]], Awaitable[list[Answer]]]


@dataclass(frozen=True)
class Run:
    """Answers to all prompts, and how long they took."""

    answers: list[Answer]
    seconds: float

    @property
    def num_cached_tokens(self) -> int:
        return sum(answer.cache.num_cached_tokens for answer in self.answers if answer.cache)


@dataclass(frozen=True)
class Comparison:
    """How two runs agree. An answer counts up to its first token that differs; `widest_gap` is how
    far apart the two likeliest tokens were there, in nats, at most."""

    num_tokens: int
    num_equal: int
    widest_gap: float | None = None


@dataclass(frozen=True)
class SelfTest:
    """`alone` is also the run that finds nothing in the cache."""

    alone: Run
    together: Run
    cached: Run

    def findings(self, ready: Ready) -> list[Finding]:
        tie = EXACT_TIE if _is_exact(ready) else ROUNDED_TIE
        times = f"{self.alone.seconds:.1f} s alone, {self.together.seconds:.1f} s together"
        batched = judged(
            "batched as alone", compare(self.alone, self.together), times, tie, "--max-batch-size 1"
        )
        found = self.cached.num_cached_tokens
        times = (
            f"{found} of {sum(PROMPT_TOKENS)} prompt tokens from the cache, "
            f"{self.alone.seconds:.1f} s cold, {self.cached.seconds:.1f} s cached"
        )
        comparison = compare(self.alone, self.cached)
        cached = judged("cached as cold", comparison, times, tie, "--no-prefix-cache")
        return [batched, cached]


async def self_test(ask: Ask, vocab_size: int) -> SelfTest:
    """Raises EngineError where the engine fails."""
    alone = await _one_by_one(ask, vocab_size, "alone")
    begun_s = perf_counter()
    together = await ask([_request(i, vocab_size, "together") for i in range(len(PROMPT_TOKENS))])
    batched = Run(together, perf_counter() - begun_s)
    return SelfTest(alone, batched, await _one_by_one(ask, vocab_size, "cached", salt="alone"))


async def _one_by_one(ask: Ask, vocab_size: int, name: str, salt: str = "") -> Run:
    begun_s = perf_counter()
    answers: list[Answer] = []
    for index in range(len(PROMPT_TOKENS)):
        answers += await ask([_request(index, vocab_size, name, salt or name)])
    return Run(answers, perf_counter() - begun_s)


def _request(index: int, vocab_size: int, name: str, salt: str = "") -> AddRequest:
    """Returns a greedy request over random ids. It finds only what requests of its salt left."""
    rng = Random(index)
    num_tokens = PROMPT_TOKENS[index]
    prompt = [rng.randrange(vocab_size // 16, vocab_size) for _ in range(num_tokens)]
    return AddRequest(
        f"{name}-{index}",
        prompt,
        SamplingParams(ANSWER_TOKENS, seed=index, temperature=0.0, logprobs=2),
        cache_salt=salt or name,
        message_ends=[num_tokens // 2],
    )


def compare(reference: Run, other: Run) -> Comparison:
    num_equal = 0
    gaps = []
    for ours, theirs in zip(reference.answers, other.answers, strict=True):
        place = _first_difference(ours.token_ids, theirs.token_ids)
        num_equal += len(ours.token_ids) if place is None else place
        if place is not None:
            gaps.append(_gap(ours, place))
    num_tokens = sum(len(answer.token_ids) for answer in reference.answers)
    return Comparison(num_tokens, num_equal, max(gaps, default=None))


def _first_difference(ours: Sequence[int], theirs: Sequence[int]) -> int | None:
    if ours == theirs:
        return None
    pairs = zip(ours, theirs, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(theirs)))


def _gap(answer: Answer, place: int) -> float:
    """Returns how much likelier the first token was than the second; infinite where nobody says."""
    if place >= len(answer.logprobs) or len(answer.logprobs[place].top_logprobs) < 2:
        return float("inf")
    first, second = answer.logprobs[place].top_logprobs[:2]
    return first - second


def judged(subject: str, found: Comparison, times: str, tie: float, way_out: str) -> Finding:
    """Returns what a comparison means: differing by rounding is no fault."""
    if found.widest_gap is None:
        return Finding(subject, f"all of {found.num_tokens} tokens equal, {times}")
    words = f"{found.num_equal} of {found.num_tokens} tokens equal before answers differ, {times}"
    if found.widest_gap < tie:
        return note(subject, f"{words}; where they differ, two tokens were as likely")
    return wrong(subject, words, f"until it is repaired: {way_out}; {ASK_FOR_HELP}")


def _is_exact(ready: Ready) -> bool:
    return ready.weights.startswith("float32") and ready.kv_bits == 16
