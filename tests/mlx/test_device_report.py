"""What the report about a device measures, on a tiny model and on a slab."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest
from benchmarks.device_child import Task, decode, gaps_noted, look

from mlx_lm_server.protocol import Abort, AddRequest, RequestOutput
from mlx_lm_server.runner.backends.blas import Blas
from tests.back_ends import WAY

from .tiny_models import VOCAB_SIZE, write_model


class OneSlab:
    """A core whose steps write a token to a slab; whoever holds the slab makes that a copy."""

    def __init__(self, *, holds: bool) -> None:
        self._holds = holds
        self._slab = mx.zeros((4, 1024, 256))
        mx.eval(self._slab)
        self._names: list[str] = []

    @property
    def has_work(self) -> bool:
        return bool(self._names)

    def handle(self, messages: Iterable[AddRequest | Abort]) -> None:
        given = list(messages)
        is_new = isinstance(given[0], AddRequest)
        self._names = [message.req_id for message in given] if is_new else []

    def step(self) -> list[RequestOutput]:
        held = self._slab[:] if self._holds else None
        self._slab[:, 7] = 1.0
        mx.async_eval(self._slab)
        mx.eval(self._slab)
        del held
        return [RequestOutput(name, [5]) for name in self._names]

    def stats(self) -> Any:
        return SimpleNamespace(kv_used_bytes=self._slab.nbytes)


def test_an_engine_is_looked_at(tmp_path: Path) -> None:
    model = str(write_model("llama", tmp_path))
    task = Task(model, way=WAY, num_tokens=4, rows=(1, 4), prompt_tokens=1000, num_steps=6)
    seen = look(task, Blas("test"))
    assert [len(tokens) for tokens in seen.tokens] == [4, 4, 4]
    assert all(0 <= token < VOCAB_SIZE for tokens in seen.tokens for token in tokens)
    assert any("runs packed" in line for line in seen.told)
    assert [decode.num_rows for decode in seen.decodes] == [1, 4]
    for measured in seen.decodes:
        assert abs(measured.tokens_per_s * measured.step_s - measured.num_rows) < 1e-6
        assert 0 < measured.gap_s < 1
        assert 0 < measured.submit_s < 1
    assert seen.decodes[-1].peak_bytes < seen.decodes[-1].slab_bytes / 2
    assert look(task, Blas("test")).tokens == seen.tokens


@pytest.mark.parametrize("holds", [False, True])
def test_a_slab_that_is_copied_shows_in_the_memory_of_a_step(holds: bool) -> None:
    measured = decode(OneSlab(holds=holds), Task("none", num_steps=3), 4, VOCAB_SIZE)  # type: ignore[arg-type]
    assert (measured.peak_bytes > 0.9 * measured.slab_bytes) == holds
    assert (measured.peak_bytes < 0.1 * measured.slab_bytes) != holds


def test_a_gap_is_between_the_first_wait_that_ends_and_the_next_submission() -> None:
    array = mx.arange(4)
    with gaps_noted() as gaps:
        mx.async_eval(array + 1)  # nobody has waited
        mx.eval(array + 2)
        time.sleep(0.02)
        mx.eval(array + 3)
        mx.async_eval(array + 4)
        mx.async_eval(array + 5)
    [gap] = gaps
    assert 0.02 <= gap.waited_s < 1
    mx.eval(array + 6)
    mx.async_eval(array + 7)
    assert len(gaps) == 1
