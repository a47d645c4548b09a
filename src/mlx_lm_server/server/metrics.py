"""Prometheus metrics, named as vLLM names them.

Counting happens for each token, so it is plain arithmetic on the event loop; the Prometheus client
sees the numbers only when somebody asks for them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from mlx_lm_server.protocol import CacheReport, EngineStats, FinishReason

if TYPE_CHECKING:
    from mlx_lm_server.server.engine_client import OutputStream

PREFIX = "mlx_lm_server:"
TTFT_BOUNDS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0, 640.0,
)  # fmt: skip
ITL_BOUNDS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5,
    5.0, 10.0, 20.0, 40.0,
)  # fmt: skip
E2E_BOUNDS = (
    0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0,
    240.0, 480.0, 960.0, 1920.0,
)  # fmt: skip
TOKEN_BOUNDS = tuple(float(digit * 10**power) for power in range(5) for digit in (1, 2, 5))

# Fields of TierStats.
TIER_COUNTERS = {
    "saves": "Records given to the disk tier.",
    "saves_persisted": "Of them, written.",
    "write_drops": "Not stored for want of room in the queue or on disk.",
    "save_errors": "Writes that failed.",
    "save_retries": "Writes tried again.",
    "enospc": "Writes that found the disk full.",
    "evictions": "Records removed to stay within the limit.",
    "expired": "Records removed for their age.",
    "loads": "Records asked for.",
    "loads_hit": "Of them, read and verified.",
    "corrupt": "Files that were not what they should be.",
    "load_errors": "Reads that failed.",
    "bytes_written": "Bytes written.",
    "bytes_read": "Bytes read.",
    "restored_tokens": "Tokens of blocks that came back from disk.",
}
TIER_GAUGES = {
    "stored_records": "Records of this model on disk.",
    "used_bytes": "Bytes on disk, of all models.",
    "limit_bytes": "Most bytes that may be on disk.",
    "pending_saves": "Records that wait for the writer.",
    "is_paused": "1 while writes fail and none is tried.",
    "is_open": "1 once the folder could be read.",
}


class Histogram:
    """Counts per bound, kept by one thread."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def buckets(self) -> list[tuple[str, float]]:
        """Cumulative counts with their bounds as text."""
        labels = [*(f"{bound:g}" for bound in self.bounds), "+Inf"]
        total = 0
        found = []
        for label, count in zip(labels, self.counts, strict=True):
            total += count
            found.append((label, float(total)))
        return found


