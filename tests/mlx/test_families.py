"""Every kind of layer state gives mlx-lm's own greedy tokens: alone, in a ragged batch, in chunks,
with rows that join and leave, and past the end of a window."""

from __future__ import annotations

from pathlib import Path

import pytest

from .driver import GREEDY, EngineDriver, random_prompts
from .hand_plans import HandPlans, HandRow
from .reference import ReferenceStep, assert_same_tokens, run_jobs
from .tiny_models import VOCAB_SIZE, write_model

# How each family has to be run, or better.
FAMILIES = {
    "cohere2": "packed",
    "deepseek_v3": "split",
    "deepseek_v32": "split",
    "falcon_h1": "split",
    "gemma2": "split",
    "gemma3_text": "packed",
    "gemma4_text": "packed",
    "glm4_moe_lite": "split",
    "gpt_oss": "packed",
    "granitemoehybrid": "split",
    "lfm2": "split",
    "llama": "packed",
    "llama4": "alone",
    "llama4_text": "packed",
    "mamba2": "split",
    "minicpm3": "packed",
    "minimax": "packed",
    "olmo2": "packed",
    "olmo3": "packed",
    "qwen3_5": "split",
    "qwen3_5_moe": "split",
    "qwen3_next": "split",
}
# One of each kind: rings in packed tokens, sinks, shared KV, fetched KV, state, both in one layer.
KINDS = ("gemma3_text", "gpt_oss", "gemma4_text", "deepseek_v3", "qwen3_next", "baichuan_m1")
PROMPTS = random_prompts(11, (1, 17, 40, 90, 3), VOCAB_SIZE)
LONG_PROMPTS = random_prompts(12, (530, 23), VOCAB_SIZE)
SHORT_PROMPTS = PROMPTS[:3]

Reference = dict[str, list[list[ReferenceStep]]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {family: write_model(family, root / family) for family in {*FAMILIES, *KINDS}}


@pytest.fixture(scope="module")
def reference(models: dict[str, Path]) -> Reference:
    """mlx-lm's own tokens for all models, from one process."""
    common = {"float32": True, "num_tokens": GREEDY.max_tokens}
    jobs = {}
    for f in models:
        jobs[f] = common | {"model": str(models[f]), "prompts": PROMPTS}
        jobs[f"{f}-long"] = common | {"model": str(models[f]), "prompts": LONG_PROMPTS}
    return dict(zip(jobs, run_jobs(list(jobs.values())), strict=True))


def _assert_all(actual: list[list[int]], expected: list[list[ReferenceStep]]) -> None:
    ties = sum(assert_same_tokens(a, e) for a, e in zip(actual, expected, strict=True))
    print(f"ties: {ties} of {len(actual)} sequences")
    assert ties <= 1


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_rows_alone_together_and_among_strangers_give_mlx_lms_tokens(
    family: str, models: dict[str, Path], reference: Reference
) -> None:
    engine = EngineDriver(models[family], max_batch_size=6)
    assert engine.ready.batching == FAMILIES[family], engine.ready.batching_reason
    _assert_all(engine.run(PROMPTS), reference[family])
    _assert_all([engine.run([prompt])[0] for prompt in PROMPTS[2:4]], reference[family][2:4])
    strangers = random_prompts(2, (2, 30, 5, 61, 9, 33, 4, 12, 70, 1), VOCAB_SIZE)
    for i, prompt in enumerate(PROMPTS):
        engine.add(f"kept-{i}", prompt)
    for i, prompt in enumerate(strangers):
        engine.add(f"stranger-{i}", prompt)
        engine.step()
        engine.step()
        engine.abort(f"stranger-{i}")
    engine.finish()
    _assert_all([engine.tokens[f"kept-{i}"] for i in range(len(PROMPTS))], reference[family])
    assert engine.core.stats().kv_used_bytes == 0


@pytest.mark.parametrize("chunk", [1, 7, 16, 512])
@pytest.mark.parametrize("family", KINDS)
def test_prompts_cut_into_chunks_give_the_same_tokens(
    family: str, chunk: int, models: dict[str, Path], reference: Reference
) -> None:
    engine = EngineDriver(models[family], prefill_step_size=chunk)
    if chunk >= 16:
        _assert_all(engine.run(LONG_PROMPTS), reference[f"{family}-long"])
    _assert_all(engine.run(SHORT_PROMPTS), reference[family][:3])


@pytest.mark.parametrize("family", sorted({*FAMILIES, *KINDS}))
def test_all_sizes_of_chunks_and_tokens_taken_back_leave_every_row_its_tokens(
    family: str, models: dict[str, Path], reference: Reference
) -> None:
    """Rows that run alone are not asked to give tokens back."""
    plans = HandPlans(models[family], max_rows=5)
    can_take_back = plans.runner.batching != "alone"
    rows = [
        HandRow(0, 0, LONG_PROMPTS[0], 512, takes_back=can_take_back),
        HandRow(1, 0, PROMPTS[3], 16, takes_back=can_take_back),
        HandRow(1, 1, PROMPTS[2], 7),
        HandRow(1, 2, PROMPTS[1], 1, takes_back=can_take_back),
        HandRow(0, 1, LONG_PROMPTS[1], 7),
    ]
    plans.run(rows, GREEDY.max_tokens)
    long, short = reference[f"{family}-long"], reference[family]
    _assert_all([row.tokens for row in rows], [long[0], short[3], short[2], short[1], long[1]])
