"""A forced end of the reasoning: exact, whoever shares the batch."""

from __future__ import annotations

import random
from pathlib import Path

import mlx.core as mx
import pytest
from msgspec.structs import replace

from mlx_lm_server.core.thinking import ThinkingClock
from mlx_lm_server.protocol import SamplingParams, ThinkingBudget
from tests.mlx.driver import EngineDriver, random_prompts
from tests.mlx.test_sampler import LOGITS, draw, row
from tests.mlx.tiny_models import VOCAB_SIZE, write_model

END, NEXT = 3, 5
OPEN = ThinkingBudget(6, (1,), (END,), (END, NEXT), True)
NEVER_END = {END: -100.0}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> EngineDriver:
    return EngineDriver(write_model("qwen3", tmp_path_factory.mktemp("thinking")))


@pytest.mark.parametrize(
    "how",
    [
        {"temperature": 0.0},
        {"temperature": 1.5},
        {"top_k": 2, "top_p": 0.5, "min_p": 0.2},
        {"typical_p": 0.3},
        {"xtc_probability": 1.0, "xtc_threshold": 0.05},
        {"repetition_penalty": 1.4, "presence_penalty": 1.0, "logit_bias": {END: -100.0}},
    ],
    ids=str,
)
def test_nothing_keeps_a_forced_token_from_being_drawn(how: dict[str, object]) -> None:
    rows = [row(len(LOGITS), seed=i, **how) for i in range(3)]
    rows[1].thinking = ThinkingClock(replace(OPEN, max_tokens=0))
    assert draw(mx.broadcast_to(mx.array(LOGITS)[None], (3, len(LOGITS))), rows)[1] == END


def jobs(seed: int) -> list[tuple[list[int], SamplingParams]]:
    rng = random.Random(seed)
    prompts = random_prompts(seed, [rng.randrange(1, 80) for _ in range(12)], VOCAB_SIZE)
    return [
        (
            prompt,
            SamplingParams(
                max_tokens=rng.randrange(4, 24),
                seed=i,
                temperature=rng.choice([0.0, 1.2]),
                logit_bias=rng.choice([{}, NEVER_END]),
                thinking=rng.choice([None, replace(OPEN, max_tokens=rng.randrange(8))]),
            ),
        )
        for i, prompt in enumerate(prompts)
    ]


@pytest.mark.parametrize("seed", range(3))
def test_a_budget_is_kept_to_the_token_in_any_batch(engine: EngineDriver, seed: int) -> None:
    wanted = jobs(seed)
    together = engine.run_each(wanted)
    alone = [engine.run_each([job])[0] for job in wanted]
    assert together == alone
    num_forced = 0
    for tokens, (_, sampling) in zip(together, wanted, strict=True):
        budget = sampling.thinking
        if budget is not None and END not in tokens[: budget.max_tokens]:
            forced = tokens[budget.max_tokens :][:2]
            assert forced == [END, NEXT][: len(forced)]
            num_forced += len(forced) == 2
    assert num_forced >= 2


def test_others_are_not_touched(engine: EngineDriver) -> None:
    wanted = jobs(9)
    free = [(prompt, replace(sampling, thinking=None)) for prompt, sampling in wanted]
    with_budgets, without = engine.run_each(wanted), engine.run_each(free)
    for (_, sampling), one, other in zip(wanted, with_budgets, without, strict=True):
        if sampling.thinking is None:
            assert one == other


def test_a_preempted_row_goes_on_with_its_budget(tmp_path: Path) -> None:
    folder = write_model("qwen3", tmp_path)
    roomy, tight = EngineDriver(folder), EngineDriver(folder, max_kv_tokens=900)
    sampling = SamplingParams(
        max_tokens=400,
        seed=1,
        temperature=1.0,
        logit_bias=NEVER_END,
        thinking=replace(OPEN, max_tokens=380),
    )
    prompts = random_prompts(4, (40, 60, 50), VOCAB_SIZE)
    expected = roomy.run(prompts, sampling)
    assert tight.run(prompts, sampling) == expected
    assert tight.core.stats().num_preemptions_total > 0
    assert all(tokens[380:382] == [END, NEXT] for tokens in expected)
