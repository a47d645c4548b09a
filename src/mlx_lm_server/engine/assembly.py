"""Builds an engine from what the server ordered: model, memory ledger, scheduler, runner."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import mlx.core as mx

from mlx_lm_server import __version__
from mlx_lm_server.core.block_pool import DEFAULT_SEGMENT_BYTES
from mlx_lm_server.core.cost_model import CostModel, StepCosts
from mlx_lm_server.core.kv_layout import KVLayout
from mlx_lm_server.core.memory_ledger import MemoryLedger
from mlx_lm_server.core.prefix_cache import CacheSettings, PrefixCache
from mlx_lm_server.core.proposer import Proposer
from mlx_lm_server.core.scheduler import Scheduler, SchedulerLimits
from mlx_lm_server.engine.disk_cache import DiskCache
from mlx_lm_server.engine.engine_core import EngineCore
from mlx_lm_server.engine.profiles import OthersWork, load_profile, profile_path, save_profile
from mlx_lm_server.protocol import Batching, LoadModel, Ready
from mlx_lm_server.runner.backends import host_memory
from mlx_lm_server.runner.backends.x86.blas import Blas, usable_cores
from mlx_lm_server.runner.loading import loader
from mlx_lm_server.runner.loading.loader import LoadedModel
from mlx_lm_server.runner.loading.measuring import Measured
from mlx_lm_server.runner.model_runner import ModelRunner
from mlx_lm_server.tier import (
    FILE_VERSION,
    Namespace,
    TierSettings,
    model_digest,
    namespace_digest,
)

log = logging.getLogger(__name__)

Progress = Callable[[str, float], None]

# With nobody decoding, a step takes about so long: a request that arrives waits for its end.
IDLE_STEP_S = 0.5
MIN_BATCHED_TOKENS, MAX_BATCHED_TOKENS = 256, 2048
# Rows that the products in C take at once, where only a few are left.
CPU_TOKEN_TILE = 4
MIN_KV_TOKENS = 1024
# Rows of one capacity share slabs of up to so much, and each slab is one attention call a layer.
MIN_SLAB_BYTES = 64 * 1024 * 1024
SLABS_IN_MEMORY = 8
# A row gets room for so many tokens of its answer at once, where that takes no more than a share of
# the memory in all rows.
MIN_LOOKAHEAD, MAX_LOOKAHEAD = 256, 1024
MAX_LOOKAHEAD_SHARE = 0.25
# The pool's segments: on a CPU a large one takes long to make, on a GPU many are many operations.
SEGMENTS_IN_CPU_MEMORY, SEGMENTS_IN_GPU_MEMORY = 512, 128
# Measuring takes so long, or such a share of the load where that is more.
MIN_MEASURING_S, MEASURING_SHARE = 2.0, 0.05
# Logits and the sampler's arrays of the same size, in float32, per row that samples.
SAMPLER_ARRAYS = 8
# In the folder of the disk tier: what its models' files are, so that they are not read each time.
DIGESTS_FILE = "digests.json"


def assemble(
    order: LoadModel,
    blas: Blas,
    progress: Progress,
    clock: Callable[[], float] = time.monotonic,
    proposer: Proposer | None = None,
) -> tuple[EngineCore, Ready]:
    """Returns a ready engine and the message that says so. Raises the classes of ModelError."""
    begun_s = time.monotonic()
    if _is_on_cpu():
        host_memory.keep_freed_blocks()
    memory_limit_bytes = loader.memory_limit(order.memory_limit_bytes)
    loaded = loader.load(order, memory_limit_bytes, progress)
    progress("comparing with mlx-lm", 0.85)
    runner = ModelRunner(
        loaded, order.max_batch_size, order.block_size, order.kv_bits, order.kv_group_size
    )
    log.log(logging.WARNING if runner.batching == "alone" else logging.INFO, runner.describe())
    progress("measuring", 0.9)
    measured = _measured(order, loaded, runner, blas, time.monotonic() - begun_s)
    if measured.num_threads is not None:
        blas = blas.with_threads(measured.num_threads)
    costs = measured.costs
    geometry = runner.geometry
    max_step_tokens = order.max_num_batched_tokens or max(
        _affordable_tokens(costs), order.max_batch_size
    )
    ledger = MemoryLedger(
        memory_limit_bytes=memory_limit_bytes,
        weights_bytes=loaded.weights_bytes,
        activation_bytes_per_token=measured.activation_bytes_per_token,
        max_step_tokens=max_step_tokens,
        geometry=geometry,
        max_kv_tokens=order.max_kv_tokens,
        reserve_bytes=order.max_batch_size * loaded.vocab_size * 4 * SAMPLER_ARRAYS
        + order.max_batch_size * geometry.bytes_per_row,  # states before and after a step
        max_rows=order.max_batch_size,
    )
    ledger.check_model_fits(min(MIN_KV_TOKENS, order.max_kv_tokens or MIN_KV_TOKENS))
    layout = KVLayout(
        geometry=geometry,
        limit_bytes=ledger.kv_limit_bytes,
        max_slab_bytes=max(MIN_SLAB_BYTES, ledger.kv_limit_bytes // SLABS_IN_MEMORY),
        max_rows=order.max_batch_size,
        max_tokens=ledger.kv_limit_tokens,
        # On a GPU, where a copy is cheap and a kernel launch is not, each slab may be copied.
        max_resized_bytes=MIN_SLAB_BYTES if _is_on_cpu() else None,
        keeps_holes=runner.passes_over_holes,
    )
    limits = _limits(
        order,
        max_step_tokens,
        ledger.kv_limit_bytes // max(1, geometry.bytes_per_token),
        runner,
        _token_tile(loaded, runner),
    )
    settings = _cache_settings(order, runner.batching, ledger.kv_limit_bytes)
    disk = _disk_cache(order, loaded, runner) if settings.is_on else None
    cache = PrefixCache(settings, layout, disk)
    scheduler = Scheduler(limits, layout, CostModel(costs), cache, proposer)
    mx.reset_peak_memory()
    core = EngineCore(scheduler, runner, clock, mx.get_peak_memory, disk)
    ready = Ready(
        model_type=loaded.model_type,
        device=_device_name(),
        blas=str(blas) if _is_on_cpu() else "",
        weights=loaded.weights,
        weights_bytes=loaded.weights_bytes,
        vocab_size=loaded.vocab_size,
        context_tokens=loaded.context_tokens,
        kv_bytes_per_token=geometry.bytes_per_token,
        kv_limit_bytes=ledger.kv_limit_bytes,
        memory_limit_bytes=memory_limit_bytes,
        load_s=time.monotonic() - begun_s,
        kv_limit_tokens=ledger.kv_limit_tokens,
        batching=runner.batching,
        batching_reason=runner.reason,
        kv_bits=runner.kv_bits,
        kv_format=runner.kv_format,
        disk_tier=disk.folder if disk else "",
    )
    if disk is not None:
        disk.wait_until_open()
    gc.collect()
    gc.freeze()  # a pass over what the libraries have loaded would stop a step for 50 ms
    return core, ready


def _cache_settings(order: LoadModel, batching: Batching, kv_limit_bytes: int) -> CacheSettings:
    """Rows that run alone hold nothing that others could share."""
    num_segments = SEGMENTS_IN_CPU_MEMORY if _is_on_cpu() else SEGMENTS_IN_GPU_MEMORY
    return CacheSettings(
        is_on=order.prefix_cache and batching != "alone",
        block_size=order.block_size,
        max_blocks=order.num_blocks,
        max_sequences=order.sequence_cache_size,
        segment_bytes=max(DEFAULT_SEGMENT_BYTES, kv_limit_bytes // num_segments),
    )


def _disk_cache(order: LoadModel, loaded: LoadedModel, runner: ModelRunner) -> DiskCache | None:
    """The tier, or None where there is none or this model's state cannot be stored."""
    shapes = runner.blocks.shapes
    if order.disk_tier is None:
        return None
    if not shapes.can_be_stored:
        log.warning("the disk tier is off: this model's state has a type that it does not know")
        return None
    settings = TierSettings(Path(order.disk_tier.folder), order.disk_tier.flags)
    known = settings.cache_dir / DIGESTS_FILE
    adapter = order.adapter_path
    try:
        parts: dict[str, str | bytes] = {
            "model": model_digest(Path(order.model_path), known),
            "adapter": model_digest(Path(adapter), known) if adapter else "",
            "layout": shapes.describe(),
            "weights": loaded.weights,
            "mlx_lm": metadata.version("mlx-lm"),
            "rank": "0 of 1",
            "file": FILE_VERSION,
        }
    except OSError as error:
        log.warning("the disk tier is off: the model's files cannot be read: %s", error)
        return None
    about = {"model": order.model_path, "kv": runner.kv_format, "block_size": str(order.block_size)}
    disk = DiskCache(settings, Namespace(namespace_digest(parts), about), shapes.fits)
    runner.blocks.tier = disk
    return disk


