"""Forwards of the same form are traced once and replayed.

To build the graph of a forward takes 2 to 5 ms of Python for 8 layers, and on a CPU that time is
taken from the products' threads. `mx.compile` builds it again from a trace in a quarter of that
(docs/adr/0009). For this all that differs between forwards of one form comes as arrays: token ids,
positions, places, what attention in C is told, and the slabs themselves. A form is traced when it
was built a few times, so that a batch that changes with every step costs nothing.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import mlx.core as mx

from mlx_lm_server.runner.seam.attention import SEAM_ERRORS
from mlx_lm_server.runner.state.kv_storage import KVStorage
from mlx_lm_server.runner.state.step_layout import StepArray, StepLayout

log = logging.getLogger(__name__)

# A larger forward takes so long that building it hardly matters.
MAX_REPLAYED_TOKENS = 128
# So often a form is built before it is traced, which takes as long as building it several times.
TIMES_BUILT = 4
MAX_TRACES = 32
MAX_FORMS = 256

# Layout, ids `[T]`, and where rows sample: None for all tokens. Gives what the forward is for.
Build = Callable[[StepLayout, mx.array, mx.array | None], mx.array]


class Form(NamedTuple):
    """What the graph of a forward depends on, beside the model."""

    slabs: tuple[tuple[int, int], ...]  # slots and capacity
    decodes: tuple[tuple[int, int], ...]  # of each group its slab, as numbered here, and its tokens
    chunks: tuple[tuple[int, int], ...]
    num_sampling: int


class Replays:
    """Used on the engine's main thread only."""

    def __init__(self, build: Build, storage: KVStorage) -> None:
        self._build = build
        self._storage = storage
        self._is_on = True
        self.traces_at_once = False  # the second time, to try it
        self._times_built: OrderedDict[Form, int] = OrderedDict()
        self._traces: OrderedDict[Form, _Trace] = OrderedDict()

    @property
    def num_traces(self) -> int:
        return len(self._traces)

    def run(self, layout: StepLayout, ids: mx.array, positions: mx.array | None) -> mx.array:
        """What `build` gives, traced or not."""
        form = self._form(layout, len(ids) if positions is None else len(positions))
        trace = self._traces.get(form) if self._is_on else None
        if trace is not None:
            self._traces.move_to_end(form)
            try:
                return trace(layout, ids, positions)
            except SEAM_ERRORS as error:
                log.warning("forwards are built anew for each step: %s", error)
                self._is_on = False
        result = self._build(layout, ids, positions)
        if not self._is_on:
            return result
        times_built = self._times_built.pop(form, 0) + 1
        if times_built < TIMES_BUILT and not self.traces_at_once:
            _put(self._times_built, form, times_built, MAX_FORMS)
        else:
            trace = _Trace(self._build, self._storage, layout.named_arrays)
            _put(self._traces, form, trace, MAX_TRACES)
        return result

    def _form(self, layout: StepLayout, num_sampling: int) -> Form:
        slab_ids = layout.slab_ids
        numbers = {slab_id: number for number, slab_id in enumerate(slab_ids)}
        slabs = (self._storage.slabs[slab_id] for slab_id in slab_ids)
        return Form(
            tuple((slab.num_slots, slab.capacity) for slab in slabs),
            tuple((numbers[group.slab_id], group.num_tokens) for group in layout.decodes),
            tuple((numbers[chunk.slab_id], chunk.num_tokens) for chunk in layout.chunks),
            num_sampling,
        )


class _Trace:
    """One form's graph."""

    def __init__(self, build: Build, storage: KVStorage, names: Sequence[StepArray]) -> None:
        self._build = build
        self._storage = storage
        self._names = names
        self._layout: StepLayout | None = None  # while the trace is made
        self._replay = mx.compile(self._record)

    def __call__(self, layout: StepLayout, ids: mx.array, positions: mx.array | None) -> mx.array:
        slabs = [self._storage.slabs[slab_id] for slab_id in layout.slab_ids]
        before = [slab.planes for slab in slabs]
        arrays = [layout.array(name) for name in self._names]
        self._layout = layout
        try:
            result, after = self._replay(ids, positions, arrays, before)
        except BaseException:
            for slab, planes in zip(slabs, before, strict=True):
                slab.planes = planes
            raise
        finally:
            self._layout = None
        for slab, planes in zip(slabs, after, strict=True):
            slab.planes = planes
        return result

    def _record(
        self,
        ids: mx.array,
        positions: mx.array | None,
        arrays: list[mx.array],
        planes: list[list[list[mx.array]]],
    ) -> tuple[mx.array, list[list[list[mx.array]]]]:
        """What is traced; the arrays stand for any of their shape."""
        assert self._layout is not None
        slabs = [self._storage.slabs[slab_id] for slab_id in self._layout.slab_ids]
        for slab, standing_for in zip(slabs, planes, strict=True):
            slab.planes = standing_for
        layout = self._layout.sealed(dict(zip(self._names, arrays, strict=True)))
        result = self._build(layout, ids, positions)
        return result, [slab.planes for slab in slabs]


def _put(kept: OrderedDict[Form, Any], form: Form, what: Any, at_most: int) -> None:
    kept[form] = what
    if len(kept) > at_most:
        kept.popitem(last=False)
