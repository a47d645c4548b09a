"""Builds an engine from what the server ordered: back end, model, runner, sizes, scheduler."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import mlx.core as mx

from mlx_lm_server import __version__, platform
from mlx_lm_server.core.cost_model import CostModel
from mlx_lm_server.core.measured import Measured
from mlx_lm_server.core.memory_ledger import format_bytes, request_arithmetic
from mlx_lm_server.core.prefix_cache import PrefixCache
from mlx_lm_server.core.proposer import Proposer
from mlx_lm_server.core.scheduler import Scheduler
from mlx_lm_server.engine.disk_cache import DiskCache
from mlx_lm_server.engine.engine_core import EngineCore
from mlx_lm_server.engine.profiles import (
    OthersWork,
    decode_measured,
    encode_measured,
    load_profile,
    profile_path,
    save_profile,
)
from mlx_lm_server.engine.sizing import Sizes, context_tokens
from mlx_lm_server.protocol import LoadModel, Ready
from mlx_lm_server.runner.backends import choose, host_memory
from mlx_lm_server.runner.backends.blas import Blas
from mlx_lm_server.runner.loading import loader
from mlx_lm_server.runner.loading.loader import LoadedModel
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

# Measuring takes so long, or such a share of the load where that is more.
MIN_MEASURING_S, MEASURING_SHARE = 2.0, 0.05
# In the folder of the disk tier: what its models' files are, so that they are not read each time.
DIGESTS_FILE = "digests.json"


def assemble(
    order: LoadModel,
    blas: Blas,
    progress: Progress,
    clock: Callable[[], float] = time.monotonic,
    proposer: Proposer | None = None,
    measured: Measured | None = None,
) -> tuple[EngineCore, Ready]:
    """Returns a ready engine and the message that says so. Who gives what is `measured` gets plans
    that no measurement has a part in. Raises the classes of ModelError."""
    begun_s = time.monotonic()
    backend = choose.choose(order.way)
    if backend.policy.is_in_host_memory:
        host_memory.keep_freed_blocks()
    loaded = loader.load(order, backend, progress)
    progress("comparing with mlx-lm", 0.85)
    runner = ModelRunner(
        loaded, backend, order.max_batch_size, order.block_size, order.kv_bits, order.kv_group_size
    )
    progress("measuring", 0.9)
    load_s = time.monotonic() - begun_s
    known = measured or decode_measured(order.measured)
    measured, sizes = _sized(
        order, loaded, runner, lambda: known or _measured(order, loaded, runner, blas, load_s)
    )
    if measured.num_threads is not None:
        blas = blas.with_threads(measured.num_threads)
    backend.keep_to(sizes.memory_plan())
    runner.early = sizes.early
    runner.copy_at_most(sizes.max_copied_bytes)
    _tell(runner, measured)
    layout, settings = sizes.layout(), sizes.cache_settings()
    disk = _disk_cache(order, loaded, runner) if settings.is_on else None
    cache = PrefixCache(settings, layout, disk)
    scheduler = Scheduler(sizes.limits(), layout, CostModel(measured.costs), cache, proposer)
    mx.reset_peak_memory()
    upkeep = backend.upkeep(loaded.memory_limit_bytes)
    core = EngineCore(scheduler, runner, clock, mx.get_peak_memory, disk, upkeep)
    if disk is not None:
        disk.wait_until_open()
    gc.collect()
    gc.freeze()  # a pass over what the libraries have loaded would stop a step for 50 ms
    ready = Ready(
        model_type=loaded.model_type,
        device=backend.policy.device,
        way=backend.policy.way,
        blas=str(blas) if backend.policy.has_threads else "",
        weights=loaded.weights,
        weights_bytes=loaded.weights_bytes,
        vocab_size=loaded.vocab_size,
        context_tokens=loaded.context_tokens,
        kv_bytes_per_token=runner.geometry.bytes_per_token,
        kv_limit_bytes=sizes.ledger.kv_limit_bytes,
        memory_limit_bytes=loaded.memory_limit_bytes,
        load_s=time.monotonic() - begun_s,
        kv_limit_tokens=sizes.ledger.kv_limit_tokens,
        batching=runner.batching,
        batching_reason=runner.reason,
        kv_bits=runner.kv_bits,
        kv_format=runner.kv_format,
        disk_tier=disk.folder if disk else "",
        submission=runner.early.describe(),
        measured=encode_measured(measured),
    )
    return core, ready


def _tell(runner: ModelRunner, measured: Measured) -> None:
    log.log(logging.WARNING if runner.batching == "alone" else logging.INFO, runner.describe())
    submitting = measured.submitting
    if submitting is not None:
        level = logging.INFO if submitting.writes_in_place else logging.WARNING
        log.log(level, submitting.describe())


def _sized(
    order: LoadModel, loaded: LoadedModel, runner: ModelRunner, measure: Callable[[], Measured]
) -> tuple[Measured, Sizes]:
    """Returns what was measured and how large things are made. Where nobody said in how many bits K
    and V are kept, they are quantised if a row of the whole context does not fit otherwise; in the
    runner, which has no rows yet. Raises ModelTooLargeError."""
    row_bytes = runner.geometry.row_bytes(context_tokens(order, loaded))
    is_tight = loaded.weights_bytes + row_bytes > loaded.memory_limit_bytes
    if is_tight:  # whatever a forward takes
        _quantise(order, loaded, runner)
    measured = measure()
    sizes = Sizes(order, loaded, runner, measured)
    if not (is_tight or sizes.hold_context) and _quantise(order, loaded, runner):
        measured = measure()
        sizes = Sizes(order, loaded, runner, measured)
    sizes.check()
    return measured, sizes


def _quantise(order: LoadModel, loaded: LoadedModel, runner: ModelRunner) -> bool:
    """Keeps K and V in fewer bits where that is ours to choose. Returns whether it changed them."""
    before = runner.geometry
    if order.kv_bits is not None or not runner.quantise_kv(runner.policy.tight_kv_bits):
        return False
    log.warning(
        "K and V are kept in %d bits, since a row of the whole context does not fit in 16: %s, and "
        "%s for weights, in %s; --kv-bits 16 keeps them as they are, --max-kv-size caps rows",
        runner.kv_bits,
        request_arithmetic(context_tokens(order, loaded), before),
        format_bytes(loaded.weights_bytes),
        format_bytes(loaded.memory_limit_bytes),
    )
    return True


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
        "mlx_lm": metadata.version("mlx-lm"),
        "device": runner.policy.device,
        "way": runner.policy.way,
        "cores": str(platform.usable_cores()),
        "blas": blas.name,
        "threads": str(order.num_threads),
        "weights": loaded.weights,
        "batching": runner.batching,
        "kv": runner.kv_format,
        "adapter": order.adapter_path or "",
        "submission": order.submission,
    }
    path = profile_path(Path(order.model_path), facts)
    known = load_profile(path) if order.keeps_profile else None
    if known is not None:
        return known
    others = OthersWork()
    limit_s = max(MIN_MEASURING_S, MEASURING_SHARE * load_s)
    is_free = order.num_threads is None and runner.policy.has_threads
    tries_early = order.submission == "auto" and not runner.policy.submits_slowly
    measured = runner.measurer(limit_s, tries_early=tries_early).measured(
        blas.num_threads if is_free else None, blas.with_threads
    )
    if order.keeps_profile and measured.is_steady and others.is_little:
        save_profile(path, measured)
    return measured
