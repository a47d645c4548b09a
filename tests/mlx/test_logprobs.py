"""Logprobs are those of mlx-lm's own forward, whoever shares the batch, chunked or whole."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import msgspec
import numpy as np
import pytest

from mlx_lm_server.protocol import AddRequest, RequestOutput, SamplingParams, TokenLogprobs
from tests.mlx.driver import EngineDriver, random_prompts
from tests.mlx.tiny_models import VOCAB_SIZE, write_model

GREEDY = SamplingParams(max_tokens=6, seed=0, temperature=0.0, logprobs=3)


class ScoreDriver(EngineDriver):
    """Keeps the outputs too."""

    outputs: dict[str, list[RequestOutput]]

    def submit(self, req_id: str, prompt: list[int], sampling: SamplingParams) -> None:
        self.outputs = getattr(self, "outputs", {})
        self.tokens[req_id] = []
        self._collect(self.core.handle([AddRequest(req_id, prompt, sampling)]))

    def _collect(self, outputs: list[RequestOutput]) -> None:  # type: ignore[override]
        super()._collect(outputs)
        for output in outputs:
            self.outputs.setdefault(output.req_id, []).append(output)

    def prompt_scores(self, req_id: str) -> list[TokenLogprobs]:
        [found] = [o.prompt_logprobs for o in self.outputs[req_id] if o.prompt_logprobs is not None]
        return found


@pytest.fixture(scope="module", params=["qwen3", "qwen3_next", "gemma2", "llama4"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packed, split with state, split with fetched K and V, and alone."""
    return write_model(request.param, tmp_path_factory.mktemp("logprobs") / request.param)


def reference(folder: Path, ids: list[int]) -> np.ndarray:
    """`[len(ids), vocab]` logprobs of mlx-lm's model."""
    from mlx_lm.utils import load_model

    model, _ = load_model(folder)
    logits = model(mx.array([ids]))[0].astype(mx.float32)
    return np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))


def check(found: list[TokenLogprobs], expected: np.ndarray, tokens: list[int], top: int) -> None:
    assert len(found) == len(tokens)
    for one, row, token in zip(found, expected, tokens, strict=True):
        assert one.logprob == pytest.approx(float(row[token]), abs=1e-3)
        assert len(one.top_ids) == len(one.top_logprobs) == top
        assert one.top_logprobs == pytest.approx(sorted(row, reverse=True)[:top], abs=1e-3)
        assert one.top_logprobs == pytest.approx([float(row[i]) for i in one.top_ids], abs=1e-3)


def test_rows_that_ask_get_those_of_the_model_and_others_get_none(folder: Path) -> None:
    driver = ScoreDriver(folder)
    prompts = random_prompts(1, [5, 40, 17, 3], VOCAB_SIZE)
    wanted = [3, None, 0, 20]
    for i, (prompt, num) in enumerate(zip(prompts, wanted, strict=True)):
        driver.submit(str(i), prompt, msgspec.structs.replace(GREEDY, logprobs=num))
    driver.finish()
    for i, (prompt, num) in enumerate(zip(prompts, wanted, strict=True)):
        tokens = driver.tokens[str(i)]
        if num is None:
            assert driver.logprobs[str(i)] == []
            continue
        rows = reference(folder, prompt + tokens)[len(prompt) - 1 : -1]
        check(driver.logprobs[str(i)], rows, tokens, num)


def test_they_are_of_the_model_before_temperature_and_penalties(folder: Path) -> None:
    driver = ScoreDriver(folder)
    [prompt] = random_prompts(2, [9], VOCAB_SIZE)
    sampling = SamplingParams(
        max_tokens=8, seed=5, temperature=1.7, logit_bias={7: 9.0}, frequency_penalty=1.5,
        top_k=50, logprobs=2,
    )  # fmt: skip
    driver.submit("a", prompt, sampling)
    driver.finish()
    rows = reference(folder, prompt + driver.tokens["a"])[len(prompt) - 1 : -1]
    check(driver.logprobs["a"], rows, driver.tokens["a"], 2)


@pytest.mark.parametrize("prefill_step_size", [None, 7, 64])
def test_those_of_a_prompt(folder: Path, prefill_step_size: int | None) -> None:
    driver = ScoreDriver(folder, prefill_step_size=prefill_step_size)
    prompts = random_prompts(3, [150, 30, 1], VOCAB_SIZE)
    sampling = msgspec.structs.replace(GREEDY, prompt_logprobs=2, max_tokens=1)
    plain = msgspec.structs.replace(GREEDY, logprobs=None)
    for i, prompt in enumerate(prompts):
        driver.submit(str(i), prompt, sampling)
    driver.submit("plain", prompts[0], plain)
    driver.finish()
    for i, prompt in enumerate(prompts):
        rows = reference(folder, prompt)[:-1]
        found = driver.prompt_scores(str(i))
        check(found, rows, prompt[1:], 2)
        for one, row, token in zip(found, rows, prompt[1:], strict=True):
            low, high = ((row > row[token] + margin).sum() for margin in (1e-3, -1e-3))
            assert low < one.rank <= high  # up to what rounding may swap
    assert all(o.prompt_logprobs is None for o in driver.outputs["plain"])


@pytest.mark.each_way
def test_scores_of_a_prompt_in_pieces_do_not_run_ahead_of_what_rows_beside_it_load(
    tmp_path: Path,
) -> None:
    """Rows come back from the cache, while a long prompt is scored chunk by chunk."""
    engine = EngineDriver(write_model("qwen3", tmp_path), prefill_step_size=8)
    scored, prefix, *ends = random_prompts(5, (800, 200, *[7] * 8), VOCAB_SIZE)
    greedy = SamplingParams(max_tokens=12, seed=0, temperature=0.0)
    expected = EngineDriver(tmp_path).run([[*prefix, *end] for end in ends], greedy)
    engine.run([prefix], greedy)
    only_scored = SamplingParams(max_tokens=1, seed=0, prompt_logprobs=0)
    engine.add("scored", scored, only_scored)
    for number, end in enumerate(ends):
        for _ in range(4):
            engine.step()
        engine.add(f"{number}", [*prefix, *end], greedy)
    engine.finish()
    assert [engine.tokens[f"{number}"] for number in range(len(ends))] == expected
    assert all(engine.reports[f"{number}"].num_cached_tokens > 0 for number in range(len(ends)))
