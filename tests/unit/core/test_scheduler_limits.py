from __future__ import annotations

import pytest

from mlx_lm_server.core.scheduler_limits import SchedulerLimits
from mlx_lm_server.errors import ConfigError


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_batch_size": 0}, "max_batch_size must be at least 1"),
        ({"max_batch_size": 32, "max_num_batched_tokens": 16}, "one token a step"),
    ],
)
def test_limits_that_cannot_work_are_refused(limits: dict[str, int], message: str):
    with pytest.raises(ConfigError, match=message):
        SchedulerLimits(**limits)
