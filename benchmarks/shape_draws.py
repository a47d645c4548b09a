"""The draw of a step over a vocabulary of 152k, counted; prints JSON.

    python -m benchmarks.shape_draws CONTENDER

CONTENDER is a way, or `mlx-lm`. Nothing is computed: only graphs are built.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from typing import Any, Literal, cast

import msgspec

from mlx_lm_server.protocol import SamplingParams, Way

NUM_ROWS, VOCAB_SIZE = 32, 151_936
MAX_TOKENS = 100
PROMPT, OUTPUT = tuple(range(10, 60)), tuple(range(100, 120))

Kind = Literal["greedy", "temperature", "penalties", "mixed"]
PENALISED = SamplingParams(
    MAX_TOKENS,
    seed=0,
    temperature=0.7,
    top_p=0.95,
    top_k=40,
    repetition_penalty=1.1,
    presence_penalty=0.5,
    frequency_penalty=0.2,
)
BIASED = msgspec.structs.replace(PENALISED, logit_bias={5: 2.0, 900: -1.0})
GREEDY = SamplingParams(MAX_TOKENS, seed=0, temperature=0.0)
WARM = SamplingParams(MAX_TOKENS, seed=0, temperature=0.7)
# What the rows ask for, in turn.
KINDS: dict[Kind, tuple[SamplingParams, ...]] = {
    "greedy": (GREEDY,),
    "temperature": (WARM,),
    "penalties": (PENALISED,),
    "mixed": (BIASED, GREEDY, WARM, PENALISED),
}

# Gives the tokens that are drawn in one step.
DrawOnce = Callable[[], Any]


class Draws(msgspec.Struct, frozen=True):
    """One step's draw of `NUM_ROWS` rows, with what it counts for the next."""

    kind: Kind
    nodes: int
    kernels: int
    written_bytes: int
    copied_bytes: int
    names: dict[str, int]


def ours(way: Way, params: list[SamplingParams], logits: Any) -> DrawOnce:
    from mlx_lm_server.runner.backends.choose import choose
    from mlx_lm_server.runner.sampling.row_sampling import start_row
    from mlx_lm_server.runner.sampling.sampler import Sampler

    sampler = Sampler(VOCAB_SIZE, choose(way))
    rows = [
        start_row(msgspec.structs.replace(each, seed=seed), PROMPT, OUTPUT, VOCAB_SIZE)
        for seed, each in enumerate(params)
    ]
    return lambda: sampler.start(logits, rows).tokens


def theirs(params: list[SamplingParams], logits: Any) -> DrawOnce:
    """Row by row, as its `BatchGenerator` calls samplers and processors that requests bring."""
    import mlx.core as mx
    from mlx_lm.sample_utils import make_logits_processors, make_sampler

    samplers = [make_sampler(each.temperature, each.top_p, top_k=each.top_k) for each in params]
    processors = [
        make_logits_processors(
            each.logit_bias or None,
            repetition_penalty=each.repetition_penalty if each.repetition_penalty != 1 else None,
            presence_penalty=each.presence_penalty or None,
            frequency_penalty=each.frequency_penalty or None,
        )
        for each in params
    ]
    tokens = mx.array(PROMPT + OUTPUT)
    mx.eval(tokens)

    def draw() -> Any:
        bent = []
        for row, several in enumerate(processors):
            own = logits[row : row + 1]
            for processor in several:
                own = processor(tokens, own)
            bent.append(own)
        joined = mx.concatenate(bent, axis=0) if any(processors) else logits
        logprobs = joined - mx.logsumexp(joined, axis=-1, keepdims=True)
        if all(each == params[0] for each in params):
            return samplers[0](logprobs)
        return mx.concatenate([s(logprobs[e : e + 1]) for e, s in enumerate(samplers)], axis=0)

    return draw


def counted(name: str, kind: Kind) -> Draws:
    """Counts the second of two draws: what the first has left for it is in its graph."""
    import mlx.core as mx

    from benchmarks.graphs import counting, is_view, primitives

    logits = mx.zeros((NUM_ROWS, VOCAB_SIZE), mx.bfloat16)
    mx.eval(logits)
    asked = KINDS[kind]
    params = [asked[row % len(asked)] for row in range(NUM_ROWS)]
    is_theirs = name == "mlx-lm"
    draw = theirs(params, logits) if is_theirs else ours(cast(Way, name), params, logits)
    first = draw()
    before = primitives([first])
    with counting() as counts:
        second = draw()
    nodes: Counter[str] = primitives([first, second]) - before
    kernels = sum(count for node, count in nodes.items() if not is_view(node))
    return Draws(
        kind, nodes.total(), kernels, counts.written_bytes, counts.copied_bytes, dict(nodes)
    )


def main(name: str) -> None:
    import mlx.core as mx

    mx.set_default_device(mx.Device(mx.cpu))
    print(msgspec.json.encode([counted(name, kind) for kind in KINDS]).decode())


if __name__ == "__main__":
    main(*sys.argv[1:])
