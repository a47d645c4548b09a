"""What is set about the disk tier and what it counts go whole from where they stand once."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import msgspec
from tests.fakes import numbered_tier
from tier_fakes import NAMESPACE, open_store, settings

from mlx_lm_server.config import Config, TierConfig
from mlx_lm_server.engine.disk_cache import DiskCache
from mlx_lm_server.protocol import (
    LENGTH,
    EngineStats,
    LoadModel,
    Outputs,
    decode_to_engine,
    decode_to_server,
    encode_frame,
)
from mlx_lm_server.server.boot import load_message
from mlx_lm_server.tier_stats import WORDS, TierCounters, TierStats, shown


def test_every_number_has_words_and_those_within_another_are_in_one_that_is_shown() -> None:
    assert [*WORDS[TierCounters]] == [*TierCounters.__struct_fields__]
    assert ["counters", *WORDS[TierStats]] == [*TierStats.__struct_fields__]
    names = {number.name for number in shown(TierStats())}
    for words in WORDS.values():
        assert names >= {about.within for about in words.values() if about.within}


def test_all_that_is_counted_at_the_disk_and_beside_it_reaches_the_server(tmp_path: Path) -> None:
    store = open_store(tmp_path, async_writes=False)
    counted = numbered_tier().counters
    for name in TierCounters.__struct_fields__:
        setattr(store._io.disk.counters, name, getattr(counted, name))
    disk = DiskCache(settings(tmp_path), NAMESPACE, lambda record: True, store)
    disk.note_refused()
    tier = disk.stats(restored_tokens=2)
    assert tier == msgspec.structs.replace(
        store.stats(), counters=counted.plus(TierCounters(write_drops=1, restored_tokens=2))
    )
    assert tier.is_open
    frame = encode_frame(Outputs([], EngineStats(*[0] * 13, tier=tier)))
    message = decode_to_server(frame[LENGTH.size :])
    assert isinstance(message, Outputs)
    assert message.stats.tier == tier


def test_adding_leaves_no_counter_out_and_changes_neither_side() -> None:
    one, other = numbered_tier().counters, numbered_tier().counters
    assert msgspec.structs.astuple(one.plus(other)) == tuple(
        2 * number for number in msgspec.structs.astuple(other)
    )
    assert one == other == numbered_tier().counters


def test_all_that_is_set_reaches_the_engine(tmp_path: Path) -> None:
    flags = TierConfig(
        no_ssd=False,
        ssd_cache_dir=str(tmp_path / "cache"),
        ssd_policy="write_through",
        ssd_durability="persistent",
        ssd_async_writes=False,
        ssd_max_size_gb=1.5,
        ssd_ttl_days=2.5,
        ssd_writer_queue_size=3,
        ssd_persistent_max_retries=4,
        ssd_flush_interval_s=5.5,
    )
    is_default = {one.name for one in fields(flags) if getattr(flags, one.name) == one.default}
    assert is_default == {"no_ssd"}, "with it there is no tier"
    order = decode_to_engine(
        encode_frame(load_message(Config(tier=flags), Path("model")))[LENGTH.size :]
    )
    assert isinstance(order, LoadModel)
    assert order.disk_tier is not None
    assert order.disk_tier.flags == flags
    assert order.disk_tier.folder == flags.ssd_cache_dir
    assert order.disk_tier.flags.max_size_bytes == 1_500_000_000
    assert order.disk_tier.flags.ttl_s == 216_000.0
