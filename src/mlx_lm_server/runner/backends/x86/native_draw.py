"""The draw of a whole batch in C, for CPUs: `native/draw` on the buffers of evaluated arrays.

`sampling/race.py` says the same with arrays, for GPUs and machines without a compiler. There a row
of 8192 costs a dozen passes over memory, here it stays in the cache (docs/adr/0004).
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence

import mlx.core as mx

from mlx_lm_server import native
from mlx_lm_server.protocol import SamplingParams

_FIELDS = (
    ("inverse_temperature", ctypes.c_float),
    ("min_p", ctypes.c_float),
    ("top_p", ctypes.c_float),
    ("top_k", ctypes.c_int32),
    ("key_a", ctypes.c_uint32),
    ("key_b", ctypes.c_uint32),
)


class _RowParams(ctypes.Structure):
    """`draw_params` of draw.c."""

    _fields_ = _FIELDS


class NativeDraw:
    """Knows no row; owned by the sampler."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._draw_rows = library.draw_rows
        self._scratch = (ctypes.c_float * 0)()

    def fill(
        self,
        tokens: mx.array,
        logits: mx.array,
        params: Sequence[SamplingParams],
        keys: Sequence[int],
        drawn: Mapping[int, int],
    ) -> None:
        """`RowDraw.fill`. Raises ValueError where the library refuses."""
        num_rows, vocab_size = logits.shape
        if len(self._scratch) < 2 * vocab_size:
            self._scratch = (ctypes.c_float * (2 * vocab_size))()
        rows = (_RowParams * num_rows)(*map(_row_params, params, keys))
        found = (ctypes.c_int32 * num_rows).from_buffer(memoryview(tokens))  # type: ignore[arg-type]
        if not self._draw_rows(num_rows, vocab_size, _address(logits), rows, self._scratch, found):
            raise ValueError(f"{num_rows} rows of {vocab_size} tokens cannot be drawn from")
        for place, token in drawn.items():
            found[place] = token


def load() -> NativeDraw | None:
    """Returns the draw, or None where nothing can be compiled, or the library takes its parameters
    for something else."""
    library = native.load("draw")
    return NativeDraw(library) if library is not None and knows_fields(library) else None


def knows_fields(library: ctypes.CDLL) -> bool:
    """Returns whether parameters have the same fields, in the same order, there and here."""
    fields = "".join(f"{name}:{kind._type_} " for name, kind in _FIELDS)
    return native.text_in(library, "draw_fields") == fields


def _row_params(params: SamplingParams, key: int) -> _RowParams:
    temperature = params.temperature
    return _RowParams(
        1.0 / temperature if temperature else 0.0,
        params.min_p,
        params.top_p,
        params.top_k,
        key >> 32,
        key & 0xFFFFFFFF,
    )


def _address(array: mx.array) -> ctypes.c_void_p:
    """Where the elements of an evaluated array lie."""
    view = memoryview(array)  # type: ignore[arg-type]
    assert view.c_contiguous
    return ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(view)))
