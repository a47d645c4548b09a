"""The counter of operations (benchmarks/graphs.py) sees what a layer is given more to do."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import msgspec
import pytest
from benchmarks.graphs import Counts, counting, one_node_each, primitives
from mlx_lm.models import qwen3

from tests.mlx.driver import GREEDY, EngineDriver
from tests.mlx.tiny_models import write_model

Planted = Callable[[mx.array], mx.array]
NUM_LAYERS = 2
PROMPT = [1, 2, 3]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> EngineDriver:
    model = write_model("qwen3", tmp_path_factory.mktemp("shape"))
    engine = EngineDriver(model, way="metal", kv_bits=16, keeps_profile=False)
    for name in ("a", "b"):
        engine.add(name, PROMPT, msgspec.structs.replace(GREEDY, max_tokens=1000))
    for _ in range(6):  # until both rows do nothing but decode
        engine.step()
    return engine


def step_of(engine: EngineDriver) -> Counts:
    """A decode step whose forward was built with what is planted now."""
    with one_node_each():
        engine.step()
        with counting() as counts:
            engine.step()
    return counts


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Callable[[Planted], None]:
    """Lets each layer do something with its input first."""
    layer = qwen3.TransformerBlock.__call__

    def planted(operation: Planted) -> None:
        monkeypatch.setattr(
            qwen3.TransformerBlock,
            "__call__",
            lambda self, x, *rest: layer(self, operation(x), *rest),
        )

    return planted


def test_an_operation_more_a_layer_is_a_node_and_a_kernel_more_a_layer(
    engine: EngineDriver, plant: Callable[[Planted], None]
) -> None:
    plain = step_of(engine)
    plant(mx.sin)
    planted = step_of(engine)
    assert planted.nodes - plain.nodes == {"Sin": NUM_LAYERS}
    assert planted.num_nodes == plain.num_nodes + NUM_LAYERS
    assert planted.num_kernels == plain.num_kernels + NUM_LAYERS


def test_a_view_more_a_layer_is_no_kernel(
    engine: EngineDriver, plant: Callable[[Planted], None]
) -> None:
    plain = step_of(engine)
    plant(lambda x: mx.swapaxes(x, 0, 1).swapaxes(0, 1))
    planted = step_of(engine)
    assert planted.num_nodes == plain.num_nodes + 2 * NUM_LAYERS
    assert planted.num_kernels == plain.num_kernels


def test_a_step_draws_submits_a_forward_and_attends_once_a_layer(engine: EngineDriver) -> None:
    counts = step_of(engine)
    assert counts.num_submissions == 2
    assert counts.num_decode_attentions == NUM_LAYERS
    assert counts.num_chunk_attentions == 0
    heads, dim, item_bytes, rows = 2, 16, 4, 2
    held = len(PROMPT) + len(engine.tokens["a"])
    assert counts.kv_bytes == NUM_LAYERS * 2 * rows * held * heads * dim * item_bytes


def test_fused_operations_are_one_node_each() -> None:
    x, weight = mx.ones((2, 4, 1, 64)), mx.ones((64,))
    k, v = mx.ones((2, 2, 8, 64)), mx.ones((2, 2, 8, 32))
    mx.eval(x, weight, k, v)
    with one_node_each():
        q = mx.fast.rope(
            mx.fast.rms_norm(x, weight, 1e-6),
            64,
            traditional=False,
            base=1e4,
            scale=1.0,
            offset=mx.array([3, 4]),
        )
        out = mx.fast.scaled_dot_product_attention(q, k, v, scale=1.0, mask=None)
        found = primitives([mx.fast.layer_norm(out, None, None, 1e-6)])
    assert out.shape == (2, 4, 1, 32)
    names = ("RMSNorm", "RoPE", "ScaledDotProductAttention", "LayerNorm")
    assert found == dict.fromkeys(names, 1)


def test_what_is_computed_already_is_not_counted() -> None:
    x = mx.ones((3,)) + 1
    mx.eval(x)
    with counting() as counts:
        mx.eval(x)
        (x * x).tolist()
    assert counts.nodes == {"Multiply": 1}
    assert counts.num_submissions == 1


def test_what_is_put_in_place_is_written_and_what_moves_is_copied() -> None:
    row_bytes = 8 * 4
    x, y = mx.zeros((6, 8)), mx.ones((2, 8))
    mx.eval(x, y)
    with counting() as counts:
        x[mx.array([1, 4])] = y
        x[5:] = 0.0
    assert (counts.written_bytes, counts.copied_bytes) == (3 * row_bytes, 0)
    with counting() as counts:
        mx.concatenate([mx.contiguous(x[1:3]), y])  # a slice is a view
        x[mx.array([1, 4, 5])]
        x[2]
    assert (counts.written_bytes, counts.copied_bytes) == (0, (2 + 4 + 3 + 1) * row_bytes)


def test_a_wait_is_counted_once_for_what_was_submitted_before_it() -> None:
    x = mx.ones((3,))
    mx.eval(x)
    with counting() as counts:
        mx.eval()
        x.tolist()  # whatever was under way as counting began
        x.tolist()
        assert counts.num_waits == 1
        y = x + 1
        mx.async_eval(y)
        mx.eval(y)
        y.tolist()
        assert counts.num_waits == 2
        (y + 1).tolist()
    assert counts.num_waits == 3


def test_codes_that_are_read_are_one_node_and_bytes_of_keys() -> None:
    codes = mx.quantize(mx.ones((2, 2, 8, 64)), group_size=64, bits=8)
    mx.eval(codes)
    with one_node_each(), counting() as counts:
        read = mx.dequantize(*codes, group_size=64, bits=8)
        mx.eval(read)
    assert read.shape == (2, 2, 8, 64)
    assert counts.nodes == {"Dequantize": 1}
    assert counts.kv_bytes == sum(array.nbytes for array in codes)
