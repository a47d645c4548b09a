"""Counts the operations that MLX is given to compute: what a GPU would be sent, on any machine.

MLX computes lazily: `mx.eval` and `mx.async_eval` get arrays with a graph of primitives behind
them, and on a GPU each primitive that is no view becomes a kernel (some, such as a sort, several).
That graph is the same whatever the device, but for MLX's fused operations, which a CPU takes apart
when the graph is built. `one_node_each` puts stand-ins in their place, so that they count as on a
GPU. What stand-ins compute means nothing; shapes and types are right.

A `Reshape` is counted as a view, which it is wherever its input lies in order.

Graphs know no shapes, so bytes are counted where operations are called from Python: not those that
MLX calls by itself, nor `array.at`.
"""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import mlx.core as mx
from mlx.utils import tree_flatten

# A stand-in is one of these operations, which no model has, followed by a `Depends`.
STANDS_FOR = {
    "Sinh": "RMSNorm",
    "ArcSinh": "LayerNorm",
    "Cosh": "RoPE",
    "ErfInv": "ScaledDotProductAttention",
    "ArcTan": "Dequantize",
}
VIEWS = {
    "AsStrided", "Broadcast", "Depends", "ExpandDims", "Flatten", "Reshape", "Slice", "Split",
    "Squeeze", "StopGradient", "Transpose", "Unflatten", "View",
}  # fmt: skip
# What moves numbers and computes none.
MOVES = ("contiguous", "concatenate", "stack", "take", "take_along_axis", "repeat", "tile", "pad")
# The real one, where another stands in its place.
_eval = mx.eval

_PRIMITIVE = re.compile(r'label ="([^"]+)", shape=rectangle')


@dataclass(slots=True)
class Counts:
    """`nodes` are primitives by name. A submission is a call that had something to compute, a wait
    the first call after one that returns when something has been computed. Bytes of K and V are
    those of the arrays that attention and `mx.dequantize` were given; written are those that were
    put in places of another array, copied those of results that are their inputs or parts of them,
    moved."""

    nodes: Counter[str] = field(default_factory=Counter)
    num_submissions: int = 0
    num_waits: int = 0
    kv_bytes: int = 0
    written_bytes: int = 0
    copied_bytes: int = 0
    num_decode_attentions: int = 0
    num_chunk_attentions: int = 0

    @property
    def num_nodes(self) -> int:
        return self.nodes.total()

    @property
    def num_kernels(self) -> int:
        return sum(count for name, count in self.nodes.items() if not is_view(name))


def is_view(name: str) -> bool:
    """Some names go on with a type, such as `View uint8`."""
    return name.split()[0] in VIEWS


def primitives(arrays: Any) -> Counter[str]:
    """Returns how many primitives of each name are to be computed for arrays in any nesting."""
    leaves = cast(list[tuple[str, Any]], tree_flatten(arrays))
    outputs = [leaf for _, leaf in leaves if isinstance(leaf, mx.array)]
    if not outputs:
        return Counter()
    text = io.StringIO()
    mx.export_to_dot(text, *outputs)
    found = Counter(_PRIMITIVE.findall(text.getvalue()))
    for name, real_name in STANDS_FOR.items():
        if count := found.pop(name, 0):
            found[real_name] = count
            found["Depends"] -= count
    return +found


@contextmanager
def counting() -> Iterator[Counts]:
    """Counts all that is submitted; a list that is made of an array submits it too. As it begins
    something is under way."""
    counts, is_under_way = Counts(), True

    def submitted(submit: Callable[..., Any]) -> Callable[..., Any]:
        def submit_counted(*arrays: Any) -> Any:
            nonlocal is_under_way
            nodes = primitives(arrays)
            counts.nodes += nodes
            counts.num_submissions += bool(nodes)
            is_under_way |= bool(nodes)
            return submit(*arrays)

        return submit_counted

    def waited(wait: Callable[..., Any]) -> Callable[..., Any]:
        submit = submitted(wait)

        def wait_counted(*arrays: Any) -> Any:
            nonlocal is_under_way
            given = submit(*arrays)
            counts.num_waits += is_under_way and bool(arrays)
            is_under_way &= not arrays
            return given

        return wait_counted

    def written(put: Callable[..., Any]) -> Callable[..., Any]:
        def put_counted(array: mx.array, places: Any, values: Any) -> Any:
            counts.written_bytes += pick(array, places).nbytes
            return put(array, places, values)

        return put_counted

    def picked(pick: Callable[..., mx.array]) -> Callable[..., mx.array]:
        def pick_counted(array: mx.array, places: Any) -> mx.array:
            found = pick(array, places)
            counts.copied_bytes += found.nbytes if _is_gather(places) else 0
            return found

        return pick_counted

    def moved(move: Callable[..., mx.array]) -> Callable[..., mx.array]:
        def move_counted(*given: Any, **named: Any) -> mx.array:
            found = move(*given, **named)
            counts.copied_bytes += found.nbytes
            return found

        return move_counted

    def multiplied(product: Callable[..., mx.array]) -> Callable[..., mx.array]:
        def quantized_matmul(x: mx.array, w: mx.array, *rest: Any, **named: Any) -> mx.array:
            if w.ndim > 2:  # no weights, but K or V in few bits
                counts.kv_bytes += _nbytes(w, *rest, *named.values())
                counts.num_decode_attentions += bool(named.get("transpose", True))
            return product(x, w, *rest, **named)

        return quantized_matmul

    def attended(attention: Callable[..., mx.array]) -> Callable[..., mx.array]:
        def attend(q: mx.array, k: mx.array, v: mx.array, **named: Any) -> mx.array:
            counts.kv_bytes += _nbytes(k, v)
            counts.num_decode_attentions += q.shape[2] == 1
            counts.num_chunk_attentions += q.shape[2] > 1
            return attention(q, k, v, **named)

        return attend

    def dequantised(dequantise: Callable[..., mx.array]) -> Callable[..., mx.array]:
        def dequantize(w: mx.array, *rest: Any, **named: Any) -> mx.array:
            if w.ndim > 2:
                counts.kv_bytes += _nbytes(w, *rest, *named.values())
            return dequantise(w, *rest, **named)

        return dequantize

    pick = mx.array.__getitem__
    with ExitStack() as replaced:
        for owner, name, spy in (
            (mx, "eval", waited),
            (mx, "async_eval", submitted),
            (mx.array, "tolist", waited),
            (mx.array, "item", waited),
            (mx.array, "__setitem__", written),
            (mx.array, "__getitem__", picked),
            *((mx, name, moved) for name in MOVES),
            (mx, "quantized_matmul", multiplied),
            (mx, "dequantize", dequantised),
            (mx.fast, "scaled_dot_product_attention", attended),
        ):
            replaced.enter_context(_replaced(owner, name, spy))
        yield counts


