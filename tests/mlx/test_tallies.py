"""What a row draws with penalties is a matter of its own past, while others come, go and guess."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_lm_server.protocol import SamplingParams
from mlx_lm_server.runner.sampling.row_sampling import RowSampling, start_row
from mlx_lm_server.runner.sampling.sampler import Sampler
from tests.back_ends import BACKEND
from tests.mlx.driver import EngineDriver, random_prompts
from tests.mlx.tiny_models import VOCAB_SIZE, write_model

pytestmark = pytest.mark.each_way

VOCAB = 60
LENGTH = 25


class Text:
    """A row that writes, and what it writes by the definition of the penalties: greedily."""

    def __init__(self, rng: random.Random) -> None:
        self.params = SamplingParams(
            max_tokens=LENGTH,
            seed=0,
            temperature=0.0,
            repetition_penalty=rng.choice((1.0, 1.0, 1.3, 0.7)),
            frequency_penalty=rng.choice((0.0, 0.0, 0.4, -0.2)),
            presence_penalty=rng.choice((0.0, 0.0, 0.6)),
            logit_bias=rng.choice(({}, {3: 1.5, 7: -2.0})),
            allowed_token_ids=rng.choice(((), (), tuple(range(0, VOCAB, 3)))),
        )
        self.prompt = [rng.randrange(VOCAB) for _ in range(rng.randint(1, 20))]
        self.output: list[int] = []
        self.row = self._begun()

    def join_again(self) -> None:
        self.row = self._begun()

    def _begun(self) -> RowSampling:
        return start_row(self.params, self.prompt, self.output, VOCAB)

    def expected(self, logits: Sequence[float], guessed: Sequence[int] = ()) -> int:
        params, output = self.params, [*self.output, *guessed]
        bent = list(logits)
        for token in {*self.prompt, *output}:
            penalty = params.repetition_penalty
            bent[token] = bent[token] / penalty if bent[token] > 0 else bent[token] * penalty
        for token in set(output):
            count = output.count(token)
            bent[token] -= params.frequency_penalty * count + params.presence_penalty
        for token, bias in params.logit_bias.items():
            bent[token] += bias
        tokens = params.allowed_token_ids or range(VOCAB)
        return max(tokens, key=lambda token: bent[token])


def a_step(sampler: Sampler, texts: Sequence[Text], rng: random.Random) -> None:
    """Each draws, some of them behind guesses too, of which they take the right ones."""
    guesses = [
        [rng.randrange(VOCAB) for _ in range(rng.randint(1, 3))] if rng.random() < 0.3 else []
        for _ in texts
    ]
    works = list(zip(texts, guesses, strict=True))
    states = [
        state for text, tried in works for state in (text.row.ahead(tried) if tried else [text.row])
    ]
    logits = mx.random.normal((len(states), VOCAB), key=mx.random.key(rng.getrandbits(30)))
    drawn: list[int] = sampler.sample(logits, states).tolist()  # type: ignore[assignment]
    rows: list[list[float]] = logits.tolist()  # type: ignore[assignment]
    place = 0
    for text, tried in works:
        positions = range(place, place + len(tried) + 1)
        wanted = [text.expected(rows[p], tried[: p - place]) for p in positions]
        assert [drawn[p] for p in positions] == wanted
        if tried:
            taken = [*tried[: rng.randint(0, len(tried))], wanted[0]]
            text.row.take(taken)
            text.output += taken
        else:
            text.output.append(drawn[place])
        place += len(positions)


@pytest.mark.parametrize("seed", range(6))
def test_each_row_draws_by_its_own_past_while_others_come_go_and_guess(seed: int) -> None:
    rng, sampler = random.Random(seed), Sampler(VOCAB, BACKEND)
    texts: list[Text] = []
    for _ in range(40):
        if len(texts) < 9 and rng.random() < 0.5:
            texts.append(Text(rng))
        for text in list(texts):
            chance = rng.random()
            if chance < 0.15:  # it ends, or is put off and joins again
                sampler.let_go(text.row)
                texts.remove(text)
                if chance < 0.05:
                    text.join_again()
                    texts.append(text)
        picked = rng.sample(texts, rng.randint(0, len(texts)))
        if picked:
            a_step(sampler, picked, rng)
    for text in texts:
        sampler.let_go(text.row)
    assert sampler.held_bytes == 0


def test_a_token_counts_that_was_drawn_before_a_step_of_others() -> None:
    sampler = Sampler(VOCAB, BACKEND)
    params = SamplingParams(max_tokens=9, seed=0, temperature=0.0, presence_penalty=1.0)
    punished = start_row(params, [1], [], VOCAB)
    free = start_row(SamplingParams(max_tokens=9, seed=0, temperature=0.0), [1], [], VOCAB)
    logits = mx.arange(VOCAB)[None] / VOCAB
    drawn = [sampler.sample(logits, [row]).item() for row in (punished, free, punished)]
    assert drawn == [VOCAB - 1, VOCAB - 1, VOCAB - 2]


def test_lines_are_used_again() -> None:
    sampler, sizes = Sampler(VOCAB, BACKEND), []
    params = SamplingParams(max_tokens=9, seed=0, presence_penalty=1.0)
    for _ in range(5):
        rows = [start_row(params, [1], [], VOCAB) for _ in range(3)]
        sampler.sample(mx.zeros((3, VOCAB)), rows)
        sizes.append(sampler.held_bytes)
        for row in rows[1:]:  # one stays
            sampler.let_go(row)
    line_bytes = 4 * VOCAB
    assert sizes == [5 * line_bytes] * 2 + [9 * line_bytes] * 3  # of which one is nobody's


def test_an_engine_keeps_nothing_of_rows_that_have_left(tmp_path: Path) -> None:
    engine = EngineDriver(write_model("qwen3", tmp_path))
    sampling = SamplingParams(max_tokens=8, seed=1, frequency_penalty=0.4)
    prompts = random_prompts(4, (9, 30, 5), VOCAB_SIZE)
    alone = [engine.run([prompt], sampling)[0] for prompt in prompts]
    assert engine.run(prompts, sampling) == alone
    engine.run(prompts[:1], SamplingParams(max_tokens=2, seed=1))  # its plan lets them go
    assert engine.core._runner.sampler_held_bytes == 0
