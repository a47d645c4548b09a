"""Slabs hold what the plan put there, and are written in place."""

from __future__ import annotations

import mlx.core as mx
import pytest

from mlx_lm_server.core.block import Place
from mlx_lm_server.core.plan import (
    CreateSegment,
    CreateSlab,
    DropSlab,
    MoveRow,
    ResizeSlab,
    RowWork,
    SaveBlocks,
    StepPlan,
)
from mlx_lm_server.runner.backend import AttentionKernel, Backend
from mlx_lm_server.runner.backends.fused_kernel import FusedKernel
from mlx_lm_server.runner.backends.x86.kernel import CpuKernel
from mlx_lm_server.runner.seam.attention import LayerCache
from mlx_lm_server.runner.seam.rectangular import ChunkCache
from mlx_lm_server.runner.state.block_store import BlockStore
from mlx_lm_server.runner.state.kv_storage import KVStorage, LayerShape
from mlx_lm_server.runner.state.step_layout import layout_of
from tests.back_ends import BACKEND, with_policy

pytestmark = pytest.mark.each_way

HEADS, KV_HEADS, DIM = 4, 2, 16


def plain_cpu_kernel() -> CpuKernel:
    """As it is without a compiler."""
    kernel = CpuKernel()
    kernel.reads_in_place = False
    return kernel


def fused_kernel() -> FusedKernel:
    return FusedKernel(KVStorage([], BACKEND).read, multiplies_codes=False)


KERNELS = pytest.mark.parametrize(
    "kernel", [CpuKernel(), plain_cpu_kernel(), fused_kernel()], ids=["cpu", "plain", "fused"]
)


def storage_with(*ops: CreateSlab, backend: Backend = BACKEND) -> KVStorage:
    storage = KVStorage([LayerShape(KV_HEADS, DIM, DIM)], backend)
    for op in ops:
        storage.apply(op)
    storage.stages.run()
    return storage


def forward(
    storage: KVStorage,
    kernel: AttentionKernel,
    plan: StepPlan,
    k: mx.array,
    v: mx.array,
    q: mx.array,
) -> mx.array:
    capacities = {slab_id: slab.capacity for slab_id, slab in storage.slabs.items()}
    cache = LayerCache(0, storage, kernel)
    cache.begin(layout_of(plan, capacities))
    cache.update_and_fetch(k, v)
    return cache.attend(q, DIM**-0.5)


def plan_of(*parts: RowWork) -> StepPlan:
    decodes = tuple(part for part in parts if part.token_ids is None)
    chunks = tuple(part for part in parts if part.token_ids is not None)
    return StepPlan(1, decodes=decodes, chunks=chunks)


def chunk(slab: int, slot: int, start: int, length: int) -> RowWork:
    return RowWork(slot, slab, slot, start, (0,) * length, yields=1)


