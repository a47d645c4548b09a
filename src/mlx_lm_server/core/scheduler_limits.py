"""What bounds a step of the scheduler."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mlx_lm_server.errors import ConfigError

MIN_GOAL_FACTOR = 1.5
MAX_CROWD = 2.0
MIN_LOOKAHEAD_TOKENS = 32
COPYING_SHARE, LEAST_COPYING_S = 0.1, 0.001


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """Bounds on a step. None means that only the other bounds hold.

    `max_num_batched_tokens` bounds decode and prefill tokens of a step together,
    `prefill_batch_size` the prompts in it and `prefill_step_size` the tokens of each.
    `itl_goal_s` is how long a step with decoding rows may take, where that leaves prefill at least
    a third of the step; without it the goal is `auto_goal_factor` times the step without prefill,
    at least `auto_goal_floor_s`, and `short_prompt_factor` times that for prompts of at most
    `short_prompt_tokens`. Where more prompts wait than rows decode, that goal is longer by this
    ratio, up to `MAX_CROWD`: else a few early rows would slow down many. A chunk has at least
    `min_chunk_tokens`, whatever the goal; of longer prompts beside decoding rows a step takes at
    most `first_chunk_tokens` at first, and for an automatic goal a number that makes the step's
    tokens whole `token_tile`s: the last few of a tile cost next to nothing, and with fewer sizes
    forwards of one form come again (docs/adr/0009). A row gets room for some of its answer when it
    joins, `lookahead_share` of what it has, at most `lookahead_tokens`: memory that it holds is
    nobody else's. Of cached tokens a step loads at least `min_loaded_tokens`, whatever the goal.
    Beside others it saves, of what rows leave behind, what is copied in a tenth of the step at
    `copy_bytes_per_s`, at least in a millisecond, and at least `leaving_bytes`. `max_guesses` is
    how many tokens of a row may be tried at once, as many as it can take back. The tokens of a
    step's chunks attend to at most `max_prefill_pairs` others together.
    """

    max_batch_size: int = 32
    max_num_batched_tokens: int = 2048
    prefill_step_size: int | None = None
    prefill_batch_size: int | None = None
    itl_goal_s: float | None = None
    auto_goal_factor: float = 2.4
    auto_goal_floor_s: float = 0.02
    short_prompt_tokens: int = 256
    short_prompt_factor: float = 1.5
    min_chunk_tokens: int = 4
    first_chunk_tokens: int = 24
    token_tile: int = 1
    lookahead_tokens: int = 256
    lookahead_share: float = 1.0
    leaving_bytes: int = 4 << 20
    copy_bytes_per_s: float = 0.0
    min_loaded_tokens: int = 256
    max_guesses: int = 0
    max_prefill_pairs: float = math.inf

    def __post_init__(self) -> None:
        if self.max_batch_size < 1:
            raise ConfigError(f"max_batch_size must be at least 1, not {self.max_batch_size}")
        if self.max_num_batched_tokens < self.max_batch_size:
            raise ConfigError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least "
                f"max_batch_size ({self.max_batch_size}): each decoding row needs one token a step"
            )

    def leaving_bytes_in(self, step_s: float) -> int:
        """Returns how much of what rows leave behind a step saves that takes so long."""
        copying_s = max(LEAST_COPYING_S, COPYING_SHARE * step_s)
        return max(self.leaving_bytes, int(self.copy_bytes_per_s * copying_s))

    def lookahead(self, num_tokens: int) -> int:
        """Returns how many tokens a row with so many gets room for beyond them."""
        share = int(self.lookahead_share * num_tokens)
        return min(self.lookahead_tokens, max(MIN_LOOKAHEAD_TOKENS, share))

    def step_goal_s(
        self, decode_step_s: float, *, is_short: bool, prompts_per_row: float = 0.0
    ) -> float:
        """How long a step may take whose decode part takes `decode_step_s`, with so many prompts
        that wait for each row that decodes."""
        if self.itl_goal_s is not None:
            return max(self.itl_goal_s, MIN_GOAL_FACTOR * decode_step_s)
        goal_s = max(self.auto_goal_floor_s, self.auto_goal_factor * decode_step_s)
        goal_s *= min(max(1.0, prompts_per_row), MAX_CROWD)
        return goal_s * self.short_prompt_factor if is_short else goal_s
