"""One measurement of kv_bits.py in a process of its own; prints JSON.

python -m benchmarks.kv_bits_child memory FORMAT ROWS | step MODEL CONTEXT REPEATS | quality COUNT
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from time import process_time
from typing import TYPE_CHECKING, Any

import psutil

from mlx_lm_server.runner.backends import blas

if TYPE_CHECKING:
    import mlx.core as mx

ROW_TOKENS = 1000
LAYERS, KV_HEADS, HEAD_DIM = 8, 4, 64  # of the 30 M benchmark model
STEP_ROWS, SLAB = 16, 0
NANO = Path(__file__).parents[1] / "src" / "mlx_lm_server" / "nano"
KINDS = ((8, 64), (8, 32), (4, 64), (4, 32))


def memory(name: str, rows: str) -> dict[str, int]:
    import mlx.core as mx

    from mlx_lm_server.core.kv_layout import KVLayout
    from mlx_lm_server.runner.backends.choose import choose
    from mlx_lm_server.runner.state.kv_quantisation import quantised
    from mlx_lm_server.runner.state.kv_storage import KVStorage, LayerShape

    dtype, _, bits = name.partition("-")
    shape = LayerShape(KV_HEADS, HEAD_DIM, HEAD_DIM, dtype=getattr(mx, dtype))
    backend = choose()
    storage = KVStorage(quantised([shape] * LAYERS, int(bits or 16), 64), backend)
    layout = KVLayout(storage.geometry, limit_bytes=1 << 40, max_rows=int(rows))
    token = mx.ones((KV_HEADS, ROW_TOKENS, HEAD_DIM), shape.dtype)
    storage.layers[0].to_planes(token, token)  # what the first use of anything takes
    before = _process_bytes()
    for row in range(int(rows)):
        layout.place(row, ROW_TOKENS)
        for op in layout.settle():
            storage.apply(op)
        storage.stages.run()
        place = layout.location(row)
        for layer in range(LAYERS):
            storage.write_chunk(layer, place.slab_id, place.slot, 0, token * (row + 1), token)
        mx.eval([slab.planes for slab in storage.slabs.values()])
    mx.clear_cache()
    return {"account_bytes": storage.nbytes, "process_bytes": _process_bytes() - before}


def _process_bytes() -> int:
    """Resident, once the C library has given back what is free."""
    ctypes.CDLL(None).malloc_trim(0)
    return int(psutil.Process().memory_info().rss)


def step(model: str, context: str, repeats: str) -> dict[str, list[float]]:
    """Milliseconds of single steps, by bits; the n-th of each were taken one after another."""
    import mlx.core as mx

    from mlx_lm_server.core.plan import CreateSlab, RowWork, StepPlan
    from mlx_lm_server.core.slab_rules import SlabRules
    from mlx_lm_server.protocol import LoadModel
    from mlx_lm_server.runner.backends import host_memory
    from mlx_lm_server.runner.backends.choose import choose
    from mlx_lm_server.runner.loading import loader
    from mlx_lm_server.runner.seam.forwards import PackedForward
    from mlx_lm_server.runner.state.kv_quantisation import quantised
    from mlx_lm_server.runner.state.kv_storage import KVStorage

    host_memory.keep_freed_blocks()
    order, backend = LoadModel(model, num_threads=1), choose()
    loaded = loader.load(order, backend, lambda _s, _f: None)
    state, length = loaded.state, int(context)
    assert state is not None
    kernel = backend.kernel(loaded.kv_dtype)
    forwards = {}
    for bits in (16, 8, 4):
        storage = KVStorage(quantised(state.kv, bits, 64), backend)
        capacity = SlabRules().capacity_for(length + int(repeats) + 2)
        storage.apply(CreateSlab(SLAB, STEP_ROWS, capacity))
        _fill(storage, length)
        forwards[bits] = PackedForward(loaded.lm, state, storage, kernel)
    found: dict[str, list[float]] = {str(bits): [] for bits in forwards}
    for index in range(int(repeats) + 2):
        rows = tuple(RowWork(row, SLAB, row, length + index) for row in range(STEP_ROWS))
        plan = StepPlan(0, decodes=rows)
        ids = mx.arange(300, 300 + STEP_ROWS)
        for bits, forward in forwards.items():
            begun = process_time()
            mx.eval(mx.argmax(forward.run(plan, ids).result, axis=-1))
            if index >= 2:
                found[str(bits)].append(1000 * (process_time() - begun))
    return found


def _fill(storage: Any, length: int) -> None:
    import mlx.core as mx

    for number, layer in enumerate(storage.layers):
        for row in range(STEP_ROWS):
            shape = (layer.kv_heads, length, layer.key_dim)
            k, v = (mx.random.normal(shape) for _ in range(2))
            storage.write_chunk(number, SLAB, row, 0, k, v)
        mx.eval(storage.slabs[SLAB].planes[number])


def quality(count: str) -> dict[str, Any]:
    from mlx_lm_server.protocol import LoadModel
    from mlx_lm_server.runner.backends.choose import choose
    from mlx_lm_server.runner.loading import loader
    from mlx_lm_server.runner.state.kv_quantisation import quantised
    from mlx_lm_server.runner.state.kv_storage import KVStorage

    order, backend = LoadModel(str(NANO), num_threads=1), choose()
    loaded = loader.load(order, backend, lambda _s, _f: None)
    assert loaded.state is not None
    texts = list(_held_out_texts(int(count)))
    plain = KVStorage(loaded.state.kv, backend)
    totals = {kind: {"loss": 0.0, "difference": 0.0} for kind in KINDS}
    loss, size, num_tokens = 0.0, 0.0, 0
    storages = {k: KVStorage(quantised(loaded.state.kv, *k), backend) for k in KINDS}
    for prompt, answer in texts:
        logits = _logits(loaded, plain, prompt, answer)
        loss += _loss(logits, answer)
        size += float(abs(logits).mean()) * len(answer)
        num_tokens += len(answer)
        for kind, storage in storages.items():
            others = _logits(loaded, storage, prompt, answer)
            totals[kind]["loss"] += _loss(others, answer)
            totals[kind]["difference"] += float(abs(others - logits).mean()) * len(answer)
    kinds = {
        storages[kind].layers[0].format: {
            "perplexity": _perplexity(total["loss"], num_tokens),
            "logits": total["difference"] / size,
            "bytes_per_token": storages[kind].bytes_per_token,
        }
        for kind, total in totals.items()
    }
    plain_facts = {"perplexity": _perplexity(loss, num_tokens)}
    return {"num_tokens": num_tokens, "plain": plain_facts, "kinds": kinds}


def _held_out_texts(count: int) -> Iterator[tuple[list[int], list[int]]]:
    """Prompts that nano has not been trained on, of every skill, and what it is to answer."""
    from mlx_lm.utils import load_tokenizer
    from training.score import probes_of
    from training.skills import SKILLS

    tokenizer = load_tokenizer(NANO)
    for skill in SKILLS:
        for probe in probes_of(skill, tokenizer, count, thinking=False):
            yield probe.prompt, tokenizer.encode(probe.expected, add_special_tokens=False)


def _logits(loaded: Any, storage: Any, prompt: list[int], answer: list[int]) -> mx.array:
    """`[len(answer), vocab]`: of each token of the answer, prompt and answer read as one chunk."""
    import mlx.core as mx

    from mlx_lm_server.core.plan import CreateSlab, DropSlab, RowWork, StepPlan
    from mlx_lm_server.runner.seam.forwards import PackedForward

    ids = prompt + answer[:-1]
    storage.apply(CreateSlab(SLAB, 1, len(ids)))
    kernel = storage.backend.kernel(loaded.kv_dtype)
    forward = PackedForward(loaded.lm, loaded.state, storage, kernel)
    chunk = RowWork(0, SLAB, 0, 0, tuple(ids), yields=1)
    plan = StepPlan(0, chunks=(chunk,))
    outcome = forward.run(plan, mx.array(ids, mx.int32), kept=[0])
    logits: mx.array = loaded.lm.head(outcome.hidden[0][-len(answer) :])
    mx.eval(logits)
    storage.apply(DropSlab(SLAB))
    return logits


def _loss(logits: mx.array, answer: list[int]) -> float:
    """Sum of the negative log-likelihoods of the answer's tokens."""
    import mlx.core as mx

    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    return -float(mx.take_along_axis(logprobs, mx.array(answer)[:, None], axis=-1).sum())


def _perplexity(loss: float, num_tokens: int) -> float:
    return float(2.718281828459045 ** (loss / num_tokens))


if __name__ == "__main__":
    blas.preload(1)
    import mlx.core

    mlx.core.set_default_device(mlx.core.Device(mlx.core.cpu))
    part = {"memory": memory, "step": step, "quality": quality}[sys.argv[1]]
    print(json.dumps(part(*sys.argv[2:])))
