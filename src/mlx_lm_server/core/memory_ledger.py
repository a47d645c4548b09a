"""Bytes of the engine's memory: who has how much, and what that leaves for K and V."""

from __future__ import annotations

from dataclasses import dataclass

from mlx_lm_server.core.kv_geometry import MAX_ROW_TOKENS, KVGeometry
from mlx_lm_server.errors import ModelTooLargeError

_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


def format_bytes(num_bytes: int) -> str:
    """A byte count for people: `1536` is `1.5 KiB`."""
    amount = float(num_bytes)
    for unit in _UNITS:
        if abs(amount) < 1024 or unit == _UNITS[-1]:
            break
        amount /= 1024
    return f"{num_bytes} bytes" if unit == "bytes" else f"{amount:.4g} {unit}"


@dataclass(frozen=True, slots=True)
class ForwardBytes:
    """The peak of a forward beyond what is held: for each token in it; for each pair of a token and
    one that it attends to, whose scores are there for a moment where no fused kernel computes them;
    and for each token whose K and V, of one layer, are read from few bits: of the row of a chunk,
    and with `reads_all` of all rows that decode."""

    per_token: int
    per_pair: float = 0.0
    per_read_token: int = 0
    reads_all: bool = False


@dataclass(frozen=True, slots=True)
class MemoryLedger:
    """How the memory limit is divided.

    `max_step_tokens` is how many tokens a step may have, `max_step_pairs` to how many those of its
    chunks may attend together, `max_read_tokens` how long a row can become, `geometry` what rows
    take, `max_kv_tokens` the operator's cap, `reserve_bytes` whatever else is needed (sampler,
    layers of slabs that are being moved).
    """

    memory_limit_bytes: int
    weights_bytes: int
    forward: ForwardBytes
    max_step_tokens: int
    geometry: KVGeometry
    max_kv_tokens: int | None = None
    reserve_bytes: int = 0
    max_rows: int = 1
    max_step_pairs: int = 0
    max_read_tokens: int = MAX_ROW_TOKENS

    @property
    def activation_bytes(self) -> int:
        return self.forward.per_token * self.max_step_tokens

    @property
    def score_bytes(self) -> int:
        """Returns what the scores of chunks take, where attention computes such."""
        return int(self.forward.per_pair * self.max_step_pairs)

    @property
    def attention_bytes(self) -> int:
        """Returns what a layer takes that attends to all K and V there may be: scores of the rows
        that decode, and what is read from few bits."""
        forward, left_bytes = self.forward, max(0, self._left_bytes)
        per_kv_token = forward.per_pair + forward.reads_all * forward.per_read_token
        in_all = left_bytes * per_kv_token / max(1.0, self.geometry.bytes_per_token + per_kv_token)
        if not forward.reads_all:
            in_all += forward.per_read_token * min(
                self.max_read_tokens, self._tokens_in(left_bytes)
            )
        return int(in_all)

    def _tokens_in(self, num_bytes: int) -> int:
        return num_bytes // max(1, self.geometry.bytes_per_token + self.forward.per_read_token)

    @property
    def _left_bytes(self) -> int:
        taken = self.weights_bytes + self.activation_bytes + self.score_bytes + self.reserve_bytes
        return self.memory_limit_bytes - taken

    @property
    def step_bytes(self) -> int:
        """Returns what a step takes beside weights and rows, and gives back."""
        in_attention = self.score_bytes + self.attention_bytes
        return self.activation_bytes + in_attention + self.reserve_bytes

    @property
    def free_bytes(self) -> int:
        """Returns what weights, activations, attention and reserve leave; negative where they do
        not fit."""
        return self._left_bytes - self.attention_bytes

    @property
    def kv_limit_bytes(self) -> int:
        """What the state of all rows may take: K and V, and what does not grow. In whole tokens
        where it is K and V only."""
        free = max(0, self.free_bytes)
        size = self.geometry.bytes_per_token
        if self.geometry.bytes_per_row == 0 and size:
            free -= free % size
        if self.max_kv_tokens is None or size == 0:
            return free
        return min(free, self.max_kv_tokens * size + self.max_rows * self.geometry.bytes_per_row)

    @property
    def kv_limit_tokens(self) -> int:
        """The longest row, if it is alone."""
        return self.geometry.tokens_in(self.kv_limit_bytes, self.max_kv_tokens or MAX_ROW_TOKENS)

    def check_model_fits(self, min_kv_tokens: int) -> None:
        """Raises ModelTooLargeError where fewer than `min_kv_tokens` tokens of context are left."""
        if self.kv_limit_tokens < min_kv_tokens:
            raise ModelTooLargeError(
                f"the model does not fit: {min_kv_tokens} tokens of context need "
                f"{format_bytes(self.geometry.row_bytes(min_kv_tokens))}, but {self.arithmetic()}"
            )

    def arithmetic(self) -> str:
        """The division in one line, for logs and errors."""
        parts = [
            f"{format_bytes(self.memory_limit_bytes)} memory limit",
            f"{format_bytes(self.weights_bytes)} weights",
            f"{format_bytes(self.activation_bytes)} activations of {self.max_step_tokens} tokens",
        ]
        if in_attention := self.score_bytes + self.attention_bytes:
            parts.append(f"{format_bytes(in_attention)} attention over long contexts")
        if self.reserve_bytes:
            parts.append(f"{format_bytes(self.reserve_bytes)} reserve")
        line = " - ".join(parts) + f" = {format_bytes(self.free_bytes)}"
        if self.max_kv_tokens is not None and self.free_bytes > self.kv_limit_bytes:
            line += f", capped at {self.max_kv_tokens} tokens"
        return f"{line}: {request_arithmetic(self.kv_limit_tokens, self.geometry)}"


def request_arithmetic(num_tokens: int, geometry: KVGeometry) -> str:
    """What a row of so many tokens takes, as a product where it is one."""
    total = format_bytes(geometry.row_bytes(num_tokens))
    if geometry.rings:
        return f"{num_tokens} tokens with {len(geometry.rings)} windows = {total} of KV"
    line = f"{num_tokens} tokens x {format_bytes(geometry.bytes_per_token)}"
    if geometry.bytes_per_row:
        return f"{line} + {format_bytes(geometry.bytes_per_row)} = {total} of KV and state"
    return f"{line} = {total} of KV"
