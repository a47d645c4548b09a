"""An mlx-lm model that computes logits only where they are asked for.

The logits of a long prompt would take more memory than all of its KV, and models differ in what
stands after their last layer (tied or own head, scaling, soft cap). So the model stays whole: its
backbone, the module that holds the layers, is given a class that passes on only the hidden states
of the chosen positions, and the model's own code makes logits of those.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx.utils import tree_reduce


class _Picker:
    """What the backbone passes on, and the hidden states it had."""

    is_on = True
    positions: mx.array | None = None
    hidden: mx.array | None = None
    given: mx.array | None = None  # hidden states to pass on in place of a forward's

    def pick(self, hidden: mx.array) -> mx.array:
        self.hidden = hidden
        if self.positions is None:
            return hidden
        return hidden.reshape(-1, 1, hidden.shape[-1])[self.positions]


class LanguageModel:
    """Used on the engine's main thread only."""

    def __init__(self, model: Module) -> None:
        self.model = model
        self._picker: _Picker | None = None
        backbone = _backbone_of(model)
        if backbone is not None:
            self._picker = _Picker()
            _let_pick(backbone, self._picker)
            self._check_picking(self._picker)

    @property
    def tells_hidden_states(self) -> bool:
        """Whether `run` gives hidden states, and not logits in their place."""
        return self._picker is not None

    def __call__(
        self, ids: mx.array, caches: list[Any], positions: list[int] | None = None
    ) -> mx.array:
        """The logits of `run`."""
        return self.run(ids, caches, positions)[0]

    def run(
        self, ids: mx.array, caches: list[Any], positions: list[int] | mx.array | None = None
    ) -> tuple[mx.array, mx.array]:
        """ids `[B, L]` → logits `[n, vocab]` at `positions` of the B · L tokens, all of them for
        None; and what `head` takes, `[B, L, dim]`. Where no position is asked for, some array
        that is computed with the forward stands for the logits."""
        if positions is not None and len(positions) == ids.size:
            positions = None
        samples_none = positions is not None and len(positions) == 0
        picked = None if positions is None or samples_none else mx.array(positions, mx.int32)
        if self._picker is None:
            whole = self.model(ids, cache=caches)
            logits = _flat(whole)
            return logits if picked is None else logits[picked], whole
        self._picker.positions = picked
        logits = self.model(ids, cache=caches)
        hidden, self._picker.hidden, self._picker.positions = self._picker.hidden, None, None
        assert hidden is not None
        if samples_none:
            return hidden, hidden
        return _flat(logits), hidden

    def head(self, hidden: mx.array) -> mx.array:
        """Hidden states `[n, dim]` → logits `[n, vocab]`: the model's own code, with these states
        in place of its backbone's."""
        if self._picker is None:
            return hidden
        self._picker.given = hidden[:, None]
        try:
            return _flat(self.model(mx.zeros((hidden.shape[0], 1), mx.int32)))
        finally:
            self._picker.given = None

    def _check_picking(self, picker: _Picker) -> None:
        """Do without where the backbone is not what its place in the model promises."""
        from mlx_lm.models.cache import make_prompt_cache

        ids = mx.array([[1, 2, 3]])
        whole = self.model(ids, cache=make_prompt_cache(self.model))
        if picker.hidden is None or picker.hidden.ndim != 3 or picker.hidden.shape[:2] != (1, 3):
            self._stop_picking(picker)
            return
        picked, hidden = self.run(ids, make_prompt_cache(self.model), [1])
        if not (_agree(picked, whole[0, 1:2]) and _agree(self.head(hidden[0]), whole[0])):
            self._stop_picking(picker)

    def _stop_picking(self, picker: _Picker) -> None:
        picker.is_on, picker.hidden = False, None
        self._picker = None


def _agree(ours: mx.array, theirs: mx.array) -> bool:
    ours, theirs = ours.astype(mx.float32), theirs.astype(mx.float32)
    return ours.shape == theirs.shape and bool(mx.allclose(ours, theirs, atol=1e-2, rtol=1e-2))


def _flat(logits: mx.array) -> mx.array:
    return logits.reshape(-1, logits.shape[-1])


def _backbone_of(model: Module) -> Module | None:
    """Below the language model of a multi-modal one, the child with most of the weights."""
    while isinstance(model.get("language_model"), Module):
        model = model["language_model"]
    sizes = {
        name: tree_reduce(lambda total, w: total + w.size, child.parameters(), 0)
        for name, child in model.children().items()
        if isinstance(child, Module) and any(isinstance(x, list) for x in child.values())
    }
    return model[max(sizes, key=sizes.__getitem__)] if sizes else None


def _let_pick(backbone: Module, picker: _Picker) -> None:
    cls = type(backbone)

    def call(self: Module, *args: Any, **kwargs: Any) -> Any:
        if picker.given is not None:
            return picker.given
        hidden = cls.__call__(self, *args, **kwargs)
        return picker.pick(hidden) if picker.is_on and isinstance(hidden, mx.array) else hidden

    backbone.__class__ = type(cls.__name__, (cls,), {"__call__": call})
