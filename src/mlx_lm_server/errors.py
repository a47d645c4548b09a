"""The exceptions of mlx-lm-server.

ServerError
├── ConfigError                a flag, a config file or their combination is wrong (exit code 2)
├── ModelError                 the model cannot be served
│   ├── ModelNotFoundError     no such path or hub id
│   ├── UnsupportedModelError  a family or format that is not served, named
│   └── ModelTooLargeError     does not fit the memory, with the numbers
├── EngineError                the engine process failed
│   ├── EngineDiedError        it ended or was ended while requests were in it
│   ├── RequestKillsEngineError it ended again and again, each time in a step of one request
│   └── EngineUnavailableError it is not ready (loading, restarting, shutting down)
├── ClientGoneError            the client left; nobody is left to answer
└── RequestError               the client's request cannot be done; has `param` and `code`
    ├── InvalidRequestError    a field is wrong
    ├── ContextLengthError     prompt or prompt + max_tokens over the limit
    ├── ModelUnknownError      `model` names nothing that is served
    ├── AuthenticationError    missing or wrong API key
    ├── RequestTooLargeError   the body is over --max-request-bytes, or can never fit the memory
    ├── RequestTimeoutError    no token within the time limit
    └── OverloadedError        the queue is full or the server is draining; has `retry_after_s`
"""

from __future__ import annotations


class ServerError(Exception):
    """Base of everything this package raises on purpose."""


class ConfigError(ServerError):
    """A flag, a config file or a combination of them is wrong."""


class ModelError(ServerError):
    """The model cannot be served."""


class ModelNotFoundError(ModelError):
    """Neither a local folder nor a hub id that can be fetched."""


class UnsupportedModelError(ModelError):
    """A family or format that is not served; the message names it."""


class ModelTooLargeError(ModelError):
    """The model does not fit the memory; the message has the numbers."""


class EngineError(ServerError):
    """The engine process failed."""


class EngineDiedError(EngineError):
    """The engine ended while requests were in it."""


class RequestKillsEngineError(EngineError):
    """The engine ended whenever it computed one request, at last with nothing else in it."""


class EngineUnavailableError(EngineError):
    """The engine is not ready to take a request."""


class ClientGoneError(ServerError):
    """The client closed its connection; there is nobody left to answer."""


class RequestError(ServerError):
    """The client's request cannot be done.

    `param` names the field at fault, `code` is the machine-readable reason in the words of the
    OpenAI API. The HTTP status belongs to the protocol layer and is chosen there, by type.
    """

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code


class InvalidRequestError(RequestError):
    """A field is missing, of the wrong type or out of range."""


class ContextLengthError(RequestError):
    """Prompt, or prompt plus max_tokens, is over the model's or the server's limit."""


class ModelUnknownError(RequestError):
    """`model` names nothing that is served here."""


class AuthenticationError(RequestError):
    """The API key is missing or wrong."""


class RequestTooLargeError(RequestError):
    """The body is over the limit, or the request can never fit the memory."""


class RequestTimeoutError(RequestError):
    """No token came within the time limit."""


class OverloadedError(RequestError):
    """No room now; try again after `retry_after_s` seconds."""

    def __init__(self, message: str, *, retry_after_s: float, code: str | None = None) -> None:
        super().__init__(message, code=code)
        self.retry_after_s = retry_after_s
