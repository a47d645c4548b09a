"""What the sampler keeps of one row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace

from mlx_lm_server.core.bad_words import BadWords
from mlx_lm_server.core.thinking import ThinkingClock
from mlx_lm_server.protocol import SamplingParams
from mlx_lm_server.runner.sampling.logprobs import PromptScores
from mlx_lm_server.runner.sampling.tallies import Tally, start_tally

MASK_64 = (1 << 64) - 1
# Logit of a bad word's last token: no chance beside any other, but one where nothing else is left.
FORBIDDEN = -1e30


@dataclass(slots=True)
class RowSampling:
    """`next_index` is the index in the sequence of the token drawn next; `biases` are added to
    logits, by token. `tried` are guesses that are taken for drawn; None where what is drawn of this
    state is the row's next token."""

    params: SamplingParams
    next_index: int
    tally: Tally | None = None
    biases: Mapping[int, float] = field(default_factory=dict)
    ends_from: int = 0  # the first index at which it may end
    prompt_scores: PromptScores | None = None
    thinking: ThinkingClock | None = None
    bad_words: BadWords | None = None
    tried: tuple[int, ...] | None = None

    @property
    def follows_tokens(self) -> bool:
        """Returns whether what it may draw depends on what was read of it last."""
        return self.thinking is not None or self.bad_words is not None

    def follow(self, token: int) -> None:
        """Takes the token that was drawn last, as it was read."""
        if self.thinking is not None:
            self.thinking.push(token)
        if self.bad_words is not None:
            self.bad_words.push(token)

    def take(self, tokens: Sequence[int]) -> None:
        """Goes on behind tokens that the host knows, as if each had been drawn."""
        if self.tally is not None:
            self.tally.take(tokens)
        self._pass(tokens)

    def ahead(self, guesses: Sequence[int]) -> list[RowSampling]:
        """Returns the states in which the row draws after none of the guesses, after one, … after
        all of them."""
        states = [self._after(())]
        for token in guesses:
            states.append(states[-1]._after((token,)))
        return states

    def _after(self, guesses: tuple[int, ...]) -> RowSampling:
        """Returns a state of its own, which shares the tally."""
        state = replace(
            self,
            thinking=copy(self.thinking),
            bad_words=copy(self.bad_words),
            tried=(*(self.tried or ()), *guesses),
        )
        state._pass(guesses)
        return state

    def _pass(self, tokens: Sequence[int]) -> None:
        self.next_index += len(tokens)
        for token in tokens:
            self.follow(token)

    @property
    def counted_in(self) -> Tally | None:
        """Returns where its next token is counted when it is drawn."""
        return self.tally if self.tried is None else None

    @property
    def forbidden_tokens(self) -> Sequence[int]:
        return () if self.bad_words is None else self.bad_words.forbidden

    @property
    def may_not_end(self) -> bool:
        return self.next_index < self.ends_from

    @property
    def is_bent(self) -> bool:
        """Returns whether it draws from other logits than the model's."""
        is_bound = self.may_not_end or bool(self.forbidden_tokens)
        return self.tally is not None or bool(self.biases) or is_bound

    @property
    def forced_token(self) -> int | None:
        return None if self.thinking is None else self.thinking.forced

    @property
    def is_greedy(self) -> bool:
        return self.params.temperature == 0.0

    @property
    def wants_arrays(self) -> bool:
        """Returns whether it draws in a way that only the arrays know."""
        params = self.params
        return not self.is_greedy and (params.typical_p < 1.0 or params.xtc_probability > 0.0)

    @property
    def key(self) -> int:
        """64 bits for the noise of the next token: from seed and index (SplitMix64, Steele et al.
        2014)."""
        return splitmix(
            splitmix(self.params.seed & MASK_64) ^ (self.next_index * 0x9E3779B97F4A7C15 & MASK_64)
        )


def start_row(
    params: SamplingParams, prompt_ids: Sequence[int], output_ids: Sequence[int], vocab_size: int
) -> RowSampling:
    """Returns the state of a row that joins with these tokens known."""
    row = RowSampling(params, len(prompt_ids) + len(output_ids))
    row.tally = start_tally(params, prompt_ids, output_ids, vocab_size)
    forbidden = {word[0]: FORBIDDEN for word in params.bad_words if len(word) == 1}
    row.biases = {**params.logit_bias, **forbidden}
    if several := [word for word in params.bad_words if len(word) > 1]:
        row.bad_words = BadWords(several, output_ids)
    if params.min_tokens and params.stop_token_ids:
        row.ends_from = len(prompt_ids) + params.min_tokens
    if params.thinking is not None:
        row.thinking = ThinkingClock(params.thinking, output_ids)
    if params.prompt_logprobs is not None and not output_ids:
        row.prompt_scores = PromptScores(prompt_ids, params.prompt_logprobs)
    return row


def splitmix(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & MASK_64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK_64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK_64
    return x ^ (x >> 31)
