"""From traces to numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from mlx_lm_server.bench.trace import Trace


@dataclass(frozen=True, slots=True)
class Spread:
    """A distribution in a few numbers. Seconds, where nothing else is said."""

    count: int
    p50: float
    p95: float
    max: float


@dataclass(frozen=True, slots=True)
class Summary:
    """What one or more rounds of a workload gave. A spread is None where nothing was measured.

    Where newcomers arrive beside decoders, TTFT and E2E are the newcomers' and ITL the decoders'.
    `longest_gap_s` is between two token events of one stream. `extras` holds what only this
    workload measures, by name and with the unit in the name.
    """

    num_requests: int
    num_errors: int
    num_short: int
    wall_s: float
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    output_tokens_per_s: float
    ttft_s: Spread | None
    itl_s: Spread | None
    e2e_s: Spread | None
    longest_gap_s: float | None
    extras: dict[str, float]
    errors: dict[str, int]


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear between the two nearest ranks. `values` must not be empty."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def spread(values: Sequence[float]) -> Spread | None:
    if not values:
        return None
    return Spread(len(values), percentile(values, 50), percentile(values, 95), max(values))


def round_wall_s(traces: Sequence[Trace]) -> float:
    """From the first request sent to the last one's end."""
    ends = [t.ended_at for t in traces if t.ended_at is not None]
    return max(ends) - min(t.sent_at for t in traces) if ends else 0.0


def summarize(rounds: Sequence[Sequence[Trace]]) -> Summary:
    """Latencies are pooled over the rounds; throughput is the median of the rounds, so that one
    disturbed round does not count."""
    traces = [trace for one in rounds for trace in one]
    asked = [t for t in traces if t.role == "busy"] or traces
    gaps = [gap for t in traces if t.role not in ("idle", "busy") for gap in t.gaps_s]
    errors = [t.error for t in traces if t.error is not None]
    return Summary(
        num_requests=len(traces),
        num_errors=len(errors),
        num_short=sum(t.is_short for t in traces),
        wall_s=sum(round_wall_s(one) for one in rounds),
        prompt_tokens=sum(t.prompt_tokens or 0 for t in traces),
        cached_tokens=sum(t.cached_tokens or 0 for t in traces),
        output_tokens=sum(t.output_tokens for t in traces),
        output_tokens_per_s=median([throughput(one) for one in rounds] or [0.0]),
        ttft_s=spread(ttfts(asked)),
        itl_s=spread(gaps),
        e2e_s=spread([e2e for t in asked if (e2e := t.e2e_s) is not None]),
        longest_gap_s=max(gaps, default=None),
        extras=_extras(rounds),
        errors={text: errors.count(text) for text in sorted(set(errors))},
    )


def throughput(traces: Sequence[Trace]) -> float:
    """Output tokens per second of one round."""
    wall_s = round_wall_s(traces)
    return sum(t.output_tokens for t in traces) / wall_s if wall_s > 0 else 0.0


def ttfts(traces: Sequence[Trace], role: str | None = None) -> list[float]:
    return [s for t in traces if role in (None, t.role) and (s := t.ttft_s) is not None]


def _extras(rounds: Sequence[Sequence[Trace]]) -> dict[str, float]:
    """The median of the rounds for each number, from the roles that occur in them."""
    per_round = [
        _newcomer_extras(one) | _prefix_extras(one) | _conversation_extras(one) for one in rounds
    ]
    names = dict.fromkeys(name for extras in per_round for name in extras)
    return {
        name: median([extras[name] for extras in per_round if name in extras]) for name in names
    }


def _newcomer_extras(traces: Sequence[Trace]) -> dict[str, float]:
    """Newcomers beside decoders: what it cost each of them."""
    idle, busy = ttfts(traces, "idle"), ttfts(traces, "busy")
    decoders = [t for t in traces if t.role == "decoder"]
    newcomers = [t for t in traces if t.role == "busy" and t.event_times]
    if not (idle and busy and decoders and newcomers):
        return {}
    windows = [(t.sent_at, t.event_times[0]) for t in newcomers]
    calm, disturbed = split_gaps(decoders, windows)
    step_s = median(calm) if calm else 0.0
    extras = {
        "idle_ttft_p50_s": percentile(idle, 50),
        "busy_ttft_p50_s": percentile(busy, 50),
        "busy_ttft_p95_s": percentile(busy, 95),
        "calm_itl_p50_s": step_s,
        "calm_gap_max_s": max(calm, default=0.0),
        "disturbed_gap_max_s": max(disturbed, default=0.0),
        "busy_prefill_share": percentile(idle, 50) / percentile(busy, 50),
    }
    if step_s > 0:
        extras["gap_over_itl"] = extras["disturbed_gap_max_s"] / step_s
        extras["ttft_over_bound"] = extras["busy_ttft_p95_s"] / (
            2 * extras["idle_ttft_p50_s"] + 2 * step_s
        )
    return extras


def split_gaps(
    decoders: Sequence[Trace], windows: Sequence[tuple[float, float]]
) -> tuple[list[float], list[float]]:
    """Gaps between tokens while all decoders decode: outside of all windows, and touching one."""
    first_window = min(start for start, _ in windows)
    starts = [t.event_times[0] for t in decoders if t.event_times and t.sent_at < first_window]
    all_running = max(starts, default=0.0)
    calm: list[float] = []
    disturbed: list[float] = []
    for trace in decoders:
        for begin, gap in zip(trace.event_times, trace.gaps_s, strict=False):
            if begin < all_running:
                continue
            is_touched = any(begin < end and begin + gap > start for start, end in windows)
            (disturbed if is_touched else calm).append(gap)
    return calm, disturbed


def _prefix_extras(traces: Sequence[Trace]) -> dict[str, float]:
    first, others = ttfts(traces, "first"), ttfts(traces, "other")
    if not first or not others:
        return {}
    return {
        "first_ttft_s": first[0],
        "shared_ttft_p50_s": percentile(others, 50),
        "cached_share": _cached_share([t for t in traces if t.role == "other"]),
    }


def _conversation_extras(traces: Sequence[Trace]) -> dict[str, float]:
    turns = [t for t in traces if t.role == "turn"]
    seconds = ttfts(turns)
    if not seconds:
        return {}
    numbered = {f"turn{i}_ttft_s": s for i, s in enumerate(seconds, start=1)}
    return numbered | {"cached_share": _cached_share(turns)}


def _cached_share(traces: Sequence[Trace]) -> float:
    prompt_tokens = sum(t.prompt_tokens or 0 for t in traces)
    return sum(t.cached_tokens or 0 for t in traces) / prompt_tokens if prompt_tokens else 0.0
