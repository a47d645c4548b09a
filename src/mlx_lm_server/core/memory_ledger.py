"""Bytes of the engine's memory: who has how much, and what that leaves for K and V."""

from __future__ import annotations

from dataclasses import dataclass

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
    many tokens a step may have, `kv_bytes_per_token` K and V of all layers, `max_kv_tokens` the
    operator's cap, `reserve_bytes` whatever else is needed (sampler, one layer of a slab that is
    being resized).
    """

    memory_limit_bytes: int
    weights_bytes: int
    activation_bytes_per_token: int
    max_step_tokens: int
    kv_bytes_per_token: int
    max_kv_tokens: int | None = None
    reserve_bytes: int = 0

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
        """What K and V may take, in whole tokens."""
        num_tokens = max(0, self.free_bytes) // self.kv_bytes_per_token
        if self.max_kv_tokens is not None:
            num_tokens = min(num_tokens, self.max_kv_tokens)
        return num_tokens * self.kv_bytes_per_token

    @property
    def kv_limit_tokens(self) -> int:
        return self.kv_limit_bytes // self.kv_bytes_per_token

    def check_model_fits(self, min_kv_tokens: int) -> None:
        """Raises ModelTooLargeError where fewer than `min_kv_tokens` tokens of context are left."""
        if self.kv_limit_tokens < min_kv_tokens:
            raise ModelTooLargeError(
                f"the model does not fit: {min_kv_tokens} tokens of context need "
                f"{format_bytes(min_kv_tokens * self.kv_bytes_per_token)}, but {self.arithmetic()}"
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
        return f"{line}: {request_arithmetic(self.kv_limit_tokens, self.kv_bytes_per_token)}"


def request_arithmetic(num_tokens: int, kv_bytes_per_token: int) -> str:
    """What so many tokens of K and V take, as a product."""
    return (
        f"{num_tokens} tokens x {format_bytes(kv_bytes_per_token)} "
        f"= {format_bytes(num_tokens * kv_bytes_per_token)} of KV"
    )
