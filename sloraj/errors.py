"""Errors that cross an API boundary. HTTP status is decided in `serving/errors.py` alone.

SlorajError
├── RequestError            the caller's request cannot be served as it stands
│   ├── InvalidRequest      a field is wrong (`param` names it)
│   ├── ContextTooLong      prompt, or prompt plus max_tokens, exceeds max_model_len
│   └── AdapterNotFound     no adapter (and no model) of that name
├── AdapterError            an adapter cannot be loaded or unloaded
│   ├── AdapterLoadError    its files are unusable
│   │   └── AdapterFilesNotFound  its directory, or a required file, is missing
│   ├── AdapterExists       the name is taken, and replacing was not asked for
│   └── AdapterBusy         another load or unload of that name is under way
├── CapacityError           the request is fine, the server is full
│   ├── QueueFull           too many waiting requests (`retry_after_s`)
│   └── FirstTokenTooLate   it would miss its objective for the first token (`retry_after_s`)
├── EngineUnavailable       the engine is starting, draining or dead
├── ConfigError             the server was started with impossible settings
└── InternalError           a fault of ours; the request is not to be retried
"""

from __future__ import annotations

from typing import Any


class SlorajError(Exception):
    """Base of all errors above. `param` names the request field at fault, if there is one."""

    def __init__(
        self, message: str, *, param: str | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s

    def to_wire(self) -> dict[str, Any]:
        """Plain values for the engine-process boundary; `from_wire` restores the same class."""
        return {
            "kind": type(self).__name__,
            "message": self.message,
            "param": self.param,
            "retry_after_s": self.retry_after_s,
        }


class RequestError(SlorajError):
    """The caller's request cannot be served as it stands."""


class InvalidRequest(RequestError):
    """A request field is wrong."""


class ContextTooLong(RequestError):
    """The prompt, or the prompt plus max_tokens, exceeds max_model_len."""


class AdapterNotFound(RequestError):
    """No adapter and no model has that name."""


class AdapterError(SlorajError):
    """An adapter cannot be loaded or unloaded."""


class AdapterLoadError(AdapterError):
    """The adapter's files are unusable."""


class AdapterFilesNotFound(AdapterLoadError):
    """The adapter's directory, or a required file in it, is missing."""


class AdapterExists(AdapterError):
    """The adapter name is taken and replacing was not asked for."""


class AdapterBusy(AdapterError):
    """Another load or unload of that name is under way."""


class CapacityError(SlorajError):
    """The request is fine; the server is full."""


class QueueFull(CapacityError):
    """Too many requests are waiting."""


class FirstTokenTooLate(CapacityError):
    """The first token would come later than its objective allows, so none was computed."""


class EngineUnavailable(SlorajError):
    """The engine is starting, draining or dead."""


class ConfigError(SlorajError):
    """The engine was configured with impossible settings."""


class InternalError(SlorajError):
    """A fault of ours; retrying the same request will not help."""


def _tree(root: type[SlorajError]) -> dict[str, type[SlorajError]]:
    found = {root.__name__: root}
    for child in root.__subclasses__():
        found |= _tree(child)
    return found


def from_wire(wire: dict[str, Any]) -> SlorajError:
    """The error that `SlorajError.to_wire` described; an unknown kind becomes InternalError."""
    kind = _tree(SlorajError).get(wire["kind"], InternalError)
    return kind(wire["message"], param=wire["param"], retry_after_s=wire["retry_after_s"])
