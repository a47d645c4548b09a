"""Quantised K and V on the bundled model, as a user turns them on."""

from __future__ import annotations

from pathlib import Path

from tests.observations import observes

from .conftest import Nano


@observes("KVConfig.kv_bits", "KVConfig.kv_group_size")
def test_nano_answers_with_its_kv_in_eight_bits(tmp_path: Path) -> None:
    nano = Nano(tmp_path / "log", "--kv-bits", "8", "--kv-group-size", "32")
    try:
        assert "8-bit, groups of 32" in nano.client.get("/health").text
        body = {
            "messages": [{"role": "user", "content": "What is the capital of France?"}],
            "temperature": 0,
        }
        for _ in range(2):  # the second one from the cache
            answer = nano.client.post("/v1/chat/completions", json=body).json()
            assert answer["choices"][0]["message"]["content"] == "The capital of France is Paris."
    finally:
        assert nano.stop() == 0
