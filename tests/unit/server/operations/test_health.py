from __future__ import annotations

import pytest

from mlx_lm_server.server.operations.health import judge


@pytest.mark.parametrize(
    ("kv_share", "num_waiting", "status"),
    [
        (0.0, 0, "ok"),
        (0.64, 0, "ok"),
        (0.65, 0, "degraded"),
        (0.89, 0, "degraded"),
        (0.9, 0, "overloaded"),
        (0.0, 5, "ok"),
        (0.0, 6, "degraded"),
        (0.0, 10, "overloaded"),
    ],
)
def test_health_by_memory_and_queue(kv_share: float, num_waiting: int, status: str) -> None:
    found, reason = judge(
        is_draining=False,
        engine_state="ready",
        kv_share=kv_share,
        num_waiting=num_waiting,
        max_queue=10,
    )
    assert found == status
    assert bool(reason) == (status != "ok")


def test_health_without_a_queue_is_not_overloaded_by_nobody() -> None:
    status, _ = judge(
        is_draining=False, engine_state="ready", kv_share=0, num_waiting=0, max_queue=0
    )
    assert status == "ok"
