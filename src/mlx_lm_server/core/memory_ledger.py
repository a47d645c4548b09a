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
class MemoryLedger:
    """How the memory limit is divided.

    `activation_bytes_per_token` is the peak of a forward per token in it, `max_step_tokens` how
    many tokens a step may have, `geometry` what rows take, `max_kv_tokens` the operator's cap,
    `reserve_bytes` whatever else is needed (sampler, one layer of a slab that is being resized).
    """

    memory_limit_bytes: int
    weights_bytes: int
    activation_bytes_per_token: int
    max_step_tokens: int
    geometry: KVGeometry
    max_kv_tokens: int | None = None
    reserve_bytes: int = 0
    max_rows: int = 1

    @property
    def activation_bytes(self) -> int:
        return self.activation_bytes_per_token * self.max_step_tokens

    @property
    def free_bytes(self) -> int:
        """What weights, activations and reserve leave; negative where they do not fit."""
        taken = self.weights_bytes + self.activation_bytes + self.reserve_bytes
        return self.memory_limit_bytes - taken

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
