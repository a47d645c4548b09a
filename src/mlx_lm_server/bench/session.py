"""Rounds of workloads against one or two targets, interleaved: A B A B.

What disturbs the machine for a while disturbs both targets, so their ratio stays true. Both are
asked the same, but for one server that is compared with itself: it would have B's answers cached.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from mlx_lm_server.bench.client import Client, Target
from mlx_lm_server.bench.drivers import drive
from mlx_lm_server.bench.metrics import Summary, summarize
from mlx_lm_server.bench.plans import Calibration, Shape, make_maker, probes
from mlx_lm_server.bench.trace import Trace
from mlx_lm_server.bench.workloads import WORKLOADS

NUM_PROBES = 2


class TargetUnusableError(Exception):
    """A target does not answer even a short request; the message says what it said."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What to run. `silence_s` ends a request whose server says nothing for so long, `round_s`
    a whole round."""

    workloads: tuple[str, ...]
    rounds: int
    seed: int
    shape: Shape = field(default_factory=Shape)
    silence_s: float = 120.0
    round_s: float = 600.0


@dataclass(slots=True)
class Outcome:
    """All rounds of one workload against one target; `place` is the target's among those of the
    session."""

    workload: str
    target: Target
    place: int = 0
    rounds: list[list[Trace]] = field(default_factory=list)
    client_cpu_s: float = 0.0

    @property
    def summary(self) -> Summary:
        return summarize(self.rounds)

    @property
    def client_cpu_per_token_s(self) -> float:
        tokens = sum(t.output_tokens for one in self.rounds for t in one)
        return self.client_cpu_s / tokens if tokens else 0.0


class Watcher(Protocol):
    """Is told what goes on."""

    def round_started(self, outcome: Outcome, round_index: int) -> None: ...

    def round_ended(self, outcome: Outcome) -> None: ...


class Session:
    """Runs the rounds; `outcomes` may be read at any time, also after an interruption."""

    def __init__(self, targets: Sequence[Target], settings: Settings, watcher: Watcher) -> None:
        self.targets = tuple(targets)
        self.settings = settings
        self.outcomes: list[Outcome] = []
        self._watcher = watcher
        self._calibrations: dict[Target, Calibration] = {}

    @property
    def compares_with_itself(self) -> bool:
        """Whether its targets are one server."""
        return len(self.targets) > 1 and self.targets[0].is_same_server(self.targets[1])

    async def run(self) -> None:
        """Raises TargetUnusableError before the first round."""
        self.targets = tuple([await settle_model(target, self.settings) for target in self.targets])
        for target in dict.fromkeys(self.targets):
            self._calibrations[target] = await calibrate(target, self.settings)
        for workload in self.settings.workloads:
            outcomes = [
                Outcome(workload, target, place) for place, target in enumerate(self.targets)
            ]
            self.outcomes += outcomes
            for round_index in range(self.settings.rounds):
                for outcome in outcomes:
                    self._watcher.round_started(outcome, round_index)
                    await self._run_round(outcome, round_index)
                    self._watcher.round_ended(outcome)

    async def _run_round(self, outcome: Outcome, round_index: int) -> None:
        settings, target = self.settings, outcome.target
        make = make_maker(
            settings.seed,
            outcome.workload,
            round_index,
            settings.shape,
            self._calibrations[target],
            outcome.place if self.compares_with_itself else 0,
        )
        client = Client(target, silence_s=settings.silence_s)
        cpu_s = time.process_time()
        try:
            async with asyncio.timeout(settings.round_s):
                await drive(WORKLOADS[outcome.workload].plan(make), client)
        except TimeoutError:
            _blame_time_limit(client.traces, settings.round_s)
        outcome.client_cpu_s += time.process_time() - cpu_s
        outcome.rounds.append(client.traces)


def _blame_time_limit(traces: list[Trace], round_s: float) -> None:
    for trace in traces:
        if trace.was_stopped:
            trace.was_stopped = False
            trace.error = f"cut off: the round took longer than {round_s:g} s"


async def settle_model(target: Target, settings: Settings) -> Target:
    """Where no model is named and the server wants one: the first that it lists."""
    if target.model is not None:
        return target
    trace = await Client(target, silence_s=settings.silence_s).send(next(probes(settings.seed)))
    if not 400 <= trace.http_status < 500:
        return target
    model = await first_model(target, settings.silence_s)
    return target if model is None else replace(target, model=model)


async def first_model(target: Target, timeout_s: float) -> str | None:
    """The first id of the target's /v1/models, if it has such a list."""
    import httpx

    headers = {"Authorization": f"Bearer {target.api_key}"} if target.api_key else {}
    url = f"{target.url.rstrip('/').removesuffix('/v1')}/v1/models"
    try:
        async with httpx.AsyncClient(timeout=timeout_s) as client:
            answer = await client.get(url, headers=headers)
        return str(answer.json()["data"][0]["id"])
    except (httpx.HTTPError, ValueError, LookupError, TypeError):
        return None


async def calibrate(target: Target, settings: Settings) -> Calibration:
    """Learn from the target's own usage how many tokens our words are; warms it up as well."""
    client = Client(target, silence_s=settings.silence_s)
    points: list[tuple[int, int]] = []
    for call, _ in zip(probes(settings.seed), range(NUM_PROBES), strict=False):
        trace = await client.send(call)
        if trace.error is not None:
            raise TargetUnusableError(f"{target.url}: {trace.error}")
        if trace.prompt_tokens is not None:
            points.append((len(str(call.body["prompt"]).split()), trace.prompt_tokens))
    return fit(points)


def fit(points: Sequence[tuple[int, int]]) -> Calibration:
    """A line through the first and the last point (words, tokens)."""
    if len(points) < 2:
        return Calibration()
    (words, tokens), (more_words, more_tokens) = points[0], points[-1]
    slope = (more_tokens - tokens) / (more_words - words)
    if slope <= 0:
        return Calibration()
    return Calibration(slope, tokens - slope * words)