class Metrics(Collector):
    """All numbers of one server. The gauges of the engine are read where they live."""

    def __init__(self, model_name: str) -> None:
        self.model_name = model_name
        self.time_to_first_token_s = Histogram(TTFT_BOUNDS)
        self.inter_token_latency_s = Histogram(ITL_BOUNDS)
        self.e2e_latency_s = Histogram(E2E_BOUNDS)
        self.prompt_tokens_per_request = Histogram(TOKEN_BOUNDS)
        self.generation_tokens_per_request = Histogram(TOKEN_BOUNDS)
        self.prompt_tokens = 0
        self.generation_tokens = 0
        self.prefix_cache_queries = 0
        self.prefix_cache_hits = 0
        self.engine_restarts = 0
        self.num_preemptions = 0
        self.kv_bits = 16
        self.finished: Counter[str] = Counter()
        self.http_responses: Counter[int] = Counter()
        self.is_shut_down_clean = False
        self.engine_stats: Callable[[], EngineStats | None] = lambda: None
        self.num_live: Callable[[], int] = lambda: 0

    def observe_tokens(self, stream: OutputStream, num_tokens: int, now: float) -> None:
        """Called before the stream takes the tokens in."""
        self.generation_tokens += num_tokens
        if stream.first_token_s is None:
            self.time_to_first_token_s.observe(now - stream.arrival_s)
            self.prompt_tokens += stream.num_prompt_tokens
        else:
            self.inter_token_latency_s.observe(now - stream.last_token_s)

    def observe_cache(self, report: CacheReport) -> None:
        self.prefix_cache_queries += report.num_prompt_tokens
        self.prefix_cache_hits += report.num_cached_tokens

    def observe_end(self, stream: OutputStream, num_tokens: int, reason: FinishReason) -> None:
        self.finished[reason] += 1
        self.prompt_tokens_per_request.observe(stream.num_prompt_tokens)
        self.generation_tokens_per_request.observe(num_tokens)
        if reason in ("stop", "length"):
            self.e2e_latency_s.observe(stream.last_token_s - stream.arrival_s)

    def exposition(self) -> bytes:
        """The text format of Prometheus."""
        registry = CollectorRegistry(auto_describe=False)
        registry.register(self)
        return generate_latest(registry)

    def collect(self) -> Iterator[Metric]:
        yield from self._histograms()
        yield from self._counters()
        yield from self._gauges()
        yield from self._disk_tier()

    def _histograms(self) -> Iterator[Metric]:
        for name, help, histogram in (
            ("time_to_first_token_seconds", "From arrival to the first token.",
             self.time_to_first_token_s),
            ("inter_token_latency_seconds", "Between a sequence's tokens.",
             self.inter_token_latency_s),
            ("e2e_request_latency_seconds", "From arrival to the last token.",
             self.e2e_latency_s),
            ("request_prompt_tokens", "Prompt length.", self.prompt_tokens_per_request),
            ("request_generation_tokens", "Answer length.", self.generation_tokens_per_request),
        ):  # fmt: skip
            family = HistogramMetricFamily(PREFIX + name, help, labels=["model_name"])
            family.add_metric([self.model_name], histogram.buckets(), histogram.sum)
            yield family

    def _counters(self) -> Iterator[Metric]:
        for name, help, value in (
            ("prompt_tokens", "Prompt tokens of requests that gave a token.", self.prompt_tokens),
            ("generation_tokens", "Tokens generated.", self.generation_tokens),
            ("num_preemptions", "Rows put back by the scheduler.", self._preemptions()),
            ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.",
             self.prefix_cache_queries),
            ("prefix_cache_hits", "Prompt tokens found there.", self.prefix_cache_hits),
            ("engine_restarts", "Engines started anew after a death.", self.engine_restarts),
        ):  # fmt: skip
            family = CounterMetricFamily(PREFIX + name, help, labels=["model_name"])
            family.add_metric([self.model_name], value)
            yield family
        finished = CounterMetricFamily(
            PREFIX + "request_success",
            "Sequences ended, by reason.",
            labels=["model_name", "finished_reason"],
        )
        for reason, count in self.finished.items():
            finished.add_metric([self.model_name, reason], count)
        yield finished
        responses = CounterMetricFamily(
            PREFIX + "http_responses", "HTTP responses, by status.", labels=["status"]
        )
        for status, count in self.http_responses.items():
            responses.add_metric([str(status)], count)
        yield responses

    def _preemptions(self) -> int:
        stats = self.engine_stats()
        return self.num_preemptions + (stats.num_preemptions_total if stats else 0)

    def _disk_tier(self) -> Iterator[Metric]:
        """Of the engine that runs now; nothing where there is no disk tier."""
        stats = self.engine_stats()
        tier = stats.tier if stats else None
        if tier is None:
            return
        for name, help in TIER_COUNTERS.items():
            counter = CounterMetricFamily(f"{PREFIX}ssd_{name}", help, labels=["model_name"])
            counter.add_metric([self.model_name], getattr(tier, name))
            yield counter
        for name, help in TIER_GAUGES.items():
            gauge = GaugeMetricFamily(f"{PREFIX}ssd_{name}", help, labels=["model_name"])
            gauge.add_metric([self.model_name], getattr(tier, name))
            yield gauge

    def _gauges(self) -> Iterator[Metric]:
        stats = self.engine_stats()
        running = stats.num_running if stats else 0
        waiting = max(self.num_live() - running, 0)
        usage = stats.kv_used_bytes / stats.kv_limit_bytes if stats and stats.kv_limit_bytes else 0
        hit_rate = self.prefix_cache_hits / max(1, self.prefix_cache_queries)
        for name, help, value in (
            ("num_requests_running", "Rows in the batch.", running),
            ("num_requests_waiting", "Requests waiting for a row.", waiting),
            ("kv_cache_usage_perc", "Share of the KV memory in use, 0 to 1.", usage),
            ("kv_cache_cached_bytes", "KV memory that the prefix cache keeps.",
             stats.kv_cached_bytes if stats else 0),
            ("kv_cache_bits", "Bits K and V are kept in; 16: not quantised.", self.kv_bits),
        ):  # fmt: skip
            family = GaugeMetricFamily(PREFIX + name, help, labels=["model_name"])
            family.add_metric([self.model_name], value)
            yield family
        for name, help, value in (
            ("active_sequences", "Rows in the batch.", running),
            ("queued_requests", "Requests waiting for a row.", waiting),
            (
                "used_blocks",
                "Blocks in the prefix cache's pool.",
                stats.num_cached_blocks if stats else 0,
            ),
            ("free_blocks", "Free places there.", stats.num_free_blocks if stats else 0),
            ("cache_hit_rate", "Share of prompt tokens found in the prefix cache.", hit_rate),
            ("shutdown_clean", "1 once the server has drained.", int(self.is_shut_down_clean)),
        ):
            yield GaugeMetricFamily(name, help, value=value)
