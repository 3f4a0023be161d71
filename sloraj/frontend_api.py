"""What the server, and any other text-level caller, may ask of an engine. Implemented by
`Frontend`.

All methods are safe to call from any thread. `on_output` is called from the receiver thread and
must not block: hand the value to a queue.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

from sloraj.errors import SlorajError
from sloraj.request import SamplingParams


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """What clients are told about the model being served."""

    model_id: str
    model_path: str
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    max_rank: int
    dtype: str
    kernels: str
    device: str
    num_pages: int
    page_size: int
    num_programs: int
    startup_s: float
    quantization: str | None = None  # of the linear weights
    generation_defaults: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AdapterInfo:
    """One registered adapter name and the version behind it."""

    adapter_id: str
    path: str
    version: str  # content hash
    rank: int  # largest of its modules
    num_pages: int
    num_bytes: int
    state: str  # "on_host" or "on_device"
    pinned: bool
    num_leases: int  # requests holding this version
    loaded_at: float  # unix seconds


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LogprobEntry:
    """One token's log-probability with its text, as it reads alone."""

    token_id: int
    token: str
    logprob: float  # finite; -9999.0 stands for minus infinity


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PositionLogprobs:
    chosen: LogprobEntry
    top: tuple[LogprobEntry, ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RequestOutput:
    """An increment of one choice, or the failure of the whole request (`error`, then nothing
    follows).

    `text` never ends in half a code point, and never holds part of a stop string that may still
    complete.
    """

    request_id: str
    index: int = 0
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[PositionLogprobs, ...] | None = None
    finish_reason: str | None = None  # "stop" or "length" on a choice's last increment
    stop_reason: str | int | None = None  # the stop string or stop token id that ended it
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0  # so far, this choice
    adapter_version: str | None = None
    error: SlorajError | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EngineHealth:
    state: str  # "starting", "ready", "draining", "dead"
    heartbeat_age_s: float
    detail: str = ""


class TokenizerApi(Protocol):
    """Text to ids and back. `encode` treats special tokens in user text as plain text unless
    told.
    """

    vocab_size: int

    def encode(
        self, text: str, *, add_special_tokens: bool = True, allow_special: bool = False
    ) -> list[int]: ...

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = True) -> str: ...

    def token_text(self, token_id: int) -> str: ...


class FrontendApi(Protocol):
    """Text-level access to a running engine."""

    @property
    def info(self) -> ModelInfo: ...

    @property
    def tokenizer(self) -> TokenizerApi: ...

    def submit(
        self,
        request_id: str,
        prompt: str | list[int],
        params: SamplingParams,
        adapter_id: str | None,
        on_output: Callable[[RequestOutput], None],
        *,
        add_special_tokens: bool = True,
        allow_special: bool = False,
        priority: int = 0,
        tenant: str | None = None,
        first_token_slo_s: float | None = None,
    ) -> int:
        """Start a request and return its number of prompt tokens.

        `adapter_id` None is the base model. The lower `priority` is served the earlier. `tenant` is
        to whose account it goes; None: the adapter's name, or the base model's. Where the engine
        refuses what it cannot begin to answer in time, `first_token_slo_s` is that time; None: the
        engine's. Raises InvalidRequest, ContextTooLong or EngineUnavailable at once;
        AdapterNotFound, QueueFull, FirstTokenTooLate and later failures arrive as
        RequestOutput.error.
        """

    def abort(self, request_id: str) -> None:
        """Stop a request; nothing more arrives for it. Unknown ids are ignored."""

    def load_adapter(
        self, adapter_id: str, path: str, *, replace: bool = False, pinned: bool = False
    ) -> concurrent.futures.Future[AdapterInfo]: ...

    def unload_adapter(self, adapter_id: str) -> concurrent.futures.Future[None]: ...

    def list_adapters(self) -> concurrent.futures.Future[list[AdapterInfo]]: ...

    def stats(self) -> concurrent.futures.Future[dict[str, Any]]: ...

    def health(self) -> EngineHealth: ...

    def drain(self) -> concurrent.futures.Future[None]:
        """Refuse new requests; done when the last running one has finished."""

    def stop(self) -> None:
        """End the engine now; running requests fail. Idempotent."""
