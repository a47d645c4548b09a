"""What a back end is: all that differs by device, as one object that is chosen at assembly.

Nothing else in the engine asks what the device is. `backends/` has the back ends; they are imported
by who assembles the engine, and known to everybody else by the Protocols here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import mlx.core as mx

from mlx_lm_server.config import Way
from mlx_lm_server.protocol import MemoryPressure, SamplingParams

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mlx_lm_server.core.plan import RowWork
    from mlx_lm_server.runner.state.kv_quantisation import PackedKV
    from mlx_lm_server.runner.state.kv_storage import KVStorage, LayerShape, Stored
    from mlx_lm_server.runner.state.step_layout import SlotsView, StepLayout

Unary = Callable[[mx.array], mx.array]
# Takes sources, targets and moves as addresses and lengths, and gives 0 where it refuses; see
# native/products/copies.c.
CopyHeads = Callable[..., int]


@dataclass(frozen=True, slots=True)
class Policy:
    """How a back end wants to be treated.

    - `is_in_host_memory`: what is written to an array's buffer is what MLX computes with.
    - `widens_weights`: 16 bits are slower than 32.
    - `tight_kv_bits`: what K and V are kept in where nobody asked and a row of the model's context
      would not fit in 16 bits; 16 keeps them.
    - `submits_slowly`: submitting a forward takes as long as the forward.
    - `max_resized_bytes`: slabs up to so much are made larger by a copy; None for all.
    - `capacity_step`: slots with more places have a multiple of so many; None for few classes.
    - `lookahead_share`: of what it has, a row gets so much room for its answer. Less holds less
      memory, and copies more often.
    - `length_step`: K and V that decoding rows read are rounded up to so many tokens, so that the
      same shapes come again; with 1 rows of one length need no mask.
    - `max_copied_bytes`: of layers that are copied at once, at most about so much.
    - `pool_segments`: in how many segments the prefix cache's pool comes: making a large one takes
      long on a CPU, many are many operations on a GPU.
    - `token_tile`: tokens that a product takes at once, where only few are left.
    - `reduction_depth`: a vocabulary is looked at in so many parts when it is reduced.
    - `has_threads`: products take more or fewer threads, which is measured.
    """

    way: Way
    device: str
    is_in_host_memory: bool
    widens_weights: bool
    tight_kv_bits: int
    submits_slowly: bool
    max_resized_bytes: int | None
    capacity_step: int | None
    lookahead_share: float
    length_step: int
    max_copied_bytes: int
    pool_segments: int
    token_tile: int
    reduction_depth: int
    has_threads: bool


class LayerAttention(Protocol):
    """Attention of one layer over packed tokens, `[T, …]`, of which `begin` says where they lie."""

    def begin(self, layout: StepLayout) -> None: ...

    def put(self, keys: mx.array, values: mx.array) -> None:
        """Takes K and V of the tokens, `[T, kv_heads, 1, dim]`, which go to their slabs at once or
        as attention begins."""

    def attend(
        self, queries: mx.array, scale: float, window: int | None, sinks: mx.array | None
    ) -> mx.array:
        """Queries `[T, heads, 1, dim]` → outputs of the same shape, token by token."""

    def settle(self) -> None:
        """Writes what was put and not attended to. Raises LookupError in a trace, which the places
        of chunks would be a part of."""

    def end(self) -> None:
        """Lets go all arrays of the forward."""


class ChunkAttention(Protocol):
    """Attention of one layer over the chunk of one row."""

    def put(self, chunk: RowWork, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Takes K and V of the chunk, `[kv_heads, L, dim]`. Returns those of all tokens that it
        sees."""

    def attend(
        self,
        chunk: RowWork,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        scale: float,
        sinks: mx.array | None,
    ) -> mx.array:
        """Queries `[heads, L, dim]` → outputs of the same shape, over what `put` returned."""

    def settle(self, chunk: RowWork) -> None:
        """Writes what was put and not attended to."""

    def end(self) -> None:
        """Lets go all arrays of the forward."""