def _measured(
    order: LoadModel, loaded: LoadedModel, runner: ModelRunner, blas: Blas, load_s: float
) -> Measured:
    """What was measured at an earlier start, or is measured now, within a bound of time."""
    facts = {
        "server": __version__,
        "mlx": metadata.version("mlx"),
        "device": _device_name(),
        "cores": str(usable_cores()),
        "blas": blas.name,
        "threads": str(order.num_threads),
        "weights": loaded.weights,
        "batching": runner.batching,
        "kv": runner.kv_format,
        "adapter": order.adapter_path or "",
    }
    path = profile_path(Path(order.model_path), facts)
    known = load_profile(path) if order.keeps_profile else None
    if known is not None:
        return known
    others = OthersWork()
    limit_s = max(MIN_MEASURING_S, MEASURING_SHARE * load_s)
    most = None if order.num_threads is not None else blas.num_threads
    measured = runner.measurer(limit_s).measured(most, blas.with_threads)
    if order.keeps_profile and measured.is_steady and others.is_little:
        save_profile(path, measured)
    return measured


def _token_tile(loaded: LoadedModel, runner: ModelRunner) -> int:
    """Where forwards are replayed, steps beside decoding rows have few sizes."""
    is_float32 = _is_on_cpu() and loaded.weights == "float32"
    return CPU_TOKEN_TILE if is_float32 and runner.batching == "packed" else 1


