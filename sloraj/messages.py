"""The engine boundary: what a frontend sends to the engine core, and what comes back.

Plain tagged structs, encoded with msgpack when the core runs in its own process and passed as they
are when it runs in a thread. Nothing here refers to text: tokenizing and detokenizing happen in
front.
"""

from __future__ import annotations

from typing import Any

import msgspec


class _Message(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    pass


# --- to the engine ---


class Generate(_Message, frozen=True):
    """Start a request. `params` holds the fields of SamplingParams; `params["seed"]` is resolved.

    `adapter_id` None is the base model. `tenant` None: the adapter's name is the tenant.
    `first_token_slo_s` None is the engine's objective. Failures come back as RequestFailed, never
    as an exception.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: dict[str, Any]
    adapter_id: str | None = None
    first_token_slo_s: float | None = None
    priority: int = 0
    tenant: str | None = None


class Abort(_Message, frozen=True):
    """Drop a request and free what it holds. Unknown ids are ignored: it may just have finished."""

    request_id: str


class LoadAdapter(_Message, frozen=True):
    """Read, validate and register an adapter. `replace` swaps the version behind a taken name."""

    call_id: int
    adapter_id: str
    path: str
    replace: bool = False
    pinned: bool = False


class UnloadAdapter(_Message, frozen=True):
    """Unregister, let running requests finish on their version, free, then reply."""

    call_id: int
    adapter_id: str


class ListAdapters(_Message, frozen=True):
    call_id: int


class GetStats(_Message, frozen=True):
    call_id: int


class Drain(_Message, frozen=True):
    """Accept no new request; reply when the last running one has finished."""

    call_id: int


class Shutdown(_Message, frozen=True):
    """Stop now: fail what runs, release the device, end."""


ToEngine = (
    Generate | Abort | LoadAdapter | UnloadAdapter | ListAdapters | GetStats | Drain | Shutdown
)


# --- from the engine ---


class Progress(_Message, frozen=True):
    """Start-up progress: stage is "weights", "compile" or "adapters"."""

    stage: str
    done: int
    total: int


class Ready(_Message, frozen=True):
    """The engine accepts requests. `info` is what `ModelInfo` is made of."""

    info: dict[str, Any]


class TokenOutput(_Message, frozen=True):
    """New tokens of one choice. The last one of a choice carries finish_reason "stop" or "length".

    `stop_token_id` is the token that ended it (it is not in token_ids). logprobs, where asked for,
    has one entry a token: [token_id, logprob, [[token_id, logprob], ...]].
    """

    request_id: str
    index: int
    token_ids: list[int]
    logprobs: list[Any] | None = None
    finish_reason: str | None = None
    stop_token_id: int | None = None
    num_prompt_tokens: int = 0
    adapter_version: str | None = None


class RequestFailed(_Message, frozen=True):
    """The whole request is over. `error` is SlorajError.to_wire()."""

    request_id: str
    error: dict[str, Any]


class Reply(_Message, frozen=True):
    """Answer to the call of that id: `value`, or `error` (SlorajError.to_wire())."""

    call_id: int
    value: Any = None
    error: dict[str, Any] | None = None


class Heartbeat(_Message, frozen=True):
    """Sent at least once a second while the loop turns, idle or not."""

    step: int
    num_running: int
    num_waiting: int


class Dead(_Message, frozen=True):
    """The engine cannot go on; every request is lost. Last message of all.

    `error` is SlorajError.to_wire() of what ended it, where that had a type.
    """

    reason: str
    error: dict[str, Any] | None = None


FromEngine = Progress | Ready | TokenOutput | RequestFailed | Reply | Heartbeat | Dead