class AttentionKernel(Protocol):
    """The arithmetic of attention for models of one type of numbers. With `multiplies_codes` rows
    that decode attend to K and V in few bits as they are, else to what they are read into."""

    @property
    def multiplies_codes(self) -> bool: ...

    def is_in_place(self, layers: Sequence[LayerShape]) -> bool:
        """Whether attention sees nothing of slabs with such layers but what was written: places
        without a token may hold anything, and slots without a row cost nothing."""

    def of_layer(self, storage: KVStorage, layer: int) -> LayerAttention: ...

    def of_chunks(self, storage: KVStorage, layer: int) -> ChunkAttention: ...

    def decode(
        self,
        q: mx.array,
        k: Stored,
        v: Stored,
        scale: float,
        view: SlotsView,
        sinks: mx.array | None = None,
    ) -> mx.array:
        """q `[n, heads, 1, dim]`, k and v as they are stored `[n, kv_heads, length, dim]` →
        `[n, heads, 1, dim]`. `sinks` `[heads]` are logits of keys without a value, which take part
        in the softmax only."""

    def chunk(
        self,
        q: mx.array,
        k: mx.array,
        v: mx.array,
        scale: float,
        start: int,
        window: int | None = None,
        sinks: mx.array | None = None,
    ) -> mx.array:
        """q `[heads, L, dim]`, whose first query comes after `start` keys; k and v
        `[kv_heads, start + L, dim]`, whose rows lie one after the other → `[heads, L, dim]`. A
        query sees the last `window` keys up to its own."""


class RowDraw(Protocol):
    """Draws tokens in the host's memory."""

    def fill(
        self,
        tokens: mx.array,
        logits: mx.array,
        params: Sequence[SamplingParams],
        keys: Sequence[int],
        drawn: Mapping[int, int],
    ) -> None:
        """Writes each row's token into `tokens` `[n]` int32; `drawn` has those, by place, that are
        known already. Both arrays are evaluated, `logits` `[n, vocab]` float32 and contiguous, and
        nobody has submitted work that reads `tokens`."""


@dataclass(frozen=True, slots=True)
class ModelOperations:
    """What stands in for operations that mlx-lm's models call; None leaves the library's own."""

    rms_norm: Callable[..., mx.array] | None = None
    rope: Callable[..., mx.array] | None = None
    swiglu: Callable[..., mx.array] | None = None


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What an engine's memory is for: `held_bytes` are weights, K and V, `step_bytes` what the
    largest step takes and gives back; together they are at most `limit_bytes`."""

    limit_bytes: int
    held_bytes: int
    step_bytes: int


class Upkeep(Protocol):
    """What is done about memory between steps."""

    @property
    def pressure(self) -> MemoryPressure:
        """Returns how short the machine's memory was when it was last looked at."""

    @property
    def cache_share(self) -> float:
        """Returns what the prefix cache may keep of what it had when memory got short; 1 where not,
        and the cache may grow."""

    def after_step(self, *, took_memory: bool) -> None:
        """Looks after it, where a step made arrays that stay and now and then."""

    def rest(self) -> None:
        """Looks after it where there is nothing to do."""


class Backend(Protocol):
    """Owned by the model runner; used on the engine's main thread only."""

    @property
    def policy(self) -> Policy: ...

    @property
    def exp(self) -> Unary: ...

    @property
    def log(self) -> Unary: ...

    @property
    def draw(self) -> RowDraw | None:
        """What draws for a whole batch at once; None where arrays do."""

    @property
    def copy_heads(self) -> CopyHeads | None:
        """What copies tokens of planes as bytes; None where plain copies do."""

    def operations(self, plain_swiglu: Callable[..., mx.array]) -> ModelOperations:
        """Returns what stands in for operations of models; `plain_swiglu` is mlx-lm's own."""

    def kernel(self, dtype: mx.Dtype) -> AttentionKernel:
        """Returns attention for K and V that a model makes in this type."""

    def unwritten(self, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
        """Returns an array of numbers that are whatever stood there, or zeros."""

    def read(self, packed: PackedKV) -> mx.array:
        """Returns the numbers that are stored."""

    def memory_limit_bytes(self) -> int:
        """Returns what an engine may use where nobody said it."""

    def keep_to(self, plan: MemoryPlan) -> None:
        """Tells MLX and the system what the engine is going to take, where they can be told. Called
        once, with the weights in memory and nothing under way."""

    def upkeep(self, memory_limit_bytes: int) -> Upkeep:
        """Returns what looks after memory from now on."""