def _limits(
    order: LoadModel, max_step_tokens: int, kv_tokens: int, runner: ModelRunner, token_tile: int
) -> SchedulerLimits:
    lookahead = int(MAX_LOOKAHEAD_SHARE * kv_tokens) // order.max_batch_size
    return SchedulerLimits(
        max_batch_size=order.max_batch_size,
        max_num_batched_tokens=max_step_tokens,
        prefill_step_size=order.prefill_step_size,
        prefill_batch_size=order.prefill_batch_size,
        itl_goal_s=order.itl_goal_s,
        token_tile=token_tile,
        max_guesses=runner.max_guesses,
        lookahead_tokens=min(MAX_LOOKAHEAD, max(MIN_LOOKAHEAD, lookahead)),
    )


def _affordable_tokens(costs: StepCosts) -> int:
    """The token budget that makes an idle machine's prefill step take IDLE_STEP_S."""
    tokens = int(IDLE_STEP_S / costs.per_prefill_token_s) // 64 * 64
    return min(MAX_BATCHED_TOKENS, max(MIN_BATCHED_TOKENS, tokens))


def _is_on_cpu() -> bool:
    return bool(mx.default_device() == mx.Device(mx.cpu))


def _device_name() -> str:
    if _is_on_cpu():
        return "CPU"
    return str(mx.device_info().get("device_name", "GPU"))
