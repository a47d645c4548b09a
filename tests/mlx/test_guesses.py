"""Tokens that are tried several at once change nothing: each is what the row draws by itself."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from msgspec.structs import replace

from mlx_lm_server.core.request import Request
from mlx_lm_server.protocol import SamplingParams, ThinkingBudget, TokenLogprobs

from .driver import EngineDriver, random_prompts
from .tiny_models import VOCAB_SIZE, write_model

pytestmark = pytest.mark.each_way

PROMPTS = random_prompts(3, (9, 40, 3, 70, 17), VOCAB_SIZE)
PLAIN = SamplingParams(max_tokens=30, seed=11, temperature=1.0)
# How rows draw, one of each side by side.
WAYS: tuple[SamplingParams, ...] = (
    replace(PLAIN, temperature=0.0),
    replace(PLAIN, top_p=0.8, top_k=20, stop_token_ids=tuple(range(40)), min_tokens=12),
    replace(PLAIN, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.4),
    replace(
        PLAIN,
        temperature=0.7,
        bad_words=tuple((a, b) for a in range(0, VOCAB_SIZE, 2) for b in (1, 4, 6)),
        logit_bias={1: 2.0, 4: 3.0, 6: 4.0},
        logprobs=3,
    ),
    replace(PLAIN, typical_p=0.9, thinking=ThinkingBudget(7, (1,), (3,), (3, 5), is_open=True)),
)
# The kinds of state that can be taken back.
KINDS: dict[str, tuple[str, dict[str, object]]] = {
    "every token": ("qwen3", {}),
    "windows": ("gemma3_text", {}),
    "windows and sinks": ("gpt_oss", {}),
    "fetched": ("gemma2", {}),
    "in 8 bits": ("qwen3-wide", {"kv_bits": 8}),
}


class KnowsTheAnswers:
    """Proposes what came without it, with every third run of guesses wrong at some place."""

    def __init__(self, answers: dict[tuple[int, ...], list[int]]) -> None:
        self._answers = answers
        self._rng = random.Random(5)
        self.num_proposed = 0

    def propose(self, request: Request, most: int) -> tuple[int, ...]:
        first = len(request.output_ids)
        answer = self._answers.get(request.prompt_ids, [])
        right = answer[first : first + self._rng.randint(0, most)]
        if right and self._rng.random() < 0.33:
            place = self._rng.randrange(len(right))
            right[place] = (right[place] + 1) % VOCAB_SIZE
        self.num_proposed += len(right)
        return tuple(right)


def answers_of(engine: EngineDriver) -> list[list[int]]:
    return engine.run_each(list(zip(PROMPTS, WAYS, strict=True)))


def folder_of(kind: str, root: Path) -> Path:
    family = KINDS[kind][0]
    if family == "qwen3-wide":
        return write_model("qwen3", root / "wide", has_wide_heads=True)
    return write_model(family, root / "model")


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_rows_that_try_tokens_give_those_they_give_without(kind: str, tmp_path: Path) -> None:
    folder, order = folder_of(kind, tmp_path), KINDS[kind][1]
    plain = EngineDriver(folder, **order)
    expected = answers_of(plain)
    proposer = KnowsTheAnswers(dict(zip(map(tuple, PROMPTS), expected, strict=True)))
    trying = EngineDriver(folder, proposer, **order)
    assert answers_of(trying) == expected
    assert proposer.num_proposed > 40
    assert trying.core.stats().num_steps_total < 0.8 * plain.core.stats().num_steps_total
    assert_alike(trying.logprobs["run-0-3"], plain.logprobs["run-0-3"])


def assert_alike(ours: list[TokenLogprobs], expected: list[TokenLogprobs]) -> None:
    assert [each.top_ids for each in ours] == [each.top_ids for each in expected]
    for one, other in zip(ours, expected, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)


@pytest.mark.parametrize("family", ["qwen3_5", "mamba2"])
def test_rows_whose_state_cannot_go_back_try_nothing(family: str, tmp_path: Path) -> None:
    proposer = KnowsTheAnswers({})
    engine = EngineDriver(write_model(family, tmp_path / family), proposer)
    assert [len(tokens) for tokens in engine.run(PROMPTS[:2], PLAIN)] == [30, 30]
    assert proposer.num_proposed == 0


def test_a_state_kept_where_tokens_behind_a_stop_were_taken_back_is_right(tmp_path: Path) -> None:
    """The row of a window has computed more; who goes on from its checkpoint sees none of it."""
    folder = write_model("gemma3_text", tmp_path)
    [prompt] = random_prompts(8, (90,), VOCAB_SIZE)
    greedy = replace(PLAIN, temperature=0.0)
    [answer] = EngineDriver(folder).run([prompt], greedy)
    knows = KnowsTheAnswers({tuple(prompt): answer})
    for end in range(12, 20):
        stop = replace(greedy, stop_token_ids=(answer[end],))
        engine = EngineDriver(folder, knows)
        [first] = engine.run([prompt], stop)
        again = [*prompt, *first, 7, 8]
        engine.add("again", again, greedy)
        engine.finish()
        assert engine.reports["again"].num_cached_tokens >= len(prompt)
        assert engine.tokens["again"] == EngineDriver(folder).run([again], greedy)[0]
