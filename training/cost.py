"""What a step of the draft and of nano-wide costs beside nano's, and whether nano-wide writes what
nano writes: `python -m training.cost --wide FOLDER`.

One row, one thread, CPU time, with the BLAS that the engine takes; steps of all models take turns.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import median
from time import process_time
from typing import Any

from mlx_lm_server.runner.backends import blas

NANO_FOLDER = Path(__file__).parents[1] / "src" / "mlx_lm_server" / "nano"
CONTEXT_TOKENS = 64
STEPS = 300
WORDS_OF_SKILLS = ("repeat", "sum", "capital", "json", "talk", "length")
PROMPTS_PER_SKILL = 5
COMPARED_TOKENS = 30


class Stepper:
    """A model that decodes one row."""

    def __init__(self, path: Path, dtype: Any) -> None:
        import mlx.core as mx
        from mlx_lm import load
        from mlx_lm.models.cache import make_prompt_cache

        self._model = load(str(path))[0]
        self._model.set_dtype(dtype)
        self._cache = make_prompt_cache(self._model)
        self._token = mx.argmax(
            self._model(mx.full((1, CONTEXT_TOKENS), 300), self._cache)[:, -1:], -1
        )
        mx.eval(self._token)

    def step_s(self) -> float:
        import mlx.core as mx

        begun = process_time()
        self._token = mx.argmax(self._model(self._token, self._cache), -1)
        mx.eval(self._token)
        return process_time() - begun


def costs(paths: dict[str, Path], dtype: Any) -> dict[str, float]:
    """Median seconds of a step."""
    steppers = {name: Stepper(path, dtype) for name, path in paths.items()}
    times: dict[str, list[float]] = {name: [] for name in paths}
    for _ in range(STEPS):
        for name, stepper in steppers.items():
            times[name].append(stepper.step_s())
    return {name: median(taken) for name, taken in times.items()}


def num_parameters(path: Path) -> int:
    """The embedding is the head, too, so this is what a token is multiplied by."""
    import mlx.core as mx

    arrays = mx.load(str(path / "model.safetensors"))
    assert isinstance(arrays, dict)
    return sum(array.size for array in arrays.values())


def same_words(wide: Path) -> tuple[int, int]:
    """For how many held-out prompts nano-wide writes nano's first tokens, of how many."""
    from mlx_lm import batch_generate, load

    from .score import probes_of

    (nano, tokenizer), (other, _) = (load(str(path))[:2] for path in (NANO_FOLDER, wide))
    probes = [p for s in WORDS_OF_SKILLS for p in probes_of(s, tokenizer, PROMPTS_PER_SKILL, False)]
    prompts = [probe.prompt for probe in probes]
    texts = [
        batch_generate(model, tokenizer, prompts, max_tokens=COMPARED_TOKENS).texts
        for model in (nano, other)
    ]
    return sum(a == b for a, b in zip(*texts, strict=True)), len(prompts)


def main() -> None:
    """Print it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--wide", type=Path, help="nano-wide, as training.make_nano_wide wrote it")
    args = parser.parse_args()
    print("BLAS:", blas.preload(1).name)
    import mlx.core as mx

    mx.set_default_device(mx.Device(mx.cpu))
    paths = {"nano": NANO_FOLDER, "draft": NANO_FOLDER / "draft"}
    if args.wide:
        paths["nano-wide"] = args.wide
    sizes = {name: num_parameters(path) for name, path in paths.items()}
    for other in list(paths)[1:]:
        print(f"{other} has {sizes[other] / sizes['nano']:.2f} of nano's parameters")
    for name, dtype in (("float32", mx.float32), ("bfloat16", mx.bfloat16)):
        found = costs(paths, dtype)
        for other in list(paths)[1:]:
            print(f"{name}: a step of {other} takes {found[other] / found['nano']:.2f} of nano's")
    if args.wide:
        same, total = same_words(args.wide)
        print(
            f"nano-wide writes nano's first {COMPARED_TOKENS} tokens for {same} of {total} prompts"
        )


if __name__ == "__main__":
    main()