def _is_gather(places: Any) -> bool:
    """Whether what lies there is copied by being picked; slices are views."""
    several = places if isinstance(places, tuple) else (places,)
    is_number = isinstance(places, int)
    return is_number or any(isinstance(each, mx.array | list) for each in several)


@contextmanager
def one_node_each() -> Iterator[None]:
    """While it lasts, MLX's fused operations are one primitive each, and compute nonsense."""
    with (
        _replaced(mx.fast, "rms_norm", lambda _: _rms_norm),
        _replaced(mx.fast, "layer_norm", lambda _: _layer_norm),
        _replaced(mx.fast, "rope", lambda _: _rope),
        _replaced(mx.fast, "scaled_dot_product_attention", lambda _: _attention),
        _replaced(mx, "dequantize", lambda _: _dequantize),
    ):
        yield


@contextmanager
def _replaced(owner: Any, name: str, make: Callable[[Any], Any]) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, make(original))
    try:
        yield
    finally:
        setattr(owner, name, original)


def _nbytes(*arrays: Any) -> int:
    return sum(array.nbytes for array in arrays if isinstance(array, mx.array))


# ---- stand-ins


def _after(marked: mx.array, *read: Any) -> mx.array:
    """Returns the marked array, of which the others are inputs too."""
    inputs = [array for array in read if isinstance(array, mx.array)]
    after: mx.array = mx.depends([marked], inputs)[0]
    return after


def _rms_norm(x: mx.array, weight: mx.array | None, eps: float, **_: Any) -> mx.array:
    return _after(mx.sinh(x), weight)


def _layer_norm(x: mx.array, weight: Any, bias: Any, eps: float, **_: Any) -> mx.array:
    return _after(mx.arcsinh(x), weight, bias)


def _rope(x: mx.array, dims: int, *, offset: Any, freqs: Any = None, **_: Any) -> mx.array:
    return _after(mx.cosh(x), offset, freqs)


def _attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    scale: float,
    mask: Any = None,
    sinks: mx.array | None = None,
    **_: Any,
) -> mx.array:
    """What MLX adds to the graph by itself is there too: casts to one type, and a mask that is
    spread over heads and queries."""
    dtype = mx.result_type(q, k, v)
    q, k, v = (x.astype(dtype) for x in (q, k, v))
    if isinstance(mask, mx.array):
        mask = mask if mask.dtype == mx.bool_ else mask.astype(dtype)
        mask = mx.broadcast_to(mask, (*q.shape[:3], k.shape[2]))
    marked = mx.erfinv(q)
    if q.shape[-1] != v.shape[-1]:
        return _shaped((*q.shape[:3], v.shape[-1]), dtype, marked, k, v, mask, sinks)
    return _after(marked, k, v, mask, sinks)


def _dequantize(
    w: mx.array,
    scales: mx.array,
    biases: mx.array | None = None,
    group_size: int | None = None,
    bits: int | None = None,
    **_: Any,
) -> mx.array:
    shape = (*w.shape[:-1], w.shape[-1] * 32 // (bits or 4))
    return _shaped(shape, scales.dtype, mx.arctan(scales), w, biases)


def _shaped(shape: tuple[int, ...], dtype: mx.Dtype, *read: Any) -> mx.array:
    """Returns zeros that read these arrays. They are computed now, so that they are no nodes."""
    zeros = mx.zeros(shape, dtype)
    _eval(zeros)
    return _after(zeros, *read)
