"""All that is changed in libraries at run time, in one list.

    what                                    by                         for
    base.scaled_dot_product_attention       install                    attention over packed tokens
    activations.swiglu                      install, of the back end   one operation, not four
    mx.fast.rms_norm                        install, of the back end   one operation, not seven
    mx.fast.rope                            install, of the back end   one operation, not fifteen
    the class of a model's backbone         seam/language_model.py     logits only where asked for
    transformers, huggingface_hub, while    loading/light_import.py    an engine needs neither
    mlx_lm is imported

Models bind these names when their module is first imported, so `install` comes before.
"""

from __future__ import annotations

import mlx.core as mx

from mlx_lm_server.runner.backend import Backend
from mlx_lm_server.runner.seam.attention import instead_of


def install(backend: Backend) -> None:
    """Puts what is ours where mlx-lm's models import theirs from; once."""
    from mlx_lm.models import activations, base

    original = base.scaled_dot_product_attention
    if getattr(original, "is_packed", False):
        return
    packed = instead_of(original)
    packed.is_packed = True  # type: ignore[attr-defined]
    base.scaled_dot_product_attention = packed
    operations = backend.operations(activations.swiglu)
    if operations.swiglu is not None:
        activations.swiglu = operations.swiglu
    if operations.rms_norm is not None:
        mx.fast.rms_norm = operations.rms_norm
    if operations.rope is not None:
        mx.fast.rope = operations.rope
