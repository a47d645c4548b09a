"""One frame of `top`: what a server does, as a table for a terminal or a pipe."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mlx_lm_server.commands.top.scrape import Interval
from mlx_lm_server.server.engines.metrics import PRESSURES

BAR_CELLS = 20
UNKNOWN = "–"
STYLES = {"ok": "green", "degraded": "yellow", "overloaded": "red", "shutting_down": "yellow"}
PRESSURE_STYLES: Mapping[str, str] = dict(zip(PRESSURES, ("", "yellow", "red"), strict=True))

Row = tuple[str, Text | str]


def frame(interval: Interval, *, trouble: str = "", when: str = "") -> RenderableType:
    """`trouble` says why nothing newer is known; the numbers are then dim."""
    table = Table.grid(padding=(0, 2))
    for name, found in _rows(interval):
        table.add_row(Text(name, style="bold"), found, style="dim" if trouble else "")
    head = [_headline(interval, when)]
    if trouble:
        head.append(Text(f"{trouble}; trying again", style="red"))
    return Group(*head, table)


def _headline(interval: Interval, when: str) -> Text:
    health = interval.now.health
    status = str(health.get("status", "unknown"))
    parts = [
        Text(str(health.get("model", "mlx-lm-server")), style="bold"),
        Text(status, style=STYLES.get(status, "")),
    ]
    if reason := health.get("reason"):
        parts.append(Text(str(reason)))
    if when:
        parts.append(Text(when, style="dim"))
    return Text("  ").join(parts)


def _rows(interval: Interval) -> Iterator[Row]:
    yield from _work(interval)
    yield from _speed(interval)
    yield from _cache(interval)
    yield from _memory(interval)
    yield from _engine(interval)
    yield "answers", _counts(interval)


def _work(interval: Interval) -> Iterator[Row]:
    now = interval.now
    yield "rows", _of_most(now.total("num_requests_running"), now.health.get("max_batch_size"))
    queue = _of_most(now.total("num_requests_waiting"), now.health.get("max_queue_size"))
    if deferred := now.total("num_requests_waiting_by_reason", reason="deferred"):
        queue.append(f"  {deferred:.0f} for the disk")
    yield "queue", queue


def _speed(interval: Interval) -> Iterator[Row]:
    answers, prompts = (
        _number(interval.rate(f"{kind}_tokens_total")) for kind in ("generation", "prompt")
    )
    yield "tok/s", f"{answers} generated  {prompts} of prompts"
    first, between, waited = (
        _time(interval.mean(name))
        for name in (
            "time_to_first_token_seconds",
            "inter_token_latency_seconds",
            "request_queue_time_seconds",
        )
    )
    yield "means", f"{first} to the first token  {between} between tokens  {waited} in the queue"


def _cache(interval: Interval) -> Iterator[Row]:
    now = interval.now
    asked, hits = (interval.grown(f"prefix_cache_{kind}_total") for kind in ("queries", "hits"))
    lately = f"{hits / asked:.0%}" if asked and hits is not None else UNKNOWN
    all_asked = now.total("prefix_cache_queries_total")
    ever = now.total("prefix_cache_hits_total") / all_asked if all_asked else 0.0
    used, free = now.total("used_blocks"), now.total("free_blocks")
    yield (
        "cache",
        f"{lately} of prompt tokens found, {ever:.0%} since the start  "
        f"{_bytes(now.total('kv_cache_cached_bytes'))}  "
        f"{used:.0f} blocks, {free:.0f} free",
    )
    if "ssd_used_bytes" in now.samples:
        yield "disk", _disk(interval)


def _disk(interval: Interval) -> Text:
    now = interval.now
    limit = now.total("ssd_limit_bytes")
    held = _bytes(now.total("ssd_used_bytes")) + (f" of {_bytes(limit)}" if limit else "")
    read, written = (interval.rate(f"ssd_bytes_{way}_total") for way in ("read", "written"))
    asked, hits = now.total("ssd_loads_total"), now.total("ssd_loads_hit_total")
    line = Text(
        f"{held}  {_flow(read)} read, {_flow(written)} written  "
        f"{hits:.0f} of {asked:.0f} reads good  "
        f"{now.total('ssd_pending_saves'):.0f} to be written"
    )
    if now.total("ssd_is_paused"):
        line.append("  paused: writes fail", "red")
    return line


def _flow(rate: float | None) -> str:
    return UNKNOWN if rate is None else f"{_bytes(rate)}/s"


def _memory(interval: Interval) -> Iterator[Row]:
    now = interval.now
    usage = now.total("kv_cache_usage_perc")
    line = _bar(usage)
    line.append(f" {usage:.0%} of the KV memory")
    if limit := now.health.get("kv_limit_bytes"):
        line.append(f", {_bytes(now.health.get('kv_used_bytes', 0))} of {_bytes(limit)}")
    pressure = str(now.health.get("memory_pressure", "normal"))
    if pressure != "normal":
        line.append(f"  the system is short of it: {pressure}", PRESSURE_STYLES.get(pressure, ""))
    if taken_back := now.total("num_preemptions_total"):
        line.append(f"  {taken_back:.0f} rows taken back")
    yield "memory", line


def _engine(interval: Interval) -> Iterator[Row]:
    engine = interval.now.health.get("engine")
    if not isinstance(engine, Mapping):
        return
    state = str(engine.get("state", "unknown"))
    line = Text.assemble((state, "green" if state == "ready" else "yellow"))
    if engine.get("pid"):
        line.append(f"  pid {engine['pid']}")
    restarts = interval.now.total("engine_restarts_total")
    line.append(f"  restarts {restarts:.0f}", "yellow" if restarts else "")
    yield "engine", line
    if "device" in engine:
        facts = [
            str(engine["device"]),
            f"way {engine.get('way') or UNKNOWN}",
            str(engine.get("batching", "")),
            f"K and V {engine.get('kv_format') or UNKNOWN}",
            f"submitted {engine.get('submission') or UNKNOWN}",
        ]
        yield "", "  ".join(fact for fact in facts if fact)


def _counts(interval: Interval) -> str:
    ended = interval.now.by_label("request_success_total", "finished_reason")
    statuses = interval.now.by_label("http_responses_total", "status")
    parts = [f"{reason} {count:.0f}" for reason, count in sorted(ended.items())]
    bad = sum(count for status, count in statuses.items() if status >= "400")
    parts.append(f"HTTP {sum(statuses.values()) - bad:.0f} good, {bad:.0f} bad")
    return "  ".join(parts)


def _of_most(value: float, most: object) -> Text:
    if not isinstance(most, int | float) or most <= 0:
        return Text(f"{value:.0f}")
    return _bar(value / most).append(f" {value:.0f} of {most:.0f}")


def _bar(share: float) -> Text:
    full = round(BAR_CELLS * min(1.0, max(0.0, share)))
    style = "red" if share >= 0.9 else "yellow" if share >= 0.65 else "green"
    return Text.assemble(("█" * full, style), ("░" * (BAR_CELLS - full), "dim"))


def _number(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def _time(value_s: float | None) -> str:
    if value_s is None:
        return UNKNOWN
    return f"{value_s:.1f} s" if value_s >= 1 else f"{1000 * value_s:.1f} ms"


def _bytes(value: float) -> str:
    for factor, unit in ((10**9, "GB"), (10**6, "MB")):
        if value >= factor:
            return f"{value / factor:.1f} {unit}"
    return f"{value / 1000:.0f} kB"
