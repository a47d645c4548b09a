"""Which blocks and checkpoints there are, and how far they carry a request.

    root ─▶ a ─▶ b ─▶ c          a request that begins like a chain follows it block by block; then
                 └──▶ d, t       the child with the longest common beginning gives some tokens more

State that is not kept by token can be taken up only where a checkpoint was made, so for models with
such state a hit walks back to the newest checkpoint on its way.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from mlx_lm_server.core.block import Block, State, num_common
from mlx_lm_server.core.chain import Chain

# Children of one block that are compared with a prompt, the newest first.
MAX_COMPARED_CHILDREN = 64


class CacheIndex:
    """Owned by the prefix cache."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._blocks: dict[bytes, Block] = {}
        self._children: dict[bytes, dict[bytes, Block]] = {}
        self._states: dict[bytes, list[State]] = {}  # by the name of the block they come after

    def __len__(self) -> int:
        return len(self._blocks)

    # ---- what there is

    def block(self, name: bytes) -> Block | None:
        return self._blocks.get(name)

    def add(self, name: bytes, parent: bytes, token_ids: tuple[int, ...], num_tokens: int) -> Block:
        """The block of this name, a new one if there was none."""
        block = self._blocks.get(name)
        if block is None:
            block = self._blocks[name] = Block(name, parent, token_ids, num_tokens)
            self._children.setdefault(parent, {})[name] = block
        return block

    def remove(self, block: Block) -> None:
        del self._blocks[block.name]
        siblings = self._children[block.parent]
        del siblings[block.name]
        if not siblings:
            del self._children[block.parent]

    def add_state(self, state: State) -> None:
        self._states.setdefault(state.parent, []).append(state)

    def remove_state(self, state: State) -> None:
        states = self._states[state.parent]
        states.remove(state)
        if not states:
            del self._states[state.parent]

    def has_state(self, parent: bytes, tail: tuple[int, ...]) -> bool:
        """Whether there is a checkpoint right after these tokens."""
        return any(state.tail == tail for state in self._states.get(parent, ()))

    def state_at(self, chain: Chain, num_tokens: int) -> State | None:
        """Returns the checkpoint after exactly so many tokens of a request."""
        num_blocks = num_tokens // self._block_size
        tail = chain.known_ids(num_blocks * self._block_size, num_tokens)
        for state in self._states.get(chain.name_of_block(num_blocks - 1), ()):
            if state.tail == tail:
                return state
        return None

    # ---- how far it carries

    def walk(self, chain: Chain, start: int, stop: int) -> list[Block]:
        """The blocks that hold tokens `start` to `stop - 1`, or as many as there are: whole ones
        from the one that token `start` is in."""
        return list(self._follow(chain, start // self._block_size, stop))

    def _follow(self, chain: Chain, first: int, stop: int) -> Iterator[Block]:
        size = self._block_size
        for index in range(first, stop // size):
            block = self._blocks.get(chain.name_of_block(index))
            if block is None:
                return
            if block.token_ids != chain.known_ids(index * size, (index + 1) * size):
                return
            yield block

    def nearest_child(self, chain: Chain, num_blocks: int, stop: int) -> tuple[Block | None, int]:
        """After `num_blocks` blocks of a request: the block that goes on most like it, and for
        how many tokens, up to token `stop`."""
        start = num_blocks * self._block_size
        wanted = chain.known_ids(start, min(stop, start + self._block_size))
        children = self._children.get(chain.name_of_block(num_blocks - 1), {})
        best, most = None, 0
        for block in islice(reversed(children.values()), MAX_COMPARED_CHILDREN):
            num_tokens = num_common(block.token_ids, wanted)
            if num_tokens > most or best is None:
                best, most = block, num_tokens
        return best, most

    def ids_from(self, block: Block, start: int, count: int) -> list[int]:
        """The tokens of a cached text from token `start` of a block on; where it divides, those
        of the newest branch."""
        ids = list(block.token_ids[start:])
        while len(ids) < count and (children := self._children.get(block.name)):
            block = next(reversed(children.values()))
            ids += block.token_ids
        return ids[:count]

    def newest_state(self, chain: Chain, start: int, stop: int) -> State | None:
        """Returns the checkpoint of most tokens of a request, more than `start`, at most `stop`."""
        size = self._block_size
        for num_blocks in range(stop // size, start // size - 1, -1):
            states = self._states.get(chain.name_of_block(num_blocks - 1))
            if not states:
                continue
            ids = chain.known_ids(num_blocks * size, min(stop, (num_blocks + 1) * size))
            fitting = [
                state
                for state in states
                if state.num_tokens > start and ids[: len(state.tail)] == state.tail
            ]
            if fitting:
                return max(fitting, key=lambda state: state.num_tokens)
        return None
