"""What is taken from the cache gives the tokens that computing gives, for every kind of state:

pytestmark = pytest.mark.each_way
cold == warm == shared in flight == preempted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from .driver import GREEDY, EngineDriver, random_prompts
from .reference import ReferenceStep, assert_same_tokens
from .tiny_models import VOCAB_SIZE, write_model

# One of each kind of state: latent, windows, full KV, recurrent only, recurrent beside full, and
# both in one layer.
KINDS = ("deepseek_v3", "falcon_h1", "gemma3_text", "llama", "mamba2", "qwen3_next")
# More to the same kinds: fetched and shared KV, sinks, convolution, other ratios of windows.
FAMILIES = (
    *KINDS,
    "gemma2",
    "gemma4_text",
    "glm4_moe_lite",
    "gpt_oss",
    "granitemoehybrid",
    "lfm2",
    "minimax",
    "olmo3",
    "qwen3_5",
)
SCORED = msgspec.structs.replace(GREEDY, logprobs=5)
# Tokens between checkpoints; more where they are large beside the KV of their tokens.
STATE_INTERVALS = {"olmo3": 512}

[SYSTEM, QUESTION, REPLY, LONG] = random_prompts(21, (83, 13, 11, 700), VOCAB_SIZE)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {family: write_model(family, root / family) for family in FAMILIES}


@pytest.fixture(scope="module")
def pairs(models: dict[str, Path]) -> Callable[[str], tuple[EngineDriver, Cold]]:
    """An engine and its reference for each family; tests keep apart by their salts."""
    made: dict[str, tuple[EngineDriver, Cold]] = {}

    def pair(family: str) -> tuple[EngineDriver, Cold]:
        if family not in made:
            engine = EngineDriver(models[family], prefill_step_size=64)
            made[family] = engine, Cold(models[family])
        return made[family]

    return pair


class Cold:
    """Answers of an engine without a cache, with the runners-up for ties."""

    def __init__(self, model: Path, **order: object) -> None:
        self._engine = EngineDriver(model, prefix_cache=False, **order)
        self.num_ties = 0

    def check(self, tokens: list[int], prompt: list[int]) -> None:
        self.check_all([tokens], [prompt])

    def check_all(self, answers: list[list[int]], prompts: list[list[int]]) -> None:
        """The rows share a batch, which gives the same tokens (test_parity)."""
        names = [f"cold-{len(self._engine.tokens)}-{i}" for i in range(len(prompts))]
        for name, prompt, tokens in zip(names, prompts, answers, strict=True):
            params = msgspec.structs.replace(SCORED, max_tokens=len(tokens))
            self._engine.add(name, prompt, params)
        self._engine.finish()
        for name, tokens in zip(names, answers, strict=True):
            self.num_ties += assert_same_tokens(tokens, self._steps(name))
        assert self.num_ties <= 2

    def _steps(self, name: str) -> list[ReferenceStep]:
        scored = zip(self._engine.tokens[name], self._engine.logprobs[name], strict=True)
        return [
            ReferenceStep(token, dict(zip(scores.top_ids, scores.top_logprobs, strict=True)))
            for token, scores in scored
        ]


Pairs = Callable[[str], tuple[EngineDriver, Cold]]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_conversation_computes_only_what_is_new(family: str, pairs: Pairs) -> None:
    engine, cold = pairs(family)
    prompt = [*SYSTEM, *QUESTION]
    for turn in range(3):
        engine.add(f"turn-{turn}", prompt, cache_salt="conversation")
        engine.finish()
        answer = engine.tokens[f"turn-{turn}"]
        cold.check(answer, prompt)
        report = engine.reports[f"turn-{turn}"]
        assert report.num_prompt_tokens == len(prompt)
        if turn:
            # The last token of an answer is never computed; all before it is remembered.
            assert report.num_cached_tokens == len(prompt) - len(REPLY) - 1, report
        prompt = [*prompt, *answer, *REPLY]


@pytest.mark.parametrize("family", KINDS)
def test_a_long_prompt_with_a_short_answer_is_remembered(family: str, pairs: Pairs) -> None:
    engine, cold = pairs(family)
    short = msgspec.structs.replace(GREEDY, max_tokens=2)
    engine.add("long", LONG, short, cache_salt="long")
    engine.finish()
    for name, prompt, least in (
        ("again", LONG, len(LONG) - 17),
        ("longer", [*LONG, *QUESTION], len(LONG) - 17),
        ("parts", [*LONG[:600], *QUESTION], 600 - STATE_INTERVALS.get(family, 256)),
    ):
        engine.add(name, prompt, cache_salt="long")
        engine.finish()
        assert engine.reports[name].num_cached_tokens >= least, engine.reports[name]
        cold.check(engine.tokens[name], prompt)


@pytest.mark.parametrize("family", [*KINDS, "olmo3"])
def test_a_short_prompt_with_a_long_answer_is_remembered(family: str, pairs: Pairs) -> None:
    engine, cold = pairs(family)
    long = msgspec.structs.replace(GREEDY, max_tokens=300)
    engine.add("short", QUESTION, long, cache_salt="short")
    engine.finish()
    prompt = [*QUESTION, *engine.tokens["short"]]
    for name, text, least in (
        ("whole", [*prompt, *REPLY], len(prompt) - 1),
        ("middle", [*prompt[:290], *REPLY], 290 - STATE_INTERVALS.get(family, 256)),
    ):
        engine.add(name, text, cache_salt="short")
        engine.finish()
        assert engine.reports[name].num_cached_tokens >= least, engine.reports[name]
        cold.check(engine.tokens[name], text)


@pytest.mark.parametrize("family", KINDS)
def test_requests_in_flight_share_what_one_of_them_computes(family: str, pairs: Pairs) -> None:
    engine, cold = pairs(family)
    before = engine.core.stats().prefill_tokens_total
    prompts = [[*LONG[:300], *tail] for tail in random_prompts(5, (9, 30, 1, 17), VOCAB_SIZE)]
    for i, prompt in enumerate(prompts):
        engine.add(f"r{i}", prompt, message_ends=[300], cache_salt="flight")
    engine.finish()
    computed = engine.core.stats().prefill_tokens_total - before
    assert computed <= 1.05 * 300 + sum(len(p) - 300 for p in prompts) + 16 * len(prompts)
    for i, prompt in enumerate(prompts):
        cold.check(engine.tokens[f"r{i}"], prompt)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3_next", "deepseek_v3"])
def test_the_next_takes_over_when_who_computes_is_aborted(family: str, pairs: Pairs) -> None:
    engine, cold = pairs(family)
    prompts = [[*LONG[:300], *tail] for tail in random_prompts(6, (9, 30), VOCAB_SIZE)]
    engine.add("owner", [*LONG[:300], 1, 2], cache_salt="owner")
    for i, prompt in enumerate(prompts):
        engine.add(f"heir{i}", prompt, cache_salt="owner")
    for _ in range(3):
        engine.step()
    engine.abort("owner")
    engine.finish()
    for i, prompt in enumerate(prompts):
        cold.check(engine.tokens[f"heir{i}"], prompt)


@pytest.mark.parametrize("family", ["llama", "qwen3_next"])
def test_preempted_requests_go_on_with_the_same_tokens(
    family: str, models: dict[str, Path], pairs: Pairs
) -> None:
    unhurried, cold = pairs(family)
    prompts = random_prompts(31, (100, 90, 110), VOCAB_SIZE)
    params = msgspec.structs.replace(GREEDY, max_tokens=290)
    # Room for three rows as they come, with 256 tokens to spare, but not for one that grows.
    geometry = unhurried.core.geometry
    room = 3 * (geometry.row_bytes(384) - geometry.bytes_per_row)
    limit = room // geometry.bytes_per_token + 1 if geometry.bytes_per_token else None
    engine = EngineDriver(models[family], max_kv_tokens=limit, max_batch_size=3)
    for i, prompt in enumerate(prompts):
        engine.add(f"r{i}", prompt, params)
    engine.finish()
    cold.check_all([engine.tokens[f"r{i}"] for i in range(3)], prompts)
    if limit is not None:
        assert engine.core.stats().num_preemptions_total


def test_salts_do_not_share(pairs: Pairs) -> None:
    engine, _ = pairs("llama")
    for name, salt in (("a", ""), ("b", "s"), ("c", "s")):
        engine.add(name, [*SYSTEM, *QUESTION], cache_salt=salt)
        engine.finish()
    cached = [engine.reports[name].num_cached_tokens for name in "abc"]
    assert cached == [0, 0, len(SYSTEM) + len(QUESTION) - 1]
