from __future__ import annotations

from dataclasses import replace

import pytest

from mlx_lm_server.core.kv_geometry import KVGeometry
from mlx_lm_server.core.memory_ledger import ForwardBytes, MemoryLedger, format_bytes
from mlx_lm_server.errors import ModelTooLargeError

GIB = 1024**3
KIB = 1024


def _ledger(max_kv_tokens: int | None = None, weights_bytes: int = 5 * GIB) -> MemoryLedger:
    return MemoryLedger(
        memory_limit_bytes=8 * GIB,
        weights_bytes=weights_bytes,
        forward=ForwardBytes(512 * KIB),
        max_step_tokens=2048,
        geometry=KVGeometry(144 * KIB),
        max_kv_tokens=max_kv_tokens,
    )


def test_kv_gets_what_weights_and_activations_leave_in_whole_tokens():
    ledger = _ledger()
    assert ledger.free_bytes == 2 * GIB
    assert ledger.kv_limit_tokens == 2 * GIB // (144 * KIB)
    assert ledger.kv_limit_bytes == ledger.kv_limit_tokens * 144 * KIB


def test_the_operators_cap_on_kv_tokens_holds():
    assert _ledger(max_kv_tokens=1000).kv_limit_tokens == 1000
    assert _ledger(max_kv_tokens=10**9).kv_limit_tokens == _ledger().kv_limit_tokens


def test_a_model_that_does_not_fit_is_refused_with_the_numbers():
    ledger = _ledger(weights_bytes=9 * GIB)
    assert ledger.kv_limit_bytes == 0
    with pytest.raises(ModelTooLargeError) as refusal:
        ledger.check_model_fits(min_kv_tokens=256)
    for number in ("256 tokens", "36 MiB", "8 GiB memory limit", "9 GiB weights", "-2 GiB"):
        assert number in str(refusal.value)


def test_a_model_that_fits_passes():
    _ledger().check_model_fits(min_kv_tokens=256)


def test_the_arithmetic_names_every_part():
    assert _ledger(max_kv_tokens=1000).arithmetic() == (
        "8 GiB memory limit - 5 GiB weights - 1 GiB activations of 2048 tokens = 2 GiB, "
        "capped at 1000 tokens: 1000 tokens x 144 KiB = 140.6 MiB of KV"
    )


def test_what_attention_takes_for_a_moment_is_not_given_to_rows():
    """36 layers with 8 heads of 128 for K and V in 8 bits: one layer is read into numbers at once,
    and the scores of 32 heads are there for each pair."""
    plain = _ledger()
    forward = ForwardBytes(512 * KIB, 64.0, 4 * KIB, reads_all=True)
    ledger = replace(plain, forward=forward, max_step_pairs=1 << 20)
    assert ledger.score_bytes == 64 << 20
    assert ledger.kv_limit_tokens < plain.kv_limit_tokens
    beside = ledger.kv_limit_tokens * (4 * KIB + 64) + ledger.score_bytes
    assert 0 <= plain.free_bytes - ledger.kv_limit_bytes - beside < 200 * KIB
    assert "attention over long contexts" in ledger.arithmetic()
    held = ledger.weights_bytes + ledger.step_bytes
    assert held + ledger.free_bytes == ledger.memory_limit_bytes
    of_one_row = replace(forward, per_pair=0.0, reads_all=False)
    ledger = replace(plain, forward=of_one_row, max_read_tokens=1000)
    assert ledger.attention_bytes == 1000 * 4 * KIB


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 bytes"),
        (1023, "1023 bytes"),
        (1536, "1.5 KiB"),
        (-GIB, "-1 GiB"),
        (10**15, "909.5 TiB"),
    ],
)
def test_byte_counts_read_well(num_bytes: int, text: str):
    assert format_bytes(num_bytes) == text
