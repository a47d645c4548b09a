"""How many files a server may have open."""

from __future__ import annotations

import errno
import resource

import pytest

from mlx_lm_server.server.listening import OPEN_FILES, allow_many_files

NO_LIMIT = resource.RLIM_INFINITY


class StrictLimits:
    """Refuses more than `most`, which it does not tell, as macOS does."""

    def __init__(self, soft: int, hard: int, most: int, refusal: Exception) -> None:
        self.soft, self._hard, self._most, self._refusal = soft, hard, most, refusal
        self.asked: list[int] = []

    def getrlimit(self, which: int, /) -> tuple[int, int]:
        assert which == resource.RLIMIT_NOFILE
        return self.soft, self._hard

    def setrlimit(self, which: int, limits: tuple[int, int], /) -> None:
        soft, hard = limits
        assert hard == self._hard
        self.asked.append(soft)
        if soft > self._most:
            raise self._refusal
        self.soft = soft


REFUSALS = [
    ValueError("current limit exceeds maximum limit"),
    OSError(errno.EINVAL, "Invalid argument"),
]


@pytest.mark.parametrize("refusal", REFUSALS, ids=["value", "system"])
@pytest.mark.parametrize(
    ("soft", "hard", "most", "gets"),
    [
        (256, NO_LIMIT, 10240, 10240),
        (256, NO_LIMIT, 24576, 24576),
        (256, NO_LIMIT, 1 << 20, OPEN_FILES[0]),
        (1024, 4096, 1 << 20, 4096),
        (1024, 12000, 10500, 10240),
        (256, NO_LIMIT, 300, 256),
        (20000, NO_LIMIT, 10240, 20000),
        (NO_LIMIT, NO_LIMIT, 10240, NO_LIMIT),
    ],
)
def test_it_gets_as_many_files_as_the_system_grants(
    soft: int, hard: int, most: int, gets: int, refusal: Exception
) -> None:
    limits = StrictLimits(soft, hard, most, refusal)
    allow_many_files(limits)
    assert limits.soft == gets
    assert all(asked > soft for asked in limits.asked), "never fewer than it has"