def plain_attention(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
    """q, k, v `[T, heads, 1, dim]` of one row, causal → `[T, heads, 1, dim]`."""
    q, k, v = (x[:, :, 0].swapaxes(0, 1)[None] for x in (q, k, v))
    out = mx.fast.scaled_dot_product_attention(q, k, v, scale=DIM**-0.5, mask="causal")
    return out[0].swapaxes(0, 1)[:, :, None]


def random_tokens(n: int) -> tuple[mx.array, mx.array, mx.array]:
    return (
        mx.random.normal((n, KV_HEADS, 1, DIM)),
        mx.random.normal((n, KV_HEADS, 1, DIM)),
        mx.random.normal((n, HEADS, 1, DIM)),
    )


@KERNELS
def test_a_row_cut_into_chunks_and_single_tokens_attends_as_a_whole(
    kernel: AttentionKernel,
) -> None:
    """Another row joins, so that groups, idle slots and chunks of different slabs occur."""
    storage = storage_with(CreateSlab(0, 3, 512), CreateSlab(1, 1, 64))
    k, v, q = random_tokens(300)
    other_k, other_v, other_q = random_tokens(40)
    outputs = [forward(storage, kernel, plan_of(chunk(0, 2, 0, 200)), k[:200], v[:200], q[:200])]
    mixed = plan_of(chunk(0, 2, 200, 90), chunk(1, 0, 0, 40))
    both = forward(
        storage,
        kernel,
        mixed,
        mx.concatenate([k[200:290], other_k]),
        mx.concatenate([v[200:290], other_v]),
        mx.concatenate([q[200:290], other_q]),
    )
    outputs.append(both[:90])
    for position in range(290, 300):
        one = slice(position, position + 1)
        plan = plan_of(RowWork(2, 0, 2, position))
        outputs.append(forward(storage, kernel, plan, k[one], v[one], q[one]))
    assert mx.allclose(mx.concatenate(outputs), plain_attention(q, k, v), atol=1e-5)
    assert mx.allclose(both[90:], plain_attention(other_q, other_k, other_v), atol=1e-5)


def test_slabs_hold_nothing_of_the_forward_that_wrote_to_them() -> None:
    storage = storage_with(CreateSlab(0, 1, 2048))
    k, v, q = random_tokens(2000)
    mx.eval(k, v, q)
    before = mx.get_active_memory()
    out = forward(storage, CpuKernel(), plan_of(chunk(0, 0, 0, 2000)), k, v, q)
    mx.eval(out)
    del out
    assert mx.get_active_memory() - before < 100_000


@KERNELS
@pytest.mark.parametrize("attends", [True, False])
def test_a_chunk_of_its_own_is_written_beside_decoding_rows_without_a_copy(
    kernel: AttentionKernel, attends: bool
) -> None:
    """Whether the model hands K and V on or looks into them itself."""
    storage = storage_with(CreateSlab(0, 2, 4096))
    k, v, q = random_tokens(31)
    forward(storage, kernel, plan_of(chunk(0, 1, 0, 10)), k[:10], v[:10], q[:10])
    mx.eval(storage.keys_and_values(0, 0), k, v, q)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    decoded = forward(storage, kernel, plan_of(RowWork(0, 0, 0, 0)), k[30:], v[30:], q[30:])
    cache = ChunkCache(0, storage, kernel)
    cache.begin(chunk(0, 1, 10, 20))
    new = [x[10:30, :, 0].swapaxes(0, 1)[None] for x in (k, v, q)]
    fetched = cache.update_and_fetch(*new[:2])
    if attends:
        out = cache.attend(new[2], *fetched, DIM**-0.5, "causal", None)
        assert out is not None
    else:
        out = mx.fast.scaled_dot_product_attention(new[2], *fetched, scale=DIM**-0.5, mask="causal")
    cache.write_unattended()
    cache.end()
    mx.eval(out, decoded)
    if kernel.is_in_place(storage.layers) and attends:
        assert mx.get_peak_memory() - before < storage.nbytes // 4
    expected = plain_attention(q[:30], k[:30], v[:30])[10:]
    assert mx.allclose(out[0].swapaxes(0, 1)[:, :, None], expected, atol=1e-5)
    keys, values = storage.keys_and_values(0, 0)
    for plane, tokens in (keys, k), (values, v):
        assert mx.array_equal(plane[1, :, :30], tokens[:30, :, 0].swapaxes(0, 1))
        assert mx.array_equal(plane[0, :, 0], tokens[30, :, 0])


@KERNELS
def test_what_nobody_attends_to_is_written_all_the_same(kernel: AttentionKernel) -> None:
    storage = storage_with(CreateSlab(0, 2, 64))
    k, v, _ = random_tokens(9)
    cache = LayerCache(0, storage, kernel)
    cache.begin(layout_of(plan_of(RowWork(0, 0, 0, 5), chunk(0, 1, 0, 8)), {0: 64}))
    cache.update_and_fetch(k, v)
    cache.write_unattended()
    cache.end()
    keys, values = storage.keys_and_values(0, 0)
    for plane, tokens in (keys, k), (values, v):
        assert mx.array_equal(plane[0, :, 5], tokens[0, :, 0])
        assert mx.array_equal(plane[1, :, :8], tokens[1:, :, 0].swapaxes(0, 1))


@pytest.mark.parametrize("is_in_host_memory", [True, False])
@pytest.mark.parametrize("is_one_plan", [True, False])
def test_moves_and_resizes_keep_what_rows_hold(is_one_plan: bool, is_in_host_memory: bool) -> None:
    backend = with_policy(is_in_host_memory=is_in_host_memory)
    storage = storage_with(CreateSlab(0, 2, 8), CreateSlab(1, 1, 16), backend=backend)
    keys = storage.slabs[0].planes[0]
    keys[0] = mx.arange(keys[0].size, dtype=mx.float32).reshape(keys[0].shape)
    second = mx.array(keys[0][1, :, :5])
    mx.eval(second, storage.slabs[1].planes)
    moves = MoveRow(0, 1, 1, 0, 5), ResizeSlab(0, 4), MoveRow(0, 1, 0, 0, 5), ResizeSlab(0, 1)
    for op in moves:
        storage.apply(op)
        if not is_one_plan:
            storage.stages.run()
    storage.stages.run()
    assert keys[0].shape[0] == 1
    assert mx.array_equal(storage.slabs[1].planes[0][0][0, :, :5], second)
    assert mx.array_equal(keys[0][0, :, :5], second)
    storage.apply(DropSlab(0))
    assert storage.nbytes == 2 * 16 * KV_HEADS * DIM * 4


@KERNELS
def test_decode_steps_write_in_place_and_peak_memory_stays_flat(kernel: AttentionKernel) -> None:
    storage = storage_with(CreateSlab(0, 8, 4096))
    slab_bytes = storage.nbytes
    mx.eval(storage.slabs[0].planes)
    k, v, q = random_tokens(8)
    mx.eval(k, v, q)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    for step in range(20):
        plan = plan_of(*(RowWork(row, 0, row, 100 + step) for row in range(8)))
        mx.eval(forward(storage, kernel, plan, k, v, q))
    assert mx.get_peak_memory() - before < slab_bytes / 4


@pytest.mark.parametrize("length", [31, 32])
def test_a_chunk_that_fills_its_slab_attends_like_any_other(length: int) -> None:
    """MLX takes what covers a whole array for the array, with the strides that it has."""
    kernel = CpuKernel()
    for _ in range(5):
        storage = storage_with(CreateSlab(0, 1, 32))
        k, v, q = random_tokens(length)
        plan = plan_of(chunk(0, 0, 0, length))
        out = forward(storage, kernel, plan, k, v, q)
        mx.eval(out)
        repeated = (mx.repeat(x, HEADS // KV_HEADS, axis=1) for x in (k, v))
        assert mx.allclose(out, plain_attention(q, *repeated), atol=1e-5)


def test_a_chunk_that_fills_its_slab_leaves_it_as_it_lies() -> None:
    """Kernels read planes token by token, whatever the layout of what was written."""
    storage = storage_with(CreateSlab(0, 1, 32))
    k, v, _ = random_tokens(32)
    storage.write_chunk(0, 0, 0, 0, k[:, :, 0].swapaxes(0, 1), v[:, :, 0].swapaxes(0, 1))
    for plane in storage.slabs[0].planes[0]:
        mx.eval(plane)
        assert memoryview(plane).c_contiguous


def test_layers_are_copied_a_few_at_a_time() -> None:
    storage = KVStorage([LayerShape(KV_HEADS, DIM, DIM)] * 5, BACKEND)
    num_tokens = BACKEND.policy.max_copied_bytes // (2 * storage.layers[0].bytes_per_token)
    assert [list(group) for group in storage.layer_groups(range(5), num_tokens)] == [
        [0, 1],
        [2, 3],
        [4],
    ]
    assert len(list(storage.layer_groups(range(5), 10 * num_tokens))) == 5
    assert len(list(storage.layer_groups(range(5), 1))) == 1


def test_the_last_blocks_of_a_long_row_are_saved_without_a_copy_of_the_row() -> None:
    storage = storage_with(CreateSlab(0, 1, 4096))
    store = BlockStore(storage, None, 16)
    keys = storage.slabs[0].planes[0]
    keys[0] = mx.random.normal(keys[0].shape)
    last = mx.array(keys[0][0, :, 4000:4020])
    store.save(CreateSegment(0, 16))
    mx.eval(last, storage.slabs[0].planes, store._pool.segment(0))
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    store.save(SaveBlocks(0, 0, 250, 4020, (Place(0, 3), Place(0, 7))))
    storage.stages.run()
    assert mx.get_peak_memory() - before < keys[0].nbytes / 4
    saved = store._pool.segment(0)[0][0]
    assert mx.array_equal(saved[3], last[:, :16])
    assert mx.array_equal(saved[7, :, :4], last[:, 16:])


@pytest.mark.parametrize("start", [0, 5, 300])
@pytest.mark.parametrize("window", [None, 20, 1000])
def test_sinks_and_windows_give_the_same_on_both_kernels(start: int, window: int | None) -> None:
    length, keys = 150, start + 150
    q = mx.random.normal((HEADS, length, DIM))
    k, v = mx.random.normal((KV_HEADS, keys, DIM)), mx.random.normal((KV_HEADS, keys, DIM))
    sinks = mx.random.normal((HEADS,)) * 3
    whole = [
        kernel.chunk(q, k, v, DIM**-0.5, start, window, sinks)
        for kernel in (CpuKernel(), plain_cpu_kernel(), fused_kernel())
    ]
    assert all(mx.allclose(out, whole[-1], atol=1e-5) for out in whole)
    group = layout_of(plan_of(RowWork(0, 0, 0, keys - 1)), {0: keys})
    view = group.view_of(group.decodes[0], window, None)
    for kernel, chunk_out in zip(
        (CpuKernel(), plain_cpu_kernel(), fused_kernel()), whole, strict=True
    ):
        last = kernel.decode(q[None, :, -1:], k[None], v[None], DIM**-0.5, view, sinks)
        assert mx.allclose(last[0, :, 0], chunk_out[:, -1], atol=1e-5)


def test_a_ring_keeps_the_last_tokens_whatever_the_chunks() -> None:
    window, total = 20, 75
    shape = LayerShape(KV_HEADS, DIM, DIM, window)
    k, v, _ = random_tokens(total)
    k, v = (x[:, :, 0].swapaxes(0, 1) for x in (k, v))
    for sizes in ((75,), (1,) * 75, (7,) * 10 + (5,), (30, 1, 44)):
        storage = KVStorage([shape], BACKEND)
        storage.apply(CreateSlab(0, 2, 100))
        start = 0
        for size in sizes:
            end = start + size
            seen, _ = storage.extend_ring(0, 0, 1, start, k[:, start:end], v[:, start:end])
            assert mx.array_equal(seen, k[:, max(0, start - window + 1) : end])
            start = end
        ring = storage.slabs[0].planes[0][1][1]
        assert ring.shape[1] == shape.ring == window + 8
        for position in range(total - window, total):
            assert mx.array_equal(ring[:, position % shape.ring], v[:, position])
