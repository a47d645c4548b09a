"""How the tokens of a step reach the model: the candidates for the running batch.

    python -m benchmarks.layouts [mixed] [--quick]

A step of decode rows and one prefill chunk, on the 30 M model in float32. All candidates have the
same kernels and slabs; the first is what the engine does.

    packed     one forward of [T, 1], rows of one capacity in one slab
    split      two forwards: the decode rows [R, 1], then the chunk
    row calls  one forward, but a slab and an attention call for each row
    padded     mlx-lm's left-padded BatchKVCache: rows as long as the longest, decode rows only
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from time import perf_counter

from benchmarks.claims import Claim
from benchmarks.models import ensure_models
from benchmarks.parts import Effort, Findings, console, run_parts
from mlx_lm_server.core.kv_layout import DEFAULT_RULES
from mlx_lm_server.core.plan import CreateSlab, RowWork, StepPlan
from mlx_lm_server.protocol import LoadModel
from mlx_lm_server.runner.backends import blas

CHUNK_TOKENS = 32
# Decode rows and how many tokens each holds: even, and one long row beside short ones.
ROWS = {"8 even": (256,) * 8, "32 even": (160,) * 32, "1 long, 15 short": (4096, *(96,) * 15)}

Timed = Callable[[], None]


class Candidates:
    """The model, and a slab for the rows in each of two ways."""

    def __init__(self) -> None:
        blas.preload()
        import mlx.core as mx

        from mlx_lm_server.runner.backends import host_memory
        from mlx_lm_server.runner.backends.choose import choose
        from mlx_lm_server.runner.loading import loader
        from mlx_lm_server.runner.seam.forwards import PackedForward
        from mlx_lm_server.runner.state.kv_storage import KVStorage

        host_memory.keep_freed_blocks()
        self._mx = mx
        order, backend = LoadModel(str(ensure_models()["float32"])), choose()
        self._loaded = loader.load(order, backend, lambda _s, _f: None)
        state = self._loaded.state
        assert state is not None, self._loaded.why_no_state
        self._layers = state.kv
        self._storage = KVStorage(state.kv, backend)
        kernel = backend.kernel(self._loaded.kv_dtype)
        self._packed = PackedForward(self._loaded.lm, state, self._storage, kernel)

    def of(self, lengths: tuple[int, ...]) -> dict[str, Timed]:
        shared, alone, chunk = self._places(lengths)
        return {
            "packed": lambda: self._forward(shared, chunk),
            "split": lambda: (self._forward(shared, ()), self._forward((), chunk))[-1],
            "row calls": lambda: self._forward(alone, chunk),
            "packed, decode only": lambda: self._forward(shared, ()),
            "padded, decode only": self._padded(lengths),
        }

    def _places(
        self, lengths: tuple[int, ...]
    ) -> tuple[tuple[RowWork, ...], tuple[RowWork, ...], tuple[RowWork, ...]]:
        """Decode rows in shared slabs, the same in a slab each, and the chunk."""
        self._storage.slabs.clear()
        capacities = sorted({DEFAULT_RULES.capacity_for(n + 1) for n in lengths})
        by_capacity = {
            c: [r for r, n in enumerate(lengths) if DEFAULT_RULES.capacity_for(n + 1) == c]
            for c in capacities
        }
        shared = []
        for slab, (capacity, rows) in enumerate(by_capacity.items()):
            self._storage.apply(CreateSlab(slab, len(rows), capacity))
            shared += [RowWork(r, slab, slot, lengths[r]) for slot, r in enumerate(rows)]
        alone = []
        for row, length in enumerate(lengths):
            self._storage.apply(CreateSlab(1000 + row, 1, DEFAULT_RULES.capacity_for(length + 1)))
            alone.append(RowWork(row, 1000 + row, 0, length))
        self._storage.apply(CreateSlab(999, 1, 512))
        chunk = RowWork(len(lengths), 999, 0, 256, (1,) * CHUNK_TOKENS, yields=1)
        return tuple(shared), tuple(alone), (chunk,)

    def _forward(self, decodes: tuple[RowWork, ...], chunks: tuple[RowWork, ...]) -> None:
        plan = StepPlan(0, (), (), (), decodes, chunks)
        ids = self._mx.ones((len(decodes) + plan.num_chunk_tokens,), self._mx.int32)
        self._mx.eval(self._packed.run(plan, ids).result)

    def _padded(self, lengths: tuple[int, ...]) -> Timed:
        from mlx_lm.models.cache import BatchKVCache

        mx = self._mx
        longest = max(lengths)
        shapes = [(len(lengths), s.kv_heads, longest, s.key_dim) for s in self._layers]

        def step() -> None:
            mx.eval(self._loaded.lm.model(mx.ones((len(lengths), 1), mx.int32), cache=caches))
            for cache in caches:
                cache.trim(1)

        caches = [BatchKVCache([longest - n for n in lengths]) for _ in shapes]
        for cache, shape in zip(caches, shapes, strict=True):
            cache.update_and_fetch(mx.zeros(shape), mx.zeros(shape))
        return step


def mixed(effort: Effort) -> Findings:
    """Milliseconds of a step of decode rows beside a chunk of 32 tokens."""
    candidates = Candidates()
    claims: list[Claim] = []
    found: dict[str, dict[str, float]] = {}
    for name, lengths in ROWS.items():
        steps = candidates.of(lengths)
        times: dict[str, list[float]] = {label: [] for label in steps}
        for _ in range(4 if effort.is_quick else 10 * effort.rounds):
            for label, step in steps.items():
                begun = perf_counter()
                step()
                times[label].append((perf_counter() - begun) * 1000)
        found[name] = {label: median(taken[1:]) for label, taken in times.items()}
        for label, step_ms in found[name].items():
            console.print(f"  {name:18} {label:20} {step_ms:8.2f} ms")
        claims += _claims(name, found[name])
    return claims, found


def _claims(name: str, step_ms: dict[str, float]) -> list[Claim]:
    packed = step_ms["packed"]
    padded = step_ms["padded, decode only"] / step_ms["packed, decode only"]
    return [
        Claim(f"{name}: split over packed", step_ms["split"] / packed),
        Claim(f"{name}: row calls over packed", step_ms["row calls"] / packed),
        Claim(f"{name}: padded over packed, decode only", padded),
    ]


PARTS = {"mixed": mixed}


if __name__ == "__main__":
    raise SystemExit(run_parts("layouts", PARTS, __doc__))
