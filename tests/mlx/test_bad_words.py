"""Words that must not be written, through the engine: exact, whoever shares the batch."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from mlx_lm_server.protocol import SamplingParams
from tests.mlx.driver import EngineDriver, random_prompts
from tests.mlx.tiny_models import VOCAB_SIZE, write_model

Word = tuple[int, ...]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> EngineDriver:
    return EngineDriver(write_model("qwen3", tmp_path_factory.mktemp("words")))


def has(tokens: list[int], word: Word) -> bool:
    starts = range(len(tokens) - len(word) + 1)
    return any(tuple(tokens[i : i + len(word)]) == word for i in starts)


def words_of(tokens: list[int], rng: random.Random) -> tuple[Word, ...]:
    """Some that the row would write."""
    starts = [rng.randrange(len(tokens) - 3) for _ in range(2)]
    return tuple(tuple(tokens[i : i + size]) for i, size in zip(starts, (2, 3), strict=True))


def test_none_is_written_and_a_row_gets_what_it_gets_alone(engine: EngineDriver) -> None:
    rng = random.Random(5)
    prompts = random_prompts(3, [rng.randrange(1, 60) for _ in range(8)], VOCAB_SIZE)
    free = [
        SamplingParams(max_tokens=24, seed=i, temperature=rng.choice([0.0, 1.0]))
        for i in range(len(prompts))
    ]
    before = engine.run_each(list(zip(prompts, free, strict=True)))
    jobs = []
    for number, (prompt, tokens) in enumerate(zip(prompts, before, strict=True)):
        bound = SamplingParams(
            max_tokens=24,
            seed=number,
            temperature=free[number].temperature,
            bad_words=words_of(tokens, rng) if number % 2 else (),
        )
        jobs.append((prompt, bound))
    together = engine.run_each(jobs)
    assert together == [engine.run_each([job])[0] for job in jobs]
    for (_, sampling), tokens, without in zip(jobs, together, before, strict=True):
        assert not any(has(tokens, word) for word in sampling.bad_words)
        assert (tokens == without) is not bool(sampling.bad_words)


def test_a_preempted_row_goes_on_without_its_bad_words(tmp_path: Path) -> None:
    folder = write_model("qwen3", tmp_path)
    roomy, tight = EngineDriver(folder), EngineDriver(folder, max_kv_tokens=900)
    allowed = tuple(range(4))
    words = ((0, 1), (1, 2), (2, 3, 0), (3, 3), (0, 0), (1, 1))
    sampling = SamplingParams(
        max_tokens=400, seed=1, temperature=1.0, allowed_token_ids=allowed, bad_words=words
    )
    prompts = random_prompts(4, (40, 60, 50), VOCAB_SIZE)
    expected = roomy.run(prompts, sampling)
    assert tight.run(prompts, sampling) == expected
    assert tight.core.stats().num_preemptions_total > 0
    for tokens in expected:
        assert set(tokens) <= set(allowed)
        assert not any(has(tokens, word) for word in words)
