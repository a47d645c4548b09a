"""What a request can go on from."""

from __future__ import annotations

from dataclasses import dataclass

from mlx_lm_server.core.block import Block, State


@dataclass(frozen=True, slots=True)
class Hit:
    """Tokens `start` to `stop - 1` of a request that need not be computed: `blocks`, of which the
    first is the one that token `start` is in; after them a row whose request goes on alike; and
    the state there."""

    start: int
    stop: int
    blocks: tuple[Block, ...] = ()
    row: int | None = None
    state: State | None = None

    @property
    def entries(self) -> tuple[Block | State, ...]:
        """What may not be evicted meanwhile, the tail first."""
        blocks = tuple(reversed(self.blocks))
        return blocks if self.state is None else (self.state, *blocks)

    def within(self, num_tokens: int) -> Hit | None:
        """Its first blocks with no more than so many tokens; None where that is not one. All of it
        where a state belongs to it, without which its tokens are of no use."""
        if self.stop - self.start <= num_tokens or self.state is not None:
            return self
        blocks = tuple(b for b in self.blocks if b.num_tokens <= self.start + num_tokens)
        return Hit(self.start, blocks[-1].num_tokens, blocks) if blocks else None

    @property
    def first_block(self) -> Hit:
        """The least that can be taken of it."""
        end = self.blocks[0].num_tokens if self.blocks else self.stop
        return self.within(end - self.start) or self
