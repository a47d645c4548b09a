"""What of a model runs how on this machine: its files, an engine, and the self-test."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec

from mlx_lm_server import folders, platform
from mlx_lm_server.commands.doctor.findings import Finding, note, wrong
from mlx_lm_server.commands.doctor.parity import ASK_FOR_HELP, self_test
from mlx_lm_server.commands.doctor.probed_engine import ProbedEngine
from mlx_lm_server.config import NANO, Config
from mlx_lm_server.errors import EngineError, ModelError
from mlx_lm_server.protocol import LoadModel, Ready
from mlx_lm_server.server.boot import load_message
from mlx_lm_server.server.models.model_files import read_facts, resolve_model
from mlx_lm_server.server.models.tokenizer import load_tokenizer
from mlx_lm_server.server.waiting import in_daemon_thread

# How an engine's BLAS is called where it is the slow one that MLX comes with.
SLOW_BLAS = "reference BLAS"
TRY_NANO = "see whether `mlx-lm-server doctor --model nano` works"


async def examine(config: Config) -> AsyncIterator[Finding]:
    """Yields each finding when it is known; the first that is wrong about files or engine ends it.
    Raises ConfigError."""
    folders.name_for_hub()
    try:
        folder = await in_daemon_thread(resolve_model, config.model.model)
        yield await in_daemon_thread(texts, folder, config)
        order = msgspec.structs.replace(load_message(config, folder), disk_tier=None)
    except ModelError as error:
        yield wrong("model", str(error), "name another: --model nano is always there")
        return
    try:
        async for finding in _with_engine(order, shown_name(config.model.model)):
            yield finding
    except EngineError as error:
        advice = ASK_FOR_HELP if config.model.model == NANO else TRY_NANO
        yield wrong("engine", str(error), advice)


async def _with_engine(order: LoadModel, name: str) -> AsyncIterator[Finding]:
    async with ProbedEngine() as engine:
        ready = await engine.load(order)
        for finding in (device(ready), loaded(ready, name), runs(ready), memory(ready)):
            yield finding
        test = await self_test(engine.answer, ready.vocab_size)
        for finding in test.findings(ready):
            if order.prefix_cache or finding.subject != "cached as cold":
                yield finding


def shown_name(model: str) -> str:
    """Returns what a model may be called before others: a folder's name may be private."""
    is_folder = model != NANO and folders.expanded(model).exists()
    return "a local folder" if is_folder or model.count("/") > 1 else model


def texts(folder: Path, config: Config) -> Finding:
    """Says whether texts become tokens, and messages prompts. Raises ModelError."""
    facts, model = read_facts(folder), config.model
    tokenizer = load_tokenizer(folder, facts, model.chat_template, model.chat_template_args)
    if not tokenizer.has_chat_template:
        return note("texts", "a tokenizer, but no chat template", "name one: --chat-template FILE")
    assert tokenizer.template is not None
    tokenizer.template.try_out()
    return Finding("texts", "a tokenizer and a chat template")


def device(ready: Ready) -> Finding:
    words = f"{ready.device}, BLAS {ready.blas}" if ready.blas else ready.device
    if ready.blas.startswith(SLOW_BLAS):
        return wrong("device", words, "install mlx-lm-server with the extra `cpu`")
    if ready.blas and _has_nvidia():
        return note(
            "device",
            f"{words}, though there is an NVIDIA driver",
            "to compute on the GPU install the extra `cuda12` or `cuda13` in place of `cpu`",
        )
    return Finding("device", words)


def _has_nvidia() -> bool:
    return platform.is_linux() and shutil.which("nvidia-smi") is not None


def loaded(ready: Ready, name: str) -> Finding:
    return Finding(
        "model",
        f"{name}: {ready.model_type}, weights {ready.weights}, {_size(ready.weights_bytes)}, "
        f"context {ready.context_tokens} tokens, loaded in {ready.load_s:.1f} s",
    )


def runs(ready: Ready) -> Finding:
    """Says how rows share forwards. A slower way than the best is worth a note, with its reason."""
    words = (
        f"{ready.batching}, way {ready.way}, submitted {ready.submission}, "
        f"K and V in {ready.kv_format or 'the model’s numbers'} ({ready.kv_bits} bits)"
    )
    if ready.batching == "packed":
        return Finding("runs", words)
    reason = f": {ready.batching_reason}" if ready.batching_reason else ""
    return note("runs", words + reason)


def memory(ready: Ready) -> Finding:
    words = (
        f"{_size(ready.memory_limit_bytes)} for the engine, {_size(ready.kv_limit_bytes)} of it "
        f"for K and V"
    )
    if 0 < ready.kv_limit_tokens < ready.context_tokens:
        return note(
            "memory",
            f"{words}: a row holds at most {ready.kv_limit_tokens} of the context's tokens",
            "--kv-bits 8 doubles that; --memory-limit-gb where more is free than it takes",
        )
    return Finding("memory", f"{words}: a row of the whole context fits")


def _size(num_bytes: int) -> str:
    if num_bytes >= 10**9:
        return f"{num_bytes / 10**9:.1f} GB"
    return f"{num_bytes / 10**6:.0f} MB"
