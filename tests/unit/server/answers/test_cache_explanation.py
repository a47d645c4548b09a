from __future__ import annotations

import pytest

from mlx_lm_server.protocol import CacheReport
from mlx_lm_server.server.answers import cache_explanation
from mlx_lm_server.server.answers.cache_explanation import CacheFacts, CacheKeys, explain


def test_keys_are_counted_for_each_client() -> None:
    keys = CacheKeys()
    assert [keys.count("anna", "k") for _ in range(3)] == [0, 1, 2]
    assert keys.count("berta", "k") == 0
    assert keys.count("anna", "other") == 0


def test_keys_that_nobody_uses_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_explanation, "MAX_KEYS", 2)
    keys = CacheKeys()
    for key in ("a", "b", "a", "c"):
        keys.count("anna", key)
    assert keys.count("anna", "a") == 2
    assert keys.count("anna", "b") == 0


def test_each_prompt_tells_the_key_of_its_request() -> None:
    report = CacheReport(3, 1, 0, 1, [1], [2], "why", 0.5)
    told = explain(CacheFacts([report, report], "k", 4), lambda _: "text", shows_text=True)
    assert [(one.prompt_cache_key, one.requests_with_key) for one in told] == [("k", 4)] * 2
