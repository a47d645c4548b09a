"""What the ledger plans is what MLX takes at most: long contexts, many rows, few bits."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import mlx.core as mx
import msgspec
import pytest

from mlx_lm_server.protocol import SamplingParams

from .driver import GREEDY, EngineDriver, random_prompts
from .tiny_models import VOCAB_SIZE, write_model

pytestmark = pytest.mark.each_way

CONTEXT = 3000
MEMORY_BYTES = 96 << 20


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "qwen3"
    return write_model("qwen3", folder, has_wide_heads=True, changes={"num_attention_heads": 8})


def _engine(model: Path, kv_bits: int) -> EngineDriver:
    return EngineDriver(
        model,
        memory_limit_bytes=MEMORY_BYTES,
        kv_bits=kv_bits,
        max_batch_size=4,
        max_num_batched_tokens=512,
        keeps_profile=False,
    )


def _beyond_plan_bytes(engine: EngineDriver, lengths: list[int], sampling: SamplingParams) -> int:
    """How much more MLX took at its peak, of what this engine has, than was planned for weights,
    steps and the K and V that there were."""
    ready = engine.ready
    mx.clear_cache()
    others = mx.get_active_memory() - ready.weights_bytes
    mx.reset_peak_memory()
    for i, prompt in enumerate(random_prompts(5, lengths, VOCAB_SIZE)):
        engine.add(f"r{i}", prompt, msgspec.structs.replace(sampling, seed=i))
    kv_bytes = 0
    while engine.core.has_work:
        engine.step()
        stats = engine.core.stats()
        kv_bytes = max(kv_bytes, stats.kv_used_bytes + stats.kv_cached_bytes)
    planned = ready.memory_limit_bytes - ready.kv_limit_bytes + kv_bytes
    return mx.get_peak_memory() - others - planned


FAR = [CONTEXT, CONTEXT // 2, 700]
SHORT_ANSWERS = msgspec.structs.replace(GREEDY, max_tokens=20)


@pytest.mark.parametrize("kv_bits", [16, 8])
def test_long_contexts_take_no_more_than_was_planned(model: Path, kv_bits: int) -> None:
    engine = _engine(model, kv_bits)
    assert engine.ready.kv_limit_bytes > MEMORY_BYTES // 5, "or the plan is too careful"
    assert _beyond_plan_bytes(engine, FAR, SHORT_ANSWERS) <= 0


def test_chunks_whose_scores_are_computed_are_smaller_far_from_the_start(model: Path) -> None:
    engine = _engine(model, 16)
    scheduler = engine.core._scheduler
    limits = scheduler._limits
    if engine.core._runner.passes_over_holes:  # a kernel of ours computes no scores
        assert limits.max_prefill_pairs == 512 * engine.ready.context_tokens
        return
    assert limits.max_prefill_pairs < 512 * CONTEXT
    scheduler._limits = dataclasses.replace(limits, max_prefill_pairs=math.inf)
    assert _beyond_plan_bytes(engine, FAR, SHORT_ANSWERS) > 0, "as it would be without"


def test_rows_that_ask_for_everything_take_no_more_than_was_planned(model: Path) -> None:
    everything = SamplingParams(
        max_tokens=12,
        seed=1,
        temperature=0.8,
        top_p=0.9,
        top_k=20,
        repetition_penalty=1.1,
        presence_penalty=0.5,
        logit_bias={5: 1.0},
        logprobs=5,
    )
    assert _beyond_plan_bytes(_engine(model, 16), [300] * 4, everything) <= 0
