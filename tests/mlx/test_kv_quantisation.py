"""K and V in 8 and 4 bits: all products give what dequantised arrays give, and a row's tokens do
not depend on how its prompt was cut or on who shares the batch."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path

import mlx.core as mx
import pytest
from msgspec.structs import replace as changed

from mlx_lm_server.errors import UnsupportedModelError
from mlx_lm_server.runner.backends.fused_kernel import FusedKernel, decode_packed
from mlx_lm_server.runner.backends.x86.code_products import (
    CodeProducts,
    NativeCodeProducts,
    choose_products,
)
from mlx_lm_server.runner.backends.x86.kernel import CpuKernel
from mlx_lm_server.runner.state.kv_quantisation import PackedKV, Quantisation, quantised
from mlx_lm_server.runner.state.kv_storage import KVStorage, LayerShape
from mlx_lm_server.runner.state.step_layout import SlotsView
from tests.back_ends import BACKEND

from .driver import GREEDY, EngineDriver, random_prompts
from .tiny_models import VOCAB_SIZE, write_model

PROMPTS = random_prompts(11, (1, 17, 40, 3), VOCAB_SIZE)
LONG_PROMPTS = random_prompts(12, (190, 23), VOCAB_SIZE)
SHORT = changed(GREEDY, max_tokens=12)
# Packed tokens, rings, sinks, shared KV, fetched KV by head and of MLA, state beside KV and in it.
FAMILIES = (
    ("qwen3", 8),
    ("qwen3", 4),
    ("gemma3_text", 8),
    ("gpt_oss", 4),
    ("gemma4_text", 8),
    ("gemma2", 4),
    ("deepseek_v3", 8),
    ("qwen3_next", 4),
    ("baichuan_m1", 8),
)
LAYERS = [LayerShape(2, 64, 64), LayerShape(2, 96, 32), LayerShape(2, 16, 16)]


def stored(bits: int, group_size: int, dim: int, length: int = 50) -> PackedKV:
    """The first 3 slots and 50 places of a plane that has more."""
    quantisation = Quantisation(bits, group_size)
    planes = quantisation.pack(mx.random.normal((4, 2, 64, dim)))
    codes, scales, biases = (plane[:3, :, :length] for plane in planes)
    return PackedKV(codes, scales, biases, quantisation, planes[0])


def kernel_of(products: CodeProducts) -> CpuKernel:
    kernel = CpuKernel()
    kernel._products = products
    return kernel


@pytest.mark.parametrize(("bits", "group_size"), list(product((8, 4), (32, 64))))
def test_what_is_read_is_what_mlx_dequantises(bits: int, group_size: int) -> None:
    packed = stored(bits, group_size, 128)
    plain = mx.dequantize(
        packed.codes, packed.scales, packed.biases, group_size=group_size, bits=bits
    )
    assert mx.allclose(packed.by_plain_operations(), plain, atol=1e-6)
    assert mx.allclose(packed.dequantised(), plain, atol=1e-6)


@pytest.mark.parametrize("share", [1, 2, 5])
@pytest.mark.parametrize(("bits", "group_size", "dim"), list(product((8, 4), (32, 64), (64, 128))))
def test_all_ways_to_attend_to_codes_agree(
    bits: int, group_size: int, dim: int, share: int
) -> None:
    k, v = stored(bits, group_size, dim), stored(bits, group_size, dim)
    q = mx.random.normal((3, 2 * share, 1, dim))
    visible = (mx.arange(50)[None] < mx.array([5, 50, 17])[:, None])[:, None, None]
    view = SlotsView(visible.shape[-1], visible)
    fused = FusedKernel(KVStorage([], BACKEND).read, multiplies_codes=False)
    ways = [kernel_of(CodeProducts()).decode, fused.decode, decode_packed]
    if isinstance(choose_products(), NativeCodeProducts):
        ways.append(kernel_of(NativeCodeProducts()).decode)
    for sinks in (None, mx.random.normal((2 * share,))):
        plain = mx.fast.scaled_dot_product_attention(
            q, k.dequantised(), v.dequantised(), scale=0.1, mask=visible, sinks=sinks
        )
        for way in ways:
            assert mx.allclose(way(q, k, v, 0.1, view, sinks), plain, atol=2e-5)


def test_sixteen_bits_leave_every_layer_as_it_is() -> None:
    assert quantised(LAYERS, 16, 64) == LAYERS
    assert quantised(LAYERS, None, 64) == LAYERS  # the choice for a CPU


def test_a_device_s_own_choice_takes_smaller_groups_and_then_none() -> None:
    kept = [layer.format for layer in quantised(LAYERS, None, 64, default_bits=8)]
    assert kept == ["8-bit, groups of 64", "8-bit, groups of 32", "float32"]


def test_what_was_asked_for_and_cannot_be_is_refused_with_the_reason() -> None:
    with pytest.raises(UnsupportedModelError, match=r"layer 1 keeps 96 .* K and 32 of V.* 64"):
        quantised(LAYERS, 8, 64)
    with pytest.raises(UnsupportedModelError, match="no K and V"):
        quantised([], 4, 64)
    assert quantised(LAYERS[:2], 4, 32) == [
        replace(layer, quantisation=Quantisation(4, 32)) for layer in LAYERS[:2]
    ]


def test_a_model_whose_heads_do_not_divide_does_not_start(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="--kv-bits 8: layer 0 keeps 16"):
        EngineDriver(write_model("llama", tmp_path / "llama"), kv_bits=8)
    with pytest.raises(UnsupportedModelError, match="no K and V"):
        EngineDriver(write_model("mamba2", tmp_path / "mamba2"), kv_bits=8)


@pytest.mark.parametrize(("family", "bits"), FAMILIES)
def test_chunks_and_batches_give_the_tokens_of_a_row_alone_and_whole(
    family: str, bits: int, tmp_path: Path
) -> None:
    folder = write_model(family, tmp_path / family, has_wide_heads=True)
    how = {"kv_bits": bits, "kv_group_size": 32}
    whole = EngineDriver(folder, **how)
    assert (whole.ready.kv_bits, whole.ready.kv_format) == (bits, f"{bits}-bit, groups of 32")
    alone = [whole.run([prompt], SHORT)[0] for prompt in PROMPTS]
    assert whole.run(PROMPTS, SHORT) == alone
    long = whole.run(LONG_PROMPTS, SHORT)
    for chunk in (1, 7, 16, 512):
        engine = EngineDriver(folder, prefill_step_size=chunk, **how)
        assert engine.run(PROMPTS, SHORT) == alone
        if chunk >= 16:
            assert engine.run(LONG_PROMPTS, SHORT) == long


def test_quantised_rows_that_are_preempted_go_on_with_the_same_tokens(tmp_path: Path) -> None:
    folder = write_model("qwen3", tmp_path / "qwen3", has_wide_heads=True)
    prompts = random_prompts(4, (40, 60), VOCAB_SIZE)
    jobs = [(p, changed(GREEDY, max_tokens=400, seed=i)) for i, p in enumerate(prompts)]
    cramped = EngineDriver(folder, max_kv_tokens=900, kv_bits=8)
    assert cramped.run_each(jobs) == EngineDriver(folder, kv_bits=8).run_each(jobs)
    assert cramped.core.stats().num_preemptions_total > 0


def test_steps_write_quantised_slabs_and_rings_in_place(tmp_path: Path) -> None:
    folder = write_model("gemma3_text", tmp_path / "gemma3", has_wide_heads=True)
    engine = EngineDriver(folder, max_batch_size=4, kv_bits=8, kv_group_size=32)
    for i, prompt in enumerate(random_prompts(3, (1500,) * 4, VOCAB_SIZE)):
        engine.add(f"long-{i}", prompt, changed(GREEDY, max_tokens=200))
    while not all(engine.tokens.values()):
        engine.step()
    held = engine.core.stats().kv_used_bytes
    assert engine.usual_peak_bytes() < held / 2
    assert engine.core.stats().kv_used_bytes == held
