"""The one place where exceptions become HTTP statuses and OpenAI's error objects."""

from __future__ import annotations

import math
from collections.abc import Mapping

import msgspec

from mlx_lm_server import errors

# (status, type in the error object, code where the exception has none); the first match counts.
STATUSES: tuple[tuple[type[Exception], int, str, str | None], ...] = (
    (errors.ContextLengthError, 400, "invalid_request_error", "context_length_exceeded"),
    (errors.InvalidRequestError, 400, "invalid_request_error", None),
    (errors.AuthenticationError, 401, "authentication_error", "invalid_api_key"),
    (errors.ModelUnknownError, 404, "invalid_request_error", "model_not_found"),
    (errors.RequestTimeoutError, 408, "timeout_error", "request_timeout"),
    (errors.RequestTooLargeError, 413, "invalid_request_error", "request_too_large"),
    (errors.OverloadedError, 429, "rate_limit_error", "overloaded"),
    (errors.EngineDiedError, 503, "server_error", "engine_died"),
    (errors.RequestKillsEngineError, 500, "server_error", "request_kills_engine"),
    (errors.EngineUnavailableError, 503, "server_error", "engine_unavailable"),
    (errors.EngineError, 500, "server_error", "engine_error"),
)
UNAVAILABLE_RETRY_AFTER_S = 2


class HttpError(errors.ServerError):
    """What the HTTP layer itself refuses: no such route, wrong method."""

    def __init__(
        self, status: int, message: str, code: str, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.headers = headers or {}


class ErrorBody(msgspec.Struct, frozen=True):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(msgspec.Struct, frozen=True):
    """OpenAI's error object, as a body or as an event of a stream."""

    error: ErrorBody


def describe(error: Exception) -> tuple[int, ErrorResponse]:
    """Status and error object. What is not ours is a 500 that tells nothing of its inside."""
    if isinstance(error, HttpError):
        body = ErrorBody(str(error), "invalid_request_error", None, error.code)
        return error.status, ErrorResponse(body)
    param = code = None
    if isinstance(error, errors.RequestError):
        param, code = error.param, error.code
    for kind, status, type_, default_code in STATUSES:
        if isinstance(error, kind):
            return status, ErrorResponse(ErrorBody(str(error), type_, param, code or default_code))
    body = ErrorBody("internal error of the server", "server_error", None, "internal_error")
    return 500, ErrorResponse(body)


def headers_of(error: Exception) -> Mapping[str, str]:
    """Headers that go with an error's status."""
    if isinstance(error, HttpError):
        return error.headers
    if isinstance(error, errors.OverloadedError):
        return {"retry-after": str(max(1, math.ceil(error.retry_after_s)))}
    if isinstance(error, errors.EngineUnavailableError | errors.EngineDiedError):
        return {"retry-after": str(UNAVAILABLE_RETRY_AFTER_S)}
    if isinstance(error, errors.AuthenticationError):
        return {"www-authenticate": "Bearer"}
    return {}
