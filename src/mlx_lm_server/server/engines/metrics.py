"""Prometheus metrics, named as vLLM names them.

Counting happens for each token, so it is plain arithmetic on the event loop; the Prometheus client
sees the numbers only when somebody asks for them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, get_args

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from mlx_lm_server.config import KVConfig
from mlx_lm_server.protocol import (
    CacheReport,
    EngineStats,
    FinishReason,
    MemoryPressure,
    Ready,
    RequestOutput,
)
from mlx_lm_server.tier_stats import shown

if TYPE_CHECKING:
    from mlx_lm_server.server.answers.generate_request import GenerateRequest
    from mlx_lm_server.server.engines.output_stream import OutputStream
    from mlx_lm_server.server.models.served_model import Bounds

PREFIX = "mlx_lm_server:"
PRESSURES: Sequence[MemoryPressure] = get_args(MemoryPressure)
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
STEP_BOUNDS = tuple(float(tokens) for tokens in (1, *(2**power for power in range(3, 15))))
COUNT_BOUNDS = (0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 10.0, 20.0, 50.0)
TOKEN_BOUNDS = tuple(float(digit * 10**power) for power in range(5) for digit in (1, 2, 5))


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
        self.queue_time_s = Histogram(E2E_BOUNDS)
        self.prefill_time_s = Histogram(E2E_BOUNDS)
        self.decode_time_s = Histogram(E2E_BOUNDS)
        self.inference_time_s = Histogram(E2E_BOUNDS)
        self.time_per_output_token_s = Histogram(ITL_BOUNDS)
        self.computed_tokens_per_request = Histogram(TOKEN_BOUNDS)
        self.preemptions_per_request = Histogram(COUNT_BOUNDS)
        self.max_tokens_asked = Histogram(TOKEN_BOUNDS)
        self.choices_asked = Histogram(COUNT_BOUNDS)
        self.longest_choice_tokens = Histogram(TOKEN_BOUNDS)
        self.step_tokens = Histogram(STEP_BOUNDS)
        self.prompt_tokens = 0
        self.generation_tokens = 0
        self.prefix_cache_queries = 0
        self.prefix_cache_hits = 0
        self.engine_restarts = 0
        self.resumed_requests = 0
        self.num_preemptions = 0  # in engines that are gone
        self.kv_bits = 16
        self.cache_config: Mapping[str, str] = {}
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

    def observe_start(self, output: RequestOutput) -> None:
        """Observes what a sequence's first token says of the time until it."""
        self.queue_time_s.observe(output.queue_s)
        self.prefill_time_s.observe(output.prefill_s)

    def observe_cache(self, report: CacheReport) -> None:
        self.prefix_cache_queries += report.num_prompt_tokens
        self.prefix_cache_hits += report.num_cached_tokens
        self.computed_tokens_per_request.observe(
            report.num_prompt_tokens - report.num_cached_tokens
        )

    def observe_steps(self, step_tokens: Sequence[int]) -> None:
        for num_tokens in step_tokens:
            self.step_tokens.observe(num_tokens)

    def keep_totals(self, stats: EngineStats | None) -> None:
        """Keeps what an engine that is gone has counted, of what else only the engine counts."""
        if stats is not None:
            self.num_preemptions += stats.num_preemptions_total

    def observe_end(
        self, stream: OutputStream, request: GenerateRequest, num_tokens: int, reason: FinishReason
    ) -> None:
        self.finished[reason] += 1
        self.prompt_tokens_per_request.observe(stream.num_prompt_tokens)
        self.generation_tokens_per_request.observe(num_tokens)
        self.max_tokens_asked.observe(0 if request.is_prompt_only else request.sampling.max_tokens)
        if reason in ("stop", "length"):
            self.e2e_latency_s.observe(stream.last_token_s - stream.arrival_s)
            self.preemptions_per_request.observe(stream.num_preemptions)
            self._observe_decoding(stream, num_tokens)

    def _observe_decoding(self, stream: OutputStream, num_tokens: int) -> None:
        if stream.first_token_s is None:
            return
        decode_s = stream.last_token_s - stream.first_token_s
        self.decode_time_s.observe(decode_s)
        self.inference_time_s.observe(stream.prefill_s + decode_s)
        if num_tokens > 1:
            self.time_per_output_token_s.observe(decode_s / (num_tokens - 1))

    def observe_choices(self, num_choices: int, longest_tokens: int) -> None:
        """Observes a prompt whose last choice has ended."""
        self.choices_asked.observe(num_choices)
        self.longest_choice_tokens.observe(longest_tokens)

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
            ("request_queue_time_seconds", "From arrival in the engine to a row.",
             self.queue_time_s),
            ("request_prefill_time_seconds", "From a row to the first token.",
             self.prefill_time_s),
            ("request_decode_time_seconds", "From the first token to the last.",
             self.decode_time_s),
            ("request_inference_time_seconds", "From a row to the last token.",
             self.inference_time_s),
            ("request_time_per_output_token_seconds",
             "A sequence's mean time between tokens.", self.time_per_output_token_s),
            ("request_prefill_kv_computed_tokens",
             "Prompt tokens that were computed, not cached.", self.computed_tokens_per_request),
            ("request_num_preemptions", "How often a sequence gave its row back.",
             self.preemptions_per_request),
            ("request_params_n", "Choices asked for, of a prompt.", self.choices_asked),
            ("request_params_max_tokens", "Tokens that an answer might have.",
             self.max_tokens_asked),
            ("request_max_num_generation_tokens", "Length of a prompt's longest choice.",
             self.longest_choice_tokens),
            ("iteration_tokens_total", "Tokens that a step of the engine computes.",
             self.step_tokens),
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
            ("prompt_tokens_cached", "Prompt tokens that were not computed.",
             self.prefix_cache_hits),
            ("engine_restarts", "Engines started anew after a death.", self.engine_restarts),
            ("resumed_requests", "Sequences that a next engine took up again.",
             self.resumed_requests),
        ):  # fmt: skip
            family = CounterMetricFamily(PREFIX + name, help, labels=["model_name"])
            family.add_metric([self.model_name], value)
            yield family
        yield self._labelled(
            CounterMetricFamily,
            "prompt_tokens_by_source",
            "Prompt tokens, by where they came from.",
            "source",
            {
                "local_compute": self.prompt_tokens - self.prefix_cache_hits,
                "local_cache_hit": self.prefix_cache_hits,
            },
        )
        yield self._labelled(
            CounterMetricFamily,
            "request_success",
            "Sequences ended, by reason.",
            "finished_reason",
            self.finished,
        )
        responses = CounterMetricFamily(
            PREFIX + "http_responses", "HTTP responses, by status.", labels=["status"]
        )
        for status, count in self.http_responses.items():
            responses.add_metric([str(status)], count)
        yield responses

    def _labelled(
        self,
        kind: type[CounterMetricFamily] | type[GaugeMetricFamily],
        name: str,
        help: str,
        label: str,
        values: Mapping[str, float],
    ) -> Metric:
        """A metric with a value for each value of one label."""
        family = kind(PREFIX + name, help, labels=["model_name", label])
        for key, value in values.items():
            family.add_metric([self.model_name, key], value)
        return family

    def _preemptions(self) -> int:
        stats = self.engine_stats()
        return self.num_preemptions + (stats.num_preemptions_total if stats else 0)

    def _disk_tier(self) -> Iterator[Metric]:
        """Yields the numbers of the running engine's disk tier, if it has one."""
        stats = self.engine_stats()
        tier = stats.tier if stats else None
        if tier is None:
            return
        for number in shown(tier):
            kind = CounterMetricFamily if number.is_total else GaugeMetricFamily
            family = kind(f"{PREFIX}ssd_{number.name}", number.help, labels=["model_name"])
            family.add_metric([self.model_name], number.value)
            yield family

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
            ("memory_pressure", "How short memory is: 0 normal, 1 warn, 2 critical.",
             PRESSURES.index(stats.memory_pressure) if stats else 0),
        ):  # fmt: skip
            family = GaugeMetricFamily(PREFIX + name, help, labels=["model_name"])
            family.add_metric([self.model_name], value)
            yield family
        deferred = min(stats.num_deferred, waiting) if stats else 0
        yield self._labelled(
            GaugeMetricFamily,
            "num_requests_waiting_by_reason",
            "Requests waiting for room (capacity), or for what the disk tier reads (deferred).",
            "reason",
            {"capacity": waiting - deferred, "deferred": deferred},
        )
        if self.cache_config:
            info = GaugeMetricFamily(
                f"{PREFIX}cache_config_info", "What the KV cache is.", labels=[*self.cache_config]
            )
            info.add_metric([*self.cache_config.values()], 1)
            yield info
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


def cache_config(kv: KVConfig, ready: Ready, bounds: Bounds) -> dict[str, str]:
    """Labels that say what the KV cache is, named as vLLM names them."""
    return {
        "block_size": str(kv.block_size),
        "cache_dtype": ready.kv_format or "auto",
        "enable_prefix_caching": str(not kv.no_prefix_cache),
        "num_gpu_blocks": str(bounds.kv_tokens // kv.block_size),
        "num_gpu_blocks_override": str(kv.num_blocks),
    }
