"""The one place that decides an HTTP status, and the one shape that errors are sent in.

`describe` walks the type of an exception up to the nearest row of the table, so that every
error, also one that is added later, has an answer. Faults of the HTTP conversation itself are
the `ProtocolError`s.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from starlette.responses import JSONResponse

from sloraj import errors


class ProtocolError(Exception):
    """The HTTP request cannot be taken, whatever it asks. `headers` go onto the answer."""

    def __init__(
        self, message: str, *, param: str | None = None, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.headers = headers or {}


class BadRequest(ProtocolError):
    """The request is malformed as HTTP or JSON."""


class Unauthenticated(ProtocolError):
    """No key, or a wrong one."""


class Forbidden(ProtocolError):
    """The key does not allow this."""


class RouteNotFound(ProtocolError):
    """No endpoint has that path."""


class MethodNotAllowed(ProtocolError):
    """The path exists, the method does not."""


class BodyTimeout(ProtocolError):
    """The body came too slowly."""


class BodyTooLarge(ProtocolError):
    """The body is larger than the server takes."""


class UnsupportedMediaType(ProtocolError):
    """The body is not declared as JSON."""


class HeadersTooLarge(ProtocolError):
    """Too many headers, or too long."""


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    """How one kind of error is told to a client."""

    status: int
    type: str
    code: str
    is_retryable: bool = True  # False: tell clients that a second try costs and cannot help


_BAD, _GONE, _BUSY = "invalid_request_error", "not_found_error", "service_unavailable_error"

TABLE: dict[type[BaseException], Answer] = {
    errors.SlorajError: Answer(500, "server_error", "internal_error", is_retryable=False),
    errors.RequestError: Answer(400, _BAD, "invalid_request"),
    errors.InvalidRequest: Answer(400, _BAD, "invalid_value"),
    errors.ContextTooLong: Answer(400, _BAD, "context_length_exceeded"),
    errors.AdapterNotFound: Answer(404, _GONE, "model_not_found"),
    errors.AdapterError: Answer(400, _BAD, "adapter_error"),
    errors.AdapterLoadError: Answer(400, _BAD, "adapter_unusable"),
    errors.AdapterFilesNotFound: Answer(404, _GONE, "adapter_files_not_found"),
    errors.AdapterExists: Answer(400, _BAD, "adapter_exists"),
    errors.AdapterBusy: Answer(409, "conflict_error", "adapter_busy"),
    errors.CapacityError: Answer(503, _BUSY, "overloaded"),
    errors.QueueFull: Answer(503, _BUSY, "queue_full"),
    errors.FirstTokenTooLate: Answer(503, _BUSY, "first_token_too_late"),
    errors.EngineUnavailable: Answer(503, _BUSY, "engine_unavailable"),
    errors.ConfigError: Answer(500, "server_error", "bad_configuration", is_retryable=False),
    errors.InternalError: Answer(500, "server_error", "internal_error", is_retryable=False),
    BadRequest: Answer(400, _BAD, "bad_request"),
    Unauthenticated: Answer(401, "authentication_error", "invalid_api_key"),
    Forbidden: Answer(403, "permission_error", "forbidden"),
    RouteNotFound: Answer(404, _GONE, "route_not_found"),
    MethodNotAllowed: Answer(405, _BAD, "method_not_allowed"),
    BodyTimeout: Answer(408, _BAD, "body_timeout"),
    BodyTooLarge: Answer(413, _BAD, "body_too_large"),
    UnsupportedMediaType: Answer(415, _BAD, "unsupported_media_type"),
    HeadersTooLarge: Answer(431, _BAD, "headers_too_large"),
    Exception: Answer(500, "server_error", "internal_error", is_retryable=False),
}

DEFAULT_RETRY_AFTER_S = 1.0


def describe(exc: BaseException) -> Answer:
    """The table row of the nearest ancestor of the exception's type."""
    for kind in type(exc).__mro__:
        if kind in TABLE:
            return TABLE[kind]
    return TABLE[Exception]


def error_body(exc: BaseException) -> dict[str, Any]:
    """`{"error": {message, type, param, code}}`; an unforeseen exception keeps its text to
    itself.
    """
    answer = describe(exc)
    message = getattr(exc, "message", None) or "internal error; the server's log says more"
    param = getattr(exc, "param", None)
    return {"error": {"message": message, "type": answer.type, "param": param, "code": answer.code}}


def error_headers(exc: BaseException) -> dict[str, str]:
    """Retry-After (whole seconds, 1 at least) on 503, and `x-should-retry: false` where it is
    vain.
    """
    answer = describe(exc)
    headers = dict(getattr(exc, "headers", {}))
    if answer.status == 503:
        retry_after_s = getattr(exc, "retry_after_s", None) or DEFAULT_RETRY_AFTER_S
        headers["retry-after"] = str(max(1, math.ceil(retry_after_s)))
    if not answer.is_retryable:
        headers["x-should-retry"] = "false"
    return headers


def error_response(exc: BaseException) -> JSONResponse:
    return JSONResponse(
        error_body(exc), status_code=describe(exc).status, headers=error_headers(exc)
    )


def shown(value: Any, limit: int = 80) -> str:
    """`value` as it may be echoed to a client or a log: one line, escaped, at most `limit` long."""
    if isinstance(value, str):
        value = value[: limit + 1]
    elif isinstance(value, list | tuple | dict):
        kind = {list: "list", tuple: "list", dict: "object"}[type(value)]
        return f"{'an' if kind == 'object' else 'a'} {kind} of {len(value)}"
    elif value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = ascii(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
