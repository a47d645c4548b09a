"""16-bit weights served as they are give the tokens that mlx-lm gives with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from .driver import GREEDY, EngineDriver, random_prompts
from .reference import ReferenceStep, assert_same_tokens, run_jobs
from .tiny_models import VOCAB_SIZE, write_model

# Full KV, fetched KV, a window, shared KV, MLA, recurrent state of three kinds. MLX multiplies by
# experts in float32 only on a CPU, so none of them has any.
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": {},
    "gemma2": {},
    "gemma3_text": {},
    "gemma4_text": {},
    "deepseek_v3": {"first_k_dense_replace": 4},
    "qwen3_5": {},
    "lfm2": {},
    "falcon_h1": {},
}
PROMPTS = random_prompts(21, (5, 17, 40, 1, 90), VOCAB_SIZE)
# One step of bfloat16 between 4 and 8, where the highest logits are.
TOLERANCE = 1 / 32

Reference = dict[str, list[list[ReferenceStep]]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("half")
    return {
        family: write_model(family, root / family, dtype=mx.bfloat16, changes=changes)
        for family, changes in FAMILIES.items()
    }


@pytest.fixture(scope="module")
def reference(models: dict[str, Path]) -> Reference:
    jobs = [
        {
            "model": str(folder),
            "float32": False,
            "prompts": PROMPTS,
            "num_tokens": GREEDY.max_tokens,
        }
        for folder in models.values()
    ]
    return dict(zip(models, run_jobs(jobs), strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_weights_give_mlx_lms_tokens_alone_and_together(
    family: str, models: dict[str, Path], reference: Reference
) -> None:
    engine = EngineDriver(models[family], cpu_weights="native")
    assert (engine.ready.weights, engine.ready.kv_format) == ("bfloat16", "bfloat16")
    assert engine.ready.batching != "alone", engine.ready.batching_reason
    answers = engine.run(PROMPTS) + [engine.run([prompt])[0] for prompt in PROMPTS[:3]]
    expected = reference[family] + reference[family][:3]
    ties = sum(
        assert_same_tokens(ours, theirs, TOLERANCE)
        for ours, theirs in zip(answers, expected, strict=True)
    )
    print(f"ties: {ties} of {len(answers)} sequences")
    assert ties < len(answers)


def test_float16_weights_are_served_as_they_are_too(tmp_path: Path) -> None:
    folder = write_model("qwen3", tmp_path / "qwen3", dtype=mx.float16)
    engine = EngineDriver(folder, cpu_weights="native")
    assert (engine.ready.weights, engine.ready.kv_format) == ("float16", "float16")
    job = {"model": str(folder), "float32": False, "prompts": PROMPTS[:3], "num_tokens": 24}
    for ours, theirs in zip(engine.run(PROMPTS[:3]), run_jobs([job])[0], strict=True):
        assert_same_tokens(ours, theirs, TOLERANCE)
