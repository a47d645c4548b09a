"""Where blocks lie that no row holds: a pure allocator of places in segments of the pool.

A segment is, per layer, one array of so many blocks. Segments are made as blocks come and as memory
allows, and dropped when rows need the memory: what is left in the emptiest one moves to free places
of the others first.
"""

from __future__ import annotations

from mlx_lm_server.core.block import Block, Place
from mlx_lm_server.core.plan import CreateSegment, DropSegment, MoveBlocks, PoolOp

DEFAULT_SEGMENT_BYTES = 16 * 1024 * 1024
# The first segment; the next ones are as large as all before together, so that none takes long to
# make beside a small batch, and a large pool has few.
FIRST_SEGMENT_BYTES = 4 * 1024 * 1024


class _Segment:
    def __init__(self, segment_id: int, num_blocks: int) -> None:
        self.segment_id = segment_id
        self.num_blocks = num_blocks
        self.blocks: dict[int, Block] = {}
        self._free = list(reversed(range(num_blocks)))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def put(self, block: Block) -> None:
        index = self._free.pop()
        self.blocks[index] = block
        block.place = Place(self.segment_id, index)

    def remove(self, index: int) -> None:
        del self.blocks[index]
        self._free.append(index)


class BlockPool:
    """Owned by the prefix cache. `max_blocks` is the operator's cap, `segment_bytes` the size of
    the largest segments."""

    def __init__(
        self,
        block_bytes: int,
        max_blocks: int | None = None,
        segment_bytes: int = DEFAULT_SEGMENT_BYTES,
    ) -> None:
        self._block_bytes = block_bytes
        self._max_blocks = max_blocks
        self._first_blocks = max(1, min(FIRST_SEGMENT_BYTES, segment_bytes) // max(1, block_bytes))
        self._most_blocks = max(1, segment_bytes // max(1, block_bytes))
        self._segments: dict[int, _Segment] = {}
        self._open: dict[int, _Segment] = {}  # those of them with free places
        self._num_places = 0
        self._num_used = 0
        self._next_id = 0

    @property
    def used_bytes(self) -> int:
        return self.num_places * self._block_bytes

    @property
    def num_places(self) -> int:
        return self._num_places

    @property
    def num_free(self) -> int:
        return self._num_places - self._num_used

    @property
    def num_used(self) -> int:
        return self._num_used

    @property
    def next_segment_bytes(self) -> int:
        """What `grow` would take; 0 where the cap is reached."""
        return self._next_num_blocks * self._block_bytes

    @property
    def _next_num_blocks(self) -> int:
        wanted = min(self._most_blocks, max(self._first_blocks, self.num_places))
        if self._max_blocks is None:
            return wanted
        return max(0, min(wanted, self._max_blocks - self.num_places))

    def put(self, block: Block) -> bool:
        """Give the block a free place, if there is one: in the segment with the most of them, so
        that the blocks of one sequence lie together."""
        if not self._open:
            return False
        segment = max(self._open.values(), key=lambda s: s.num_free)
        segment.put(block)
        self._num_used += 1
        if not segment.num_free:
            del self._open[segment.segment_id]
        return True

    def remove(self, block: Block) -> None:
        assert block.place is not None
        segment = self._segments[block.place.segment_id]
        segment.remove(block.place.number)
        self._num_used -= 1
        self._open[segment.segment_id] = segment
        block.place = None

    def grow(self) -> CreateSegment:
        segment = _Segment(self._next_id, self._next_num_blocks)
        self._segments[segment.segment_id] = self._open[segment.segment_id] = segment
        self._num_places += segment.num_blocks
        self._next_id += 1
        return CreateSegment(segment.segment_id, segment.num_blocks)

    @property
    def can_shrink(self) -> bool:
        """Whether the blocks of the emptiest segment find room in the others."""
        emptiest = self._emptiest()
        return emptiest is not None and self.num_free >= emptiest.num_blocks

    def shrink(self) -> list[PoolOp]:
        """Drop a segment."""
        emptiest = self._emptiest()
        assert emptiest is not None, "there is no segment"
        del self._segments[emptiest.segment_id]
        self._open.pop(emptiest.segment_id, None)
        self._num_places -= emptiest.num_blocks
        self._num_used -= len(emptiest.blocks)
        moves = []
        for index, block in emptiest.blocks.items():
            is_put = self.put(block)
            assert is_put, "ask whether it can shrink"
            assert block.place is not None
            moves.append((Place(emptiest.segment_id, index), block.place))
        drop = DropSegment(emptiest.segment_id)
        return [MoveBlocks(tuple(moves)), drop] if moves else [drop]

    def _emptiest(self) -> _Segment | None:
        return min(self._segments.values(), key=lambda s: len(s.blocks), default=None)
