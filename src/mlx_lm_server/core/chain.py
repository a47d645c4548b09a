"""What the prefix cache knows of one request: the names of its blocks, and where others may go on
from it."""

from __future__ import annotations

from dataclasses import dataclass, field

from mlx_lm_server.core.block import chain_name, root_name
from mlx_lm_server.core.request import Request
from mlx_lm_server.protocol import CacheReport


@dataclass(slots=True, eq=False)
class Chain:
    """Owned by the prefix cache, one for each unfinished request.

    `num_named_blocks` is how many blocks of its row others may take, `state_points` where, in
    tokens, its state is to be kept. `report` says what it found when it got its first row.
    """

    request: Request
    block_size: int
    root: bytes = b""
    num_named_blocks: int = 0
    state_points: set[int] = field(default_factory=set)
    report: CacheReport | None = None
    _names: list[bytes] = field(default_factory=list)

    @classmethod
    def of(cls, request: Request, block_size: int) -> Chain:
        """Returns the chain of a request of which nothing is computed yet."""
        num_blocks = (len(request.prompt_ids) - 1) // block_size
        points = {*request.message_ends, num_blocks * block_size}
        return cls(request, block_size, root_name(request.cache_salt), state_points=points)

    def known_ids(self, start: int, stop: int) -> tuple[int, ...]:
        return self.request.known_ids(start, stop)

    def name_of_block(self, index: int) -> bytes:
        """Returns the name of its block `index`, all of whose tokens are known; the root's for
        -1."""
        names = self._names
        while len(names) <= index:
            start = len(names) * self.block_size
            parent = names[-1] if names else self.root
            names.append(chain_name(parent, self.known_ids(start, start + self.block_size)))
        return names[index] if index >= 0 else self.root

    def is_like(self, other: Chain, index: int) -> bool:
        """Whether both have the same tokens up to the end of block `index`."""
        return self.name_of_block(index) == other.name_of_block(index)
