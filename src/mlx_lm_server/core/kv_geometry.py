"""How many bytes a row's slot takes, exactly, for each kind of state that a layer keeps."""

from __future__ import annotations

from dataclasses import dataclass

# More than any row can have; where state does not grow, only this bounds it.
MAX_ROW_TOKENS = 1 << 24


@dataclass(frozen=True, slots=True)
class RingBytes:
    """Layers with a window keep at most `ring` tokens, of `bytes_per_token` together."""

    ring: int
    bytes_per_token: int


@dataclass(frozen=True, slots=True)
class KVGeometry:
    """`full_bytes_per_token` is of the layers that keep every token, `bytes_per_row` the state
    that does not grow (recurrent, convolution), which is also what a checkpoint of it takes."""

    full_bytes_per_token: int
    rings: tuple[RingBytes, ...] = ()
    bytes_per_row: int = 0

    @property
    def bytes_per_token(self) -> int:
        """As long as no ring is full."""
        return self.full_bytes_per_token + sum(r.bytes_per_token for r in self.rings)

    def slot_bytes(self, capacity: int) -> int:
        """Of a slot for `capacity` tokens, without the state of the row in it."""
        in_rings = sum(r.bytes_per_token * min(capacity, r.ring) for r in self.rings)
        return self.full_bytes_per_token * capacity + in_rings

    def state_bytes(self, num_tokens: int) -> int:
        """Of a checkpoint after so many tokens: what a row keeps besides the layers that keep
        every token."""
        in_rings = sum(r.bytes_per_token * min(num_tokens, r.ring) for r in self.rings)
        return in_rings + self.bytes_per_row

    @property
    def has_state(self) -> bool:
        """Whether a row can go on only from where a checkpoint was taken."""
        return bool(self.rings or self.bytes_per_row)

    def row_bytes(self, num_tokens: int) -> int:
        """Of a row that holds so many tokens."""
        return self.slot_bytes(num_tokens) + self.bytes_per_row

    def tokens_in(self, num_bytes: int, most: int) -> int:
        """The longest row, up to `most` tokens, that so many bytes hold."""
        low, high = 0, most
        while low < high:
            middle = (low + high + 1) // 2
            if self.row_bytes(middle) <= num_bytes:
                low = middle
            else:
                high = middle - 1
        return low
