"""What a server says of itself at one moment, and what happened between two."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from mlx_lm_server.commands.running_server import (
    RunningServer,
    UnreachableError,
    refusal,
)
from mlx_lm_server.server.engines.metrics import PREFIX

Labels = Mapping[str, str]


@dataclass(frozen=True)
class Scrape:
    """Numbers of /metrics by name, without the prefix, and the facts of /health."""

    at_s: float
    samples: Mapping[str, list[tuple[Labels, float]]]
    health: Mapping[str, Any] = field(default_factory=dict)

    def total(self, name: str, **labels: str) -> float:
        """Returns the sum over all that have these labels; 0 where there are none."""
        return sum(
            value
            for found, value in self.samples.get(name, ())
            if all(found.get(key) == wanted for key, wanted in labels.items())
        )

    def by_label(self, name: str, label: str) -> dict[str, float]:
        """Returns the sums for each value of one label."""
        values = dict.fromkeys(labels.get(label, "") for labels, _ in self.samples.get(name, ()))
        return {value: self.total(name, **{label: value}) for value in values}


@dataclass(frozen=True)
class Interval:
    """Two scrapes, one after the other. Nothing is known of what happened where there is only one,
    nor where the server was started anew between them: its totals begin at 0 again."""

    before: Scrape | None
    now: Scrape

    def grown(self, name: str, **labels: str) -> float | None:
        if self.before is None:
            return None
        more = self.now.total(name, **labels) - self.before.total(name, **labels)
        return more if more >= 0 else None

    def rate(self, name: str) -> float | None:
        """Returns how much a total grew a second."""
        more = self.grown(name)
        if more is None or self.before is None or self.now.at_s <= self.before.at_s:
            return None
        return more / (self.now.at_s - self.before.at_s)

    def mean(self, histogram: str) -> float | None:
        """Returns the mean of what was observed in between; None where nothing was."""
        count, total = self.grown(f"{histogram}_count"), self.grown(f"{histogram}_sum")
        return total / count if count and total is not None else None


def samples_of(text: str) -> dict[str, list[tuple[Labels, float]]]:
    """Raises UnreachableError for what is no exposition of an mlx-lm-server."""
    found: dict[str, list[tuple[Labels, float]]] = {}
    try:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                name = sample.name.removeprefix(PREFIX)
                found.setdefault(name, []).append((sample.labels, sample.value))
    except (ValueError, KeyError, IndexError) as error:
        raise UnreachableError(f"what came is no text of Prometheus: {error}") from error
    if "num_requests_running" not in found:
        raise UnreachableError("its /metrics are not those of an mlx-lm-server")
    return found


def scrape(server: RunningServer, client: httpx.Client) -> Scrape:
    """Raises RefusedError or UnreachableError. A server that is not ready has no good health, and
    says why; one that has no /health is shown without."""
    with server.translating():
        metrics = client.get("/metrics")
        health = client.get("/health")
    if metrics.status_code != 200:
        raise refusal(metrics.status_code, metrics.content)
    if health.status_code in (401, 403):
        raise refusal(health.status_code, health.content)
    return Scrape(monotonic(), samples_of(metrics.text), _facts(health))


def _facts(response: httpx.Response) -> dict[str, Any]:
    try:
        value = response.json()
    except ValueError:
        return {}
    return value if isinstance(value, dict) and "status" in value else {}
