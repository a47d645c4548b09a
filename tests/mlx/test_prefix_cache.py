"""What is taken from the cache gives the tokens that computing gives, for every kind of state:
cold == warm == shared in flight == preempted."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from .driver import GREEDY, EngineDriver, random_prompts
from .reference import ReferenceStep, assert_same_tokens
from .tiny_models import VOCAB_SIZE, write_model

FAMILIES = (
    "deepseek_v3",
    "falcon_h1",
    "gemma2",
    "gemma3_text",
    "gemma4_text",
    "glm4_moe_lite",
    "gpt_oss",
    "granitemoehybrid",
    "lfm2",
    "llama",
    "mamba2",
    "minimax",
    "olmo3",
    "qwen3_5",
    "qwen3_next",
)
SCORED = msgspec.structs.replace(GREEDY, logprobs=5)
# Tokens between checkpoints; more where they are large beside the KV of their tokens.
STATE_INTERVALS = {"olmo3": 512}

[SYSTEM, QUESTION, REPLY, LONG] = random_prompts(21, (83, 13, 11, 700), VOCAB_SIZE)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {family: write_model(family, root / family) for family in FAMILIES}


class Cold:
    """Answers of an engine without a cache, with the runners-up for ties."""

    def __init__(self, model: Path, **order: object) -> None:
        self._engine = EngineDriver(model, prefix_cache=False, **order)
        self.num_ties = 0

    def answer(self, prompt: list[int], num_tokens: int = GREEDY.max_tokens) -> list[ReferenceStep]:
        name = f"cold-{len(self._engine.tokens)}"
        params = msgspec.structs.replace(SCORED, max_tokens=num_tokens)
        self._engine.add(name, prompt, params)
        self._engine.finish()
        tokens = self._engine.tokens[name]
        return [
            ReferenceStep(token, dict(zip(scores.top_ids, scores.top_logprobs, strict=True)))
            for token, scores in zip(tokens, self._engine.scores[name], strict=True)
        ]

    def check(self, tokens: list[int], prompt: list[int]) -> None:
        self.num_ties += assert_same_tokens(tokens, self.answer(prompt, len(tokens)))
        assert self.num_ties <= 1


@pytest.mark.parametrize("family", FAMILIES)
def test_a_conversation_computes_only_what_is_new(family: str, models: dict[str, Path]) -> None:
    engine, cold = EngineDriver(models[family]), Cold(models[family])
    prompt = [*SYSTEM, *QUESTION]
    for turn in range(4):
        engine.add(f"turn-{turn}", prompt)
        engine.finish()
        answer = engine.tokens[f"turn-{turn}"]
        cold.check(answer, prompt)
        report = engine.reports[f"turn-{turn}"]
        assert report.num_prompt_tokens == len(prompt)
        if turn:
            # The last token of an answer is never computed; all before it is remembered.
            assert report.num_cached_tokens == len(prompt) - len(REPLY) - 1, report
        prompt = [*prompt, *answer, *REPLY]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_long_prompt_with_a_short_answer_is_remembered(
    family: str, models: dict[str, Path]
) -> None:
    engine, cold = EngineDriver(models[family], prefill_step_size=190), Cold(models[family])
    short = msgspec.structs.replace(GREEDY, max_tokens=2)
    engine.add("first", LONG, short)
    engine.finish()
    for name, prompt, least in (
        ("again", LONG, len(LONG) - 17),
        ("longer", [*LONG, *QUESTION], len(LONG) - 17),
        ("parts", [*LONG[:600], *QUESTION], 600 - STATE_INTERVALS.get(family, 256)),
    ):
        engine.add(name, prompt)
        engine.finish()
        assert engine.reports[name].num_cached_tokens >= least, engine.reports[name]
        cold.check(engine.tokens[name], prompt)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_short_prompt_with_a_long_answer_is_remembered(
    family: str, models: dict[str, Path]
) -> None:
    engine, cold = EngineDriver(models[family]), Cold(models[family])
    engine.add("first", QUESTION, msgspec.structs.replace(GREEDY, max_tokens=300))
    engine.finish()
    prompt = [*QUESTION, *engine.tokens["first"]]
    for name, text, least in (
        ("whole", [*prompt, *REPLY], len(prompt) - 1),
        ("middle", [*prompt[:290], *REPLY], 290 - STATE_INTERVALS.get(family, 256)),
    ):
        engine.add(name, text)
        engine.finish()
        assert engine.reports[name].num_cached_tokens >= least, engine.reports[name]
        cold.check(engine.tokens[name], text)


@pytest.mark.parametrize("family", FAMILIES)
def test_requests_in_flight_share_what_one_of_them_computes(
    family: str, models: dict[str, Path]
) -> None:
    engine, cold = EngineDriver(models[family], prefill_step_size=64), Cold(models[family])
    prompts = [[*LONG[:300], *tail] for tail in random_prompts(5, (9, 30, 1, 17), VOCAB_SIZE)]
    for i, prompt in enumerate(prompts):
        engine.add(f"r{i}", prompt, message_ends=[300])
    computed = 0
    while engine.core.has_work:
        engine.step()
    computed = engine.core.stats().prefill_tokens_total
    assert computed <= 1.05 * 300 + sum(len(p) - 300 for p in prompts) + 16 * len(prompts)
    for i, prompt in enumerate(prompts):
        cold.check(engine.tokens[f"r{i}"], prompt)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3_next", "deepseek_v3"])
def test_the_next_takes_over_when_who_computes_is_aborted(
    family: str, models: dict[str, Path]
) -> None:
    engine, cold = EngineDriver(models[family], prefill_step_size=32), Cold(models[family])
    prompts = [[*LONG[:300], *tail] for tail in random_prompts(6, (9, 30), VOCAB_SIZE)]
    engine.add("owner", [*LONG[:300], 1, 2])
    for i, prompt in enumerate(prompts):
        engine.add(f"r{i}", prompt)
    for _ in range(4):
        engine.step()
    engine.abort("owner")
    engine.finish()
    for i, prompt in enumerate(prompts):
        cold.check(engine.tokens[f"r{i}"], prompt)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3_next"])
def test_preempted_requests_go_on_with_the_same_tokens(
    family: str, models: dict[str, Path]
) -> None:
    cold = Cold(models[family])
    prompts = random_prompts(31, (100, 90, 110), VOCAB_SIZE)
    params = msgspec.structs.replace(GREEDY, max_tokens=300)
    # Room for three rows as they come, with 256 tokens to spare, but not for one that grows.
    geometry = EngineDriver(models[family]).core.geometry
    room = 3 * (geometry.row_bytes(384) - geometry.bytes_per_row)
    limit = room // geometry.bytes_per_token + 1 if geometry.bytes_per_token else None
    engine = EngineDriver(models[family], max_kv_tokens=limit, max_batch_size=3)
    for i, prompt in enumerate(prompts):
        engine.add(f"r{i}", prompt, params)
    engine.finish()
    for i, prompt in enumerate(prompts):
        cold.check(engine.tokens[f"r{i}"], prompt)
    if limit is not None:
        assert engine.core.stats().num_preemptions_total


def test_salts_do_not_share(models: dict[str, Path]) -> None:
    engine = EngineDriver(models["llama"])
    for name, salt in (("a", ""), ("b", "s"), ("c", "s")):
        engine.add(name, [*SYSTEM, *QUESTION], cache_salt=salt)
        engine.finish()
    cached = [engine.reports[name].num_cached_tokens for name in "abc"]
    assert cached == [0, 0, len(SYSTEM) + len(QUESTION) - 1]
