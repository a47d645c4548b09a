"""What a draw is on a GPU, counted without one: kernels, and memory beside the logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import pytest
from benchmarks.graphs import is_view, primitives

from mlx_lm_server.config import Way
from mlx_lm_server.engine.sizing import SAMPLER_ARRAYS
from mlx_lm_server.protocol import SamplingParams
from mlx_lm_server.runner.backends.choose import choose
from mlx_lm_server.runner.sampling.row_sampling import RowSampling, start_row
from mlx_lm_server.runner.sampling.sampler import Sampler
from mlx_lm_server.runner.sampling.vocabulary import SORTED_AT_ONCE

ROWS, VOCAB = 32, 151_936
GREEDY: dict[str, Any] = {"temperature": 0.0}
# What the Qwen3 family asks for.
USUAL: dict[str, Any] = {"temperature": 0.7, "top_p": 0.8, "top_k": 20}
PENALTIES: dict[str, Any] = {
    "repetition_penalty": 1.1,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.2,
}
ALL: dict[str, Any] = {
    **USUAL,
    **PENALTIES,
    "min_p": 0.01,
    "logit_bias": {7: 1.0, 9: -1.0},
    "bad_words": ((1,), (2, 3)),
    "stop_token_ids": (4,),
    "min_tokens": 30,
}
EIGHT_KINDS = [
    GREEDY,
    {**GREEDY, "repetition_penalty": 1.2},
    USUAL,
    {**USUAL, **PENALTIES},
    {**ALL, "min_p": 0.02},
    {"top_p": 0.9, "min_tokens": 30, "stop_token_ids": (4,)},
    {},
    {"allowed_token_ids": tuple(range(50))},
]
KERNELS: dict[str, tuple[Sequence[dict[str, Any]], int]] = {
    "greedy": ([GREEDY], 1),
    "temperature": ([{}], 5),
    "top_p 0.95": ([{"top_p": 0.95}], 21),
    "top_p 0.5": ([{"top_p": 0.5}], 24),
    "top_p 0.01": ([{"top_p": 0.01}], 33),
    "top_k": ([{"top_k": 20}], 11),
    "top_p and top_k": ([USUAL], 27),
    "greedy with a repetition penalty": ([{**GREEDY, "repetition_penalty": 1.1}], 4),
    "greedy with logit bias": ([{**GREEDY, "logit_bias": {5: 1.0}}], 3),
    "top_p, top_k and penalties": ([{**USUAL, **PENALTIES}], 30),
    "all": ([ALL], 32),
    "half greedy, half top_p": ([GREEDY, {"top_p": 0.95}], 24),
    "eight kinds": (EIGHT_KINDS, 38),
}
MOST_KERNELS, MOST_GREEDY_KERNELS = 40, 3


@pytest.fixture(scope="module")
def logits() -> mx.array:
    made = (mx.random.normal((ROWS, VOCAB)) * 3).astype(mx.bfloat16)
    mx.eval(made)
    return made


def sampler_of(way: Way) -> Sampler:
    return Sampler(VOCAB, choose(way))


def rows_of(kinds: Sequence[dict[str, Any]]) -> list[RowSampling]:
    """As many as a step has, each kind as often as the others."""
    asked = [
        SamplingParams(**{"max_tokens": 99, "seed": seed, **kinds[seed % len(kinds)]})
        for seed in range(ROWS)
    ]
    return [start_row(params, [1, 2, 3], [2, 2, 5], VOCAB) for params in asked]


@pytest.mark.parametrize("way", ["metal", "cuda"])
@pytest.mark.parametrize("name", KERNELS)
def test_kernels_of_a_draw_follow_from_what_is_asked_for_and_not_from_how_many_rows_ask(
    name: str, way: Way, logits: mx.array
) -> None:
    kinds, expected = KERNELS[name]
    sampler, rows = sampler_of(way), rows_of(kinds)
    sampler.sample(logits, rows)  # rows are taken in
    nodes = primitives([sampler.start(logits, rows).tokens])
    num_kernels = sum(count for node, count in nodes.items() if not is_view(node))
    assert num_kernels == expected, nodes
    assert num_kernels <= (MOST_GREEDY_KERNELS if name == "greedy" else MOST_KERNELS)


@pytest.mark.parametrize("name", KERNELS)
def test_no_draw_sorts_the_vocabulary(name: str, logits: mx.array) -> None:
    """A GPU sorts where the largest or a partition are asked for, too."""
    sorted_sizes: list[int] = []

    def spied(function: Callable[..., mx.array]) -> Callable[..., mx.array]:
        def sort(values: mx.array, *rest: Any, **named: Any) -> mx.array:
            sorted_sizes.append(values.shape[-1])
            return function(values, *rest, **named)

        return sort

    names = ("sort", "argsort", "partition", "argpartition", "topk")
    with pytest.MonkeyPatch.context() as patch:
        for each in names:
            patch.setattr(mx, each, spied(getattr(mx, each)))
        sampler_of("metal").start(logits, rows_of(KERNELS[name][0]))
    most = {"top_p 0.5": VOCAB / 16, "top_p 0.01": VOCAB / 3}.get(name, SORTED_AT_ONCE)
    assert max(sorted_sizes, default=0) <= most
    assert bool(sorted_sizes) == any(
        kind.get("top_k") or kind.get("top_p", 1.0) < 1.0 for kind in KERNELS[name][0]
    )


@pytest.mark.parametrize("name", KERNELS)
def test_memory_of_a_draw_is_what_is_reserved_for_it(name: str, logits: mx.array) -> None:
    """Logits, what is kept of the rows, and all that lives until the tokens are there."""
    mx.synchronize()
    mx.clear_cache()
    before = mx.get_active_memory() - logits.nbytes
    sampler, rows = sampler_of("metal"), rows_of(KERNELS[name][0])
    sampler.sample(logits, rows)
    mx.reset_peak_memory()
    for _ in range(3):
        sampler.sample(logits, rows)
    arrays = (mx.get_peak_memory() - before) / (ROWS * VOCAB * 4)
    assert arrays < SAMPLER_ARRAYS
