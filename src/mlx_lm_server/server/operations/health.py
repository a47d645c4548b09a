"""The answers of /livez (the process runs), /readyz (a request would be taken now) and /health (how
the server is, and why)."""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from pydantic import BaseModel, ConfigDict
from starlette.requests import Request
from starlette.responses import Response

from mlx_lm_server.protocol import EngineStats, Ready
from mlx_lm_server.server.http.endpoint import Endpoint, Handler
from mlx_lm_server.server.services import Services
from mlx_lm_server.tier_stats import shown

GROUP = "Health"
Status = Literal["ok", "degraded", "overloaded", "shutting_down"]
# Shares of the KV memory: overloaded from the first, degraded from 72 % of it.
OVERLOADED_KV = 0.9
DEGRADED_KV = 0.72 * OVERLOADED_KV


def kv_usage(stats: EngineStats | None) -> float:
    """Share of the KV memory that is in use, 0 to 1."""
    if stats is None or stats.kv_limit_bytes == 0:
        return 0.0
    return stats.kv_used_bytes / stats.kv_limit_bytes


def judge(
    *, is_draining: bool, engine_state: str, kv_share: float, num_waiting: int, max_queue: int
) -> tuple[Status, str]:
    """The status and the fact that decides it."""
    if is_draining:
        return "shutting_down", "running requests are being finished"
    if engine_state != "ready":
        return "degraded", f"the engine is not ready ({engine_state})"
    if kv_share >= OVERLOADED_KV:
        return "overloaded", f"{kv_share:.0%} of the KV memory is in use"
    if num_waiting > 0 and num_waiting >= max_queue:
        return "overloaded", f"{num_waiting} requests wait for a row"
    if kv_share >= DEGRADED_KV:
        return "degraded", f"{kv_share:.0%} of the KV memory is in use"
    if num_waiting > max_queue / 2:
        return "degraded", f"{num_waiting} requests wait for a row"
    return "ok", ""


class StatusAnswer(BaseModel):
    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True)

    status: str
    """In a word."""


class HealthAnswer(StatusAnswer):
    """How the server is, and the facts behind that."""

    reason: str
    """The fact that decides the status."""
    model: str
    """Name of the served model."""
    engine: dict[str, Any]
    """The engine process: its state, its device, how it batches."""
    num_running: int
    """Sequences that have a row."""
    num_waiting: int
    """Sequences that wait for one."""
    max_batch_size: int
    """Most rows."""
    max_queue_size: int
    """Most sequences that may wait."""
    kv_used_bytes: int
    """KV memory that live rows use."""
    kv_cached_bytes: int
    """KV memory that the prefix cache keeps and gives up when rows need it."""
    kv_limit_bytes: int
    """KV memory in all."""
    kv_usage: float
    """Share of it in use, 0 to 1."""
    memory_pressure: str
    """How short the system finds the machine's memory: normal, warn or critical. Told by macOS
    only."""
    disk_tier: dict[str, Any] | None
    """The cache on disk: its folder, what it holds and what went wrong; null where it is off."""


class HealthRoutes:
    def __init__(self, services: Services) -> None:
        self._services = services

    def endpoints(self) -> list[Endpoint]:
        return [
            _probe("/livez", self.livez, "The process is alive", StatusAnswer),
            _probe("/readyz", self.readyz, "A request would be taken now", StatusAnswer, 503),
            _probe("/health", self.health, "How the server is, and why", HealthAnswer, 503),
            Endpoint(
                "GET",
                "/metrics",
                self.metrics,
                "Numbers for Prometheus",
                GROUP,
                media_type="text/plain",
                is_open=True,
            ),
        ]

    async def livez(self, _: Request) -> Response:
        return _json(200, {"status": "alive"})

    async def readyz(self, _: Request) -> Response:
        if self._services.is_ready:
            return _json(200, {"status": "ready"})
        return _json(503, {"status": "not ready", "engine": self._engine_state()})

    async def health(self, _: Request) -> Response:
        """503 where no request would get an answer: overloaded, shutting down, no engine."""
        services = self._services
        stats = services.client.stats
        num_running = stats.num_running if stats else 0
        num_waiting = max(services.client.num_live - num_running, 0)
        status, reason = judge(
            is_draining=services.admission.is_draining,
            engine_state=self._engine_state(),
            kv_share=kv_usage(stats),
            num_waiting=num_waiting,
            max_queue=services.config.batching.max_queue_size,
        )
        is_bad = status in ("overloaded", "shutting_down") or self._engine_state() != "ready"
        facts = {
            "status": status,
            "reason": reason,
            "model": services.names.shown[0],
            "engine": self._engine_facts(),
            "num_running": num_running,
            "num_waiting": num_waiting,
            "max_batch_size": services.config.batching.max_batch_size,
            "max_queue_size": services.config.batching.max_queue_size,
            "kv_used_bytes": stats.kv_used_bytes if stats else 0,
            "kv_cached_bytes": stats.kv_cached_bytes if stats else 0,
            "kv_limit_bytes": self._kv_limit_bytes(),
            "kv_usage": round(kv_usage(stats), 4),
            "memory_pressure": stats.memory_pressure if stats else "normal",
            "disk_tier": self._tier_facts(stats),
        }
        return _json(503 if is_bad else 200, facts)

    async def metrics(self, _: Request) -> Response:
        body = self._services.metrics.exposition()
        return Response(body, media_type="text/plain; version=0.0.4; charset=utf-8")

    def _engine_state(self) -> str:
        services = self._services
        if services.supervisor is None:
            return "starting"
        if services.supervisor.state == "ready" and not services.has_model:
            return "starting"
        return services.supervisor.state

    @property
    def _ready(self) -> Ready | None:
        """What the engine said of itself when it had loaded."""
        supervisor = self._services.supervisor
        return supervisor.ready if supervisor else None

    def _kv_limit_bytes(self) -> int:
        """Known from the moment that the engine is ready, before it says how it goes."""
        return self._ready.kv_limit_bytes if self._ready else 0

    def _tier_facts(self, stats: EngineStats | None) -> dict[str, Any] | None:
        if self._ready is None or not self._ready.disk_tier:
            return None
        tier = stats.tier if stats else None
        numbers = {number.name: number.value for number in shown(tier)} if tier else {}
        return {"folder": self._ready.disk_tier, **numbers}

    def _engine_facts(self) -> dict[str, Any]:
        supervisor = self._services.supervisor
        facts: dict[str, Any] = {"state": self._engine_state()}
        if supervisor is not None:
            facts |= {"pid": supervisor.pid, "restarts": supervisor.num_restarts}
            if supervisor.ready is not None:
                ready = supervisor.ready
                facts |= {"device": ready.device, "way": ready.way, "blas": ready.blas}
                facts |= {"submission": ready.submission}
                facts |= {"batching": ready.batching, "batching_reason": ready.batching_reason}
                facts |= {"kv_bits": ready.kv_bits, "kv_format": ready.kv_format}
        return facts


def _probe(path: str, handler: Handler, about: str, answer: type[BaseModel], *bad: int) -> Endpoint:
    """Declares an endpoint whose body says the same with a bad status."""
    statuses = (200, *bad)
    return Endpoint(
        "GET", path, handler, about, GROUP, answer=answer, statuses=statuses, is_open=True
    )


def _json(status: int, value: dict[str, Any]) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")
