"""Framing, keys, error shapes, histograms, health: each pure and small."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_lm_server import errors
from mlx_lm_server.errors import ConfigError
from mlx_lm_server.protocol import (
    MAX_FRAME_BYTES,
    Abort,
    FrameBuffer,
    FrameError,
    decode_to_engine,
    encode_frame,
)
from mlx_lm_server.server.engines.metrics import TTFT_BOUNDS, Histogram
from mlx_lm_server.server.http.api_keys import ApiKeys
from mlx_lm_server.server.http.http_errors import STATUSES, HttpError, describe, headers_of
from mlx_lm_server.server.operations.health import judge
from mlx_lm_server.server.protocols.openai.stream import ChatChunks, CompletionChunks, Head


@given(st.lists(st.text(max_size=20), max_size=8), st.lists(st.integers(1, 9), min_size=1))
def test_frames_survive_any_cut(ids: list[str], sizes: list[int]) -> None:
    data = b"".join(encode_frame(Abort(req_id)) for req_id in ids)
    frames, found, at = FrameBuffer(), [], 0
    while at < len(data):
        size = sizes[len(found) % len(sizes)]
        found += frames.feed(data[at : at + size])
        at += size
    assert [decode_to_engine(body) for body in found] == [Abort(req_id) for req_id in ids]


def test_an_impossible_length_is_an_error() -> None:
    with pytest.raises(FrameError):
        FrameBuffer().feed((MAX_FRAME_BYTES + 1).to_bytes(4, "little"))


def test_keys_come_from_the_flag_and_the_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# comment\n\nk1 alice smith\nk2\n")
    keys = ApiKeys("k0", str(file))
    assert keys.name_of(b"k0") == "default"
    assert keys.name_of(b"k1") == "alice smith"
    assert (keys.name_of(b"k2") or "").startswith("key-")
    assert keys.name_of(b"#") is None
    assert keys.name_of(b"") is None


def test_a_key_that_left_the_file_is_valid_no_more_after_a_reload(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("old\n")
    keys = ApiKeys(None, str(file))
    file.write_text("new\n")
    keys.reload()
    assert keys.name_of(b"old") is None
    assert keys.name_of(b"new")


def test_without_keys_none_is_required(tmp_path: Path) -> None:
    assert not ApiKeys(None, None).is_required
    with pytest.raises(ConfigError):
        ApiKeys(None, str(tmp_path / "nothing"))
    (tmp_path / "empty").write_text("# nothing\n")
    with pytest.raises(ConfigError):
        ApiKeys(None, str(tmp_path / "empty"))


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (errors.InvalidRequestError("m", param="p"), 400, None),
        (errors.InvalidRequestError("m", code="c"), 400, "c"),
        (errors.ContextLengthError("m"), 400, "context_length_exceeded"),
        (errors.AuthenticationError("m"), 401, "invalid_api_key"),
        (errors.ModelUnknownError("m"), 404, "model_not_found"),
        (errors.RequestTimeoutError("m"), 408, "request_timeout"),
        (errors.RequestTooLargeError("m"), 413, "request_too_large"),
        (errors.OverloadedError("m", retry_after_s=3), 429, "overloaded"),
        (errors.EngineDiedError("m"), 503, "engine_died"),
        (errors.EngineUnavailableError("m"), 503, "engine_unavailable"),
        (errors.EngineError("m"), 500, "engine_error"),
        (HttpError(405, "m", "c"), 405, "c"),
    ],
    ids=lambda part: type(part).__name__,
)
def test_each_error_has_one_status(error: Exception, status: int, code: str | None) -> None:
    found, body = describe(error)
    assert (found, body.error.code, body.error.message) == (status, code, "m")


def test_what_is_not_ours_tells_nothing() -> None:
    status, body = describe(KeyError("secret path"))
    assert status == 500
    assert "secret" not in body.error.message


def test_every_request_error_has_a_status() -> None:
    for kind in errors.RequestError.__subclasses__():
        assert any(issubclass(kind, known) for known, *_ in STATUSES)


def test_retry_after_is_rounded_up() -> None:
    assert headers_of(errors.OverloadedError("m", retry_after_s=2.1)) == {"retry-after": "3"}
    assert "retry-after" in headers_of(errors.EngineUnavailableError("m"))


def test_a_histogram_counts_what_is_at_most_its_bound() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 99.0):
        histogram.observe(value)
    assert histogram.buckets() == [("1", 2.0), ("2", 3.0), ("+Inf", 4.0)]
    assert histogram.sum == 102.0
    assert list(TTFT_BOUNDS) == sorted(TTFT_BOUNDS)


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


class NoTokens:
    """For chunks that name no tokens."""

    def bytes_of(self, token_id: int) -> bytes:
        raise AssertionError("nobody asked for logprobs")


@pytest.mark.parametrize("kind", [ChatChunks, CompletionChunks])
@given(text=st.text(), model=st.text())
def test_a_chunk_is_json_whatever_the_text(
    kind: type[ChatChunks | CompletionChunks], text: str, model: str
) -> None:
    import json

    for include_usage in (False, True):
        chunks = kind(Head("id", 1, model), NoTokens(), include_usage=include_usage)
        [choice] = json.loads(chunks.text(3, text)[6:])["choices"]
        assert choice["index"] == 3
        assert (choice.get("text"), choice.get("delta")) in (
            (text, None),
            (None, {"content": text}),
        )
