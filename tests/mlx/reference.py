"""Greedy tokens as mlx-lm itself generates them, in a process that has nothing of ours.

Run as a script: reads jobs as JSON from stdin, prints answers as JSON. A job names a model folder,
perhaps an adapter, whether the weights are widened to float32, prompts and a number of tokens; an
answer gives, per prompt and step, the token and the five highest logits.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

TIE_TOLERANCE = 1e-4


@dataclass(frozen=True)
class ReferenceStep:
    token: int
    leaders: dict[int, float]

    def is_tie_with(self, token: int, tolerance: float = TIE_TOLERANCE) -> bool:
        """Whether the reference's own logits put another token as high."""
        return token in self.leaders and self.leaders[self.token] - self.leaders[token] <= tolerance


def run_jobs(jobs: list[dict]) -> list[list[list[ReferenceStep]]]:
    """Per job, per prompt, the steps."""
    done = subprocess.run(
        [sys.executable, __file__],
        input=json.dumps(jobs),
        capture_output=True,
        text=True,
        check=True,
    )
    return [
        [
            [ReferenceStep(t, {int(k): v for k, v in leaders.items()}) for t, leaders in steps]
            for steps in answer
        ]
        for answer in json.loads(done.stdout.splitlines()[-1])
    ]


def assert_same_tokens(
    actual: list[int], expected: list[ReferenceStep], tolerance: float = TIE_TOLERANCE
) -> int:
    """Fail unless the tokens are the reference's; a tie ends the comparison and counts as 1."""
    for i, (token, step) in enumerate(zip(actual, expected, strict=True)):
        if token != step.token:
            assert step.is_tie_with(token, tolerance), (
                f"token {i}: {token} instead of {step.token}, leaders {step.leaders}"
            )
            return 1
    return 0


def _answer(job: dict) -> list:
    import mlx.core as mx
    from mlx_lm.generate import generate_step
    from mlx_lm.utils import dequantize_model, load_adapters, load_model

    model, _ = load_model(Path(job["model"]))
    if job.get("adapter"):
        model = load_adapters(model, job["adapter"])
    if job["float32"]:
        dequantize_model(model)
        model.set_dtype(mx.float32)
    answers = []
    for prompt in job["prompts"]:
        steps = []
        generated = generate_step(mx.array(prompt), model, max_tokens=job["num_tokens"])
        for token, logprobs in generated:
            best = mx.argpartition(-logprobs, 5)[:5].tolist()
            steps.append((int(token), {i: float(logprobs[i]) for i in best}))
        answers.append(steps)
    return answers


if __name__ == "__main__":
    import mlx.core as mx

    mx.set_default_device(mx.cpu)
    print(json.dumps([_answer(job) for job in json.load(sys.stdin)]))
