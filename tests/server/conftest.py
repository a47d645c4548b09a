from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.server.harness import RunningServer, make_model


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def server(model: Path) -> Iterator[RunningServer]:
    """One for all tests that leave it as they found it."""
    running = RunningServer(
        model,
        flags={"--served-model-name": ["tiny", "other"]},
        engine={"step_s": 0.002},
    ).start()
    yield running
    running.stop()


@pytest.fixture
def start(model: Path) -> Iterator[Callable[..., RunningServer]]:
    """Starts servers with their own settings; they end with the test."""
    started: list[RunningServer] = []

    def start_one(wait: bool = True, **settings: Any) -> RunningServer:
        running = RunningServer(**{"model": model, **settings})
        running.start(wait=False)
        started.append(running)
        if wait:
            running.wait_until(lambda: running.status("/readyz") == 200)
        return running

    yield start_one
    for running in started:
        if running.is_running:
            running.stop()
