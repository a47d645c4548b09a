from __future__ import annotations

import pytest

from mlx_lm_server import errors
from mlx_lm_server.server.http.http_errors import STATUSES, HttpError, describe, headers_of


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
