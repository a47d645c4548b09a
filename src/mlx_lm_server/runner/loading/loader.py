"""From a model folder to a model in memory and what it keeps of the tokens it sees.

What is asked of a family is found out at load time, not believed: `cache_kinds` reads what each
layer keeps, and `probe` finds the way to run it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx.utils import tree_flatten, tree_unflatten

from mlx_lm_server.core import model_config
from mlx_lm_server.core.memory_ledger import format_bytes
from mlx_lm_server.errors import ModelNotFoundError, ModelTooLargeError, UnsupportedModelError
from mlx_lm_server.protocol import CpuWeights, LoadModel
from mlx_lm_server.runner import patches
from mlx_lm_server.runner.backend import Backend
from mlx_lm_server.runner.seam import attention
from mlx_lm_server.runner.seam.language_model import LanguageModel
from mlx_lm_server.runner.state.cache_kinds import ModelState, UnbatchableState, read_state

# Of the memory limit, what float32 weights may take when nobody asked for them.
FLOAT32_SHARE = 0.5
DEFAULT_CONTEXT_TOKENS = 32768
DEFAULT_HEADS = 64

Progress = Callable[[str, float], None]


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model in memory. `state` is None where rows cannot share a batch; then `why_no_state`."""

    lm: LanguageModel
    model_type: str
    vocab_size: int
    context_tokens: int
    state: ModelState | None
    why_no_state: str
    kv_dtype: mx.Dtype
    weights: str
    weights_bytes: int
    memory_limit_bytes: int
    num_heads: int


def load(order: LoadModel, backend: Backend, progress: Progress) -> LoadedModel:
    """Reads the model that `order` names. Raises the classes of `ModelError`."""
    path = Path(order.model_path)
    config = read_config(path)
    memory_limit_bytes = order.memory_limit_bytes or backend.memory_limit_bytes()
    patches.install(backend)
    progress("reading weights", 0.1)
    model = _read_model(path, order)
    widens = backend.policy.widens_weights
    weights = _settle_weights(model, order.cpu_weights, memory_limit_bytes, widens=widens)
    _materialise(model, progress)
    weights_bytes = _num_bytes(model)
    state, why_no_state = _read_state(model, config["model_type"])
    logits = model(mx.zeros((1, 1), mx.int32))
    kv_dtype = state.kv[0].dtype if state and state.kv else logits.dtype
    return LoadedModel(
        lm=LanguageModel(model),
        model_type=config["model_type"],
        vocab_size=logits.shape[-1],
        context_tokens=model_config.context_tokens(config) or DEFAULT_CONTEXT_TOKENS,
        state=state,
        why_no_state=why_no_state,
        kv_dtype=kv_dtype,
        weights=weights,
        weights_bytes=weights_bytes,
        memory_limit_bytes=memory_limit_bytes,
        num_heads=model_config.num_heads(config) or DEFAULT_HEADS,
    )


def _read_state(model: Module, model_type: str) -> tuple[ModelState | None, str]:
    """What the model keeps, or why that does not fit a batch. Raises UnsupportedModelError where
    it does not even run."""
    try:
        return read_state(model), ""
    except UnbatchableState as reason:
        return None, str(reason)
    except attention.SEAM_ERRORS as error:
        raise UnsupportedModelError(f"{model_type} does not run in mlx-lm: {error}") from error


def read_config(path: Path) -> dict[str, Any]:
    """The folder's config.json. Raises ModelNotFoundError."""
    try:
        config = json.loads((path / "config.json").read_text())
    except FileNotFoundError as error:
        raise ModelNotFoundError(f"{path} has no config.json") from error
    except json.JSONDecodeError as error:
        raise UnsupportedModelError(f"{path / 'config.json'} is no valid JSON: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise UnsupportedModelError(f"{path / 'config.json'} names no model_type")
    return config


def _read_model(path: Path, order: LoadModel) -> Module:
    from mlx_lm.utils import load_adapters, load_model

    model: Module
    try:
        model, _ = load_model(path, lazy=True, trust_remote_code=order.trust_remote_code)
        if order.adapter_path is not None:
            model = load_adapters(model, order.adapter_path)
    except FileNotFoundError as error:
        raise ModelNotFoundError(str(error)) from error
    except (ImportError, SystemExit, *attention.SEAM_ERRORS) as error:
        raise UnsupportedModelError(f"{path} cannot be loaded: {error}") from error
    model.eval()
    return model


def _settle_weights(
    model: Module, asked: CpuWeights, memory_limit_bytes: int, *, widens: bool
) -> str:
    """Choose what the weights are held in, and say it."""
    size = _float32_bytes(model)
    fits = size <= FLOAT32_SHARE * memory_limit_bytes
    if asked == "float32" and size > memory_limit_bytes:
        raise ModelTooLargeError(
            f"--cpu-weights float32 needs {format_bytes(size)}, "
            f"the memory limit is {format_bytes(memory_limit_bytes)}"
        )
    if widens and (asked == "float32" or (asked == "auto" and fits)):
        _to_float32(model)
        return "float32"
    if min(_num_bytes(model), size) > memory_limit_bytes:
        raise ModelTooLargeError(
            f"the weights take {format_bytes(_num_bytes(model))}, "
            f"the memory limit is {format_bytes(memory_limit_bytes)}"
        )
    return _describe_weights(model)


def _to_float32(model: Module) -> None:
    from mlx_lm.utils import dequantize_model

    dequantize_model(model)
    model.set_dtype(mx.float32)
    fused = [(name, m.fuse()) for name, m in model.named_modules() if hasattr(m, "fuse")]
    if fused:
        model.update_modules(tree_unflatten(fused))


def _describe_weights(model: Module) -> str:
    bits = sorted({m.bits for _, m in model.named_modules() if hasattr(m, "bits")})
    if bits:
        return "/".join(f"{b}-bit" for b in bits)
    dtypes = {str(w.dtype).removeprefix("mlx.core.") for _, w in _parameters(model)}
    return "/".join(sorted(dtypes))


def _materialise(model: Module, progress: Progress) -> None:
    """Evaluate the weights in small lots, so that a conversion never holds two whole models."""
    parameters = list(_parameters(model))
    total = sum(w.nbytes for _, w in parameters) or 1
    done = 0
    for _, weight in parameters:
        mx.eval(weight)
        done += weight.nbytes
        progress("reading weights", 0.1 + 0.7 * done / total)


def _parameters(model: Module) -> Iterator[tuple[str, mx.array]]:
    yield from tree_flatten(model.parameters())  # type: ignore[misc]


def _num_bytes(model: Module) -> int:
    return sum(w.nbytes for _, w in _parameters(model))


def _float32_bytes(model: Module) -> int:
    total = 0
    for _, module in model.named_modules():
        scale = 32 // module.bits if hasattr(module, "bits") else 1
        for name, value in module.items():
            if isinstance(value, mx.array):
                total += value.size * 4 * (scale if name == "weight" else 1)
    return total
