"""From a model's name to a server that answers with it."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from pathlib import Path

from mlx_lm_server import folders
from mlx_lm_server.config import Config, ModelConfig, TierConfig
from mlx_lm_server.errors import ConfigError
from mlx_lm_server.protocol import DiskTier, LoadModel, Ready
from mlx_lm_server.server.engines.metrics import cache_config
from mlx_lm_server.server.engines.supervisor import Limits, Supervisor
from mlx_lm_server.server.models.model_files import (
    ModelFacts,
    read_facts,
    resolve_adapter,
    resolve_model,
)
from mlx_lm_server.server.models.model_formats import ModelFormats
from mlx_lm_server.server.models.served_model import ModelNames, ServedModel, bounds_of, defaults_of
from mlx_lm_server.server.models.thinking import ThinkingMarks
from mlx_lm_server.server.models.tokenizer import Tokenizer, load_tokenizer
from mlx_lm_server.server.operations.banner import StartDisplay
from mlx_lm_server.server.services import Services
from mlx_lm_server.server.waiting import first_of, in_daemon_thread


async def boot(
    services: Services,
    engine_command: Sequence[str],
    limits: Limits,
    display: StartDisplay,
    url: str,
) -> Supervisor:
    """Engine and tokenizer load side by side. Where the engine fails the supervisor says why.

    Raises ModelError or ConfigError for files that cannot be used.
    """
    config = services.config
    folders.name_for_hub()
    folder = await in_daemon_thread(resolve_model, config.model.model)
    facts = read_facts(folder)
    supervisor = Supervisor(
        engine_command,
        load_message(config, folder),
        services.client,
        services.metrics,
        limits=limits,
        has_standby=config.resume.standby and not config.resume.no_resume,
        on_progress=display.show,
    )
    services.supervisor = supervisor
    supervisor.start()
    tokenizer, formats = await in_daemon_thread(_read_texts, folder, facts, config.model)
    await first_of(supervisor.first_ready, supervisor.failure)
    if not supervisor.failure.done():
        ready = supervisor.first_ready.result()
        model = _served_model(config, folder, facts, tokenizer, formats, ready)
        services.set_model(model)
        services.metrics.kv_bits = ready.kv_bits
        services.metrics.cache_config = cache_config(config.kv, ready, model.bounds)
        gc.collect()
        gc.freeze()  # what stays for ever need not be looked at again
        display.banner(config, model, ready, url)
    return supervisor


def load_message(config: Config, folder: Path) -> LoadModel:
    """What the engine is told. Raises ModelNotFoundError for a missing adapter."""
    gb, goal_ms = config.kv.memory_limit_gb, config.batching.itl_goal_ms
    return LoadModel(
        model_path=str(folder),
        adapter_path=resolve_adapter(config.model.adapter_path),
        trust_remote_code=config.model.trust_remote_code,
        cpu_weights=config.cpu.cpu_weights,
        num_threads=config.cpu.cpu_threads,
        max_batch_size=config.batching.max_batch_size,
        max_num_batched_tokens=config.batching.max_num_batched_tokens,
        prefill_step_size=config.batching.prefill_step_size,
        prefill_batch_size=config.batching.prefill_batch_size,
        itl_goal_s=None if goal_ms is None else goal_ms / 1000,
        max_kv_tokens=config.kv.max_kv_size,
        prefix_cache=not config.kv.no_prefix_cache,
        block_size=config.kv.block_size,
        num_blocks=config.kv.num_blocks,
        sequence_cache_size=config.kv.sequence_cache_size,
        kv_bits=config.kv.kv_bits,
        kv_group_size=config.kv.kv_group_size,
        memory_limit_bytes=None if gb is None else int(gb * 10**9),
        keeps_profile=not config.cpu.no_profile,
        way=config.cpu.way,
        submission=config.cpu.submission,
        disk_tier=None if config.tier.no_ssd else disk_tier_of(config.tier),
    )


def disk_tier_of(config: TierConfig) -> DiskTier:
    """Returns what the engine is told of the cache on disk. Raises ConfigError where the folder can
    never be one. What may pass (a full disk, a folder that nobody may write to now)
    only leaves the tier empty."""
    if config.ssd_cache_dir is None:
        folder = folders.cache_folder() / "kv-cache"
    else:
        folder = folders.expanded(config.ssd_cache_dir).absolute()
    nearest = folders.nearest_existing(folder)
    if not nearest.is_dir():
        raise ConfigError(f"--ssd-cache-dir {folder}: {nearest} is no folder")
    return DiskTier(str(folder), config)


def _read_texts(
    folder: Path, facts: ModelFacts, config: ModelConfig
) -> tuple[Tokenizer, ModelFormats]:
    """Returns all that has to do with texts; what a template makes of messages is tried here, while
    the engine loads, and not at the first request."""
    tokenizer = load_tokenizer(folder, facts, config.chat_template, config.chat_template_args)
    template = tokenizer.template if tokenizer.has_chat_template else None
    formats = ModelFormats.of(config, template or "", tokenizer.special_tokens)
    if template is not None:
        template.try_out()
    return tokenizer, formats


def _served_model(
    config: Config,
    folder: Path,
    facts: ModelFacts,
    tokenizer: Tokenizer,
    formats: ModelFormats,
    ready: Ready,
) -> ServedModel:
    return ServedModel(
        names=ModelNames.of(config, folder),
        tokenizer=tokenizer,
        bounds=bounds_of(config, facts, ready),
        defaults=defaults_of(config, facts.defaults),
        vocab_size=ready.vocab_size,
        created_s=int(time.time()),
        formats=formats,
        marker_ids=tokenizer.special_ids_of(formats.markers()),
        thinking=ThinkingMarks.of(formats, tokenizer),
    )
