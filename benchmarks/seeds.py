"""Whether a request gets the same tokens in any batch: `python -m benchmarks.seeds MIXES`.

Each mix has other mates: their number, when they come, their prompts, and what they ask of the
sampler. Prints JSON. A program of its own, since the BLAS must be there before mlx.
"""

from __future__ import annotations

import json
import sys
from random import Random

import msgspec

from mlx_lm_server.protocol import AddRequest, LoadModel, SamplingParams, ThinkingBudget
from mlx_lm_server.runner.backends import blas
from mlx_lm_server.server.models.model_files import NANO_FOLDER

VOCAB = (100, 3000)
MAX_MATES = 15
OUTPUT_TOKENS = 40


def prompt(rng: Random, most: int) -> list[int]:
    return [rng.randrange(*VOCAB) for _ in range(rng.randrange(1, most))]


def sampling(rng: Random, max_tokens: int) -> SamplingParams:
    """Anything that a client may ask for."""
    thinking = ThinkingBudget(rng.randrange(20), (3064,), (3065,), (3065,), True)
    return SamplingParams(
        max_tokens,
        seed=rng.getrandbits(64),
        temperature=rng.choice([0.0, 0.3, 0.8, 1.0, 1.5]),
        top_p=rng.choice([1.0, 0.95, 0.6]),
        top_k=rng.choice([0, 0, 5, 50]),
        min_p=rng.choice([0.0, 0.0, 0.05]),
        presence_penalty=rng.choice([0.0, 0.0, 1.0]),
        frequency_penalty=rng.choice([0.0, 0.0, 0.5]),
        repetition_penalty=rng.choice([1.0, 1.0, 1.2]),
        logit_bias=rng.choice([{}, {}, {rng.randrange(*VOCAB): 5.0}]),
        typical_p=rng.choice([1.0, 1.0, 0.8]),
        xtc_probability=rng.choice([0.0, 0.0, 0.5]),
        logprobs=rng.choice([None, None, 3]),
        thinking=rng.choice([None, None, thinking]),
    )


def main(num_mixes: int) -> None:
    chosen = blas.preload()
    from mlx_lm_server.engine.assembly import assemble

    core, _ = assemble(LoadModel(str(NANO_FOLDER)), chosen, lambda _stage, _fraction: None)

    def run(target: AddRequest, mates: list[tuple[int, AddRequest]]) -> list[int]:
        """Its tokens; mates come at their step."""
        tokens: list[int] = []
        core.handle([target])
        step = 0
        waiting = sorted(mates, key=lambda mate: mate[0])
        while core.has_work or waiting:
            while waiting and waiting[0][0] <= step:
                core.handle([waiting.pop(0)[1]])
            for output in core.step():
                if output.req_id == target.req_id:
                    tokens += output.token_ids
            step += 1
        return tokens

    num_same = num_rows = 0
    for mix in range(num_mixes):
        rng = Random(mix)
        target = AddRequest("target", prompt(rng, 300), sampling(rng, OUTPUT_TOKENS))
        mates = [
            (rng.randrange(30), AddRequest(f"mate-{i}", prompt(rng, 200), sampling(rng, 25)))
            for i in range(rng.randrange(1, MAX_MATES))
        ]
        num_rows += len(mates)
        plain = msgspec.structs.replace(target.sampling, logprobs=None)
        alone = run(msgspec.structs.replace(target, sampling=plain), [])
        num_same += run(target, mates) == alone
    print(json.dumps({"num_mixes": num_mixes, "num_same": num_same, "num_rows": num_rows}))


if __name__ == "__main__":
    main(int(sys.argv[1]))
