"""Text-level access to a running engine: `Frontend` implements `FrontendApi` over a `Transport`.

Tokenizing happens in the caller's thread. One receiver thread turns tokens into text, finds stop
strings and resolves calls; `on_output` runs on it. Once the engine is gone every open request and
call has failed, and new ones fail at once.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import itertools
import logging
import secrets
import threading
import time
from collections.abc import Callable
from typing import Any

import msgspec

from sloraj.choice_stream import OpenRequest
from sloraj.errors import EngineUnavailable, InternalError, InvalidRequest, SlorajError, from_wire
from sloraj.frontend_api import AdapterInfo, EngineHealth, ModelInfo, RequestOutput
from sloraj.messages import (
    Abort,
    Dead,
    Drain,
    FromEngine,
    Generate,
    GetStats,
    ListAdapters,
    LoadAdapter,
    Reply,
    RequestFailed,
    ToEngine,
    TokenOutput,
    UnloadAdapter,
)
from sloraj.prompt import check_prompt, resolve_params
from sloraj.request import SamplingParams
from sloraj.tokenizer import Tokenizer
from sloraj.transport import Transport

REASON_TIMEOUT_S = 6.0  # from a failed send to the reason: a dead process has to be reaped
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class _Call:
    future: concurrent.futures.Future[Any]
    convert: Callable[[Any], Any]


class Frontend:
    """Implements `FrontendApi`. Listens to a started transport, and stops it in the end."""

    def __init__(self, transport: Transport, tokenizer: Tokenizer, info: ModelInfo) -> None:
        self._transport = transport
        self._tokenizer = tokenizer
        self._info = info
        self._lock = threading.Lock()  # guards what follows; never held while calling out
        self._requests: dict[str, OpenRequest] = {}
        self._calls: dict[int, _Call] = {}
        self._state = "ready"
        self._detail = ""
        self._has_died = threading.Event()
        self._call_ids = itertools.count(1)
        self._last_heard_s = time.monotonic()
        transport.listen(self._receive)

    @property
    def info(self) -> ModelInfo:
        return self._info

    @property
    def tokenizer(self) -> Tokenizer:
        return self._tokenizer

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
        """See FrontendApi. No seed becomes a random one, no max_tokens what the context leaves."""
        ids = check_prompt(
            prompt, self._tokenizer, self._info,
            add_special_tokens=add_special_tokens, allow_special=allow_special,
        )  # fmt: skip
        params = resolve_params(params, len(ids), self._info, secrets.randbits(32))
        request = OpenRequest(request_id, ids, params, self._tokenizer, on_output)
        with self._lock:
            self._require_ready()
            if request_id in self._requests:
                raise InvalidRequest(
                    f"request_id: got {request_id!r}, allowed: one that is not running",
                    param="request_id",
                )
            self._requests[request_id] = request
        message = Generate(
            request_id=request_id,
            prompt_token_ids=ids,
            params=dataclasses.asdict(params),
            adapter_id=adapter_id,
            priority=priority,
            tenant=tenant or adapter_id or self._info.model_id,
            first_token_slo_s=first_token_slo_s,
        )
        try:
            self._send(message)
        except BaseException:
            self._forget(request)
            raise
        return len(ids)

    def _send(self, message: ToEngine) -> None:
        """Post a message. Raises EngineUnavailable with the reason, which may be just behind."""
        try:
            self._transport.send(message)
        except EngineUnavailable:
            if self._has_died.wait(REASON_TIMEOUT_S):
                raise EngineUnavailable(self._detail) from None
            raise

    def _require_ready(self) -> None:
        if self._state == "draining":
            raise EngineUnavailable("the engine is draining: it accepts no new requests")
        if self._state != "ready":
            raise EngineUnavailable(self._detail)

    def abort(self, request_id: str) -> None:
        """See FrontendApi. When this returns, no output of the request is under way any more."""
        with self._lock:
            request = self._requests.get(request_id)
        if request is not None:
            request.close()
            self._forget(request)
            self._send_abort(request_id)

    def _forget(self, request: OpenRequest) -> None:
        with self._lock:
            if self._requests.get(request.request_id) is request:
                del self._requests[request.request_id]

    def _send_abort(self, request_id: str) -> None:
        try:
            self._transport.send(Abort(request_id=request_id))
        except EngineUnavailable:
            _log.debug("no abort sent for %r: the engine is gone", request_id)

    # --- calls -----------------------------------------------------------------------------------

    def load_adapter(
        self, adapter_id: str, path: str, *, replace: bool = False, pinned: bool = False
    ) -> concurrent.futures.Future[AdapterInfo]:
        """Register an adapter from a directory; the future fails with AdapterError."""
        return self._call(
            lambda call_id: LoadAdapter(
                call_id=call_id, adapter_id=adapter_id, path=path, replace=replace, pinned=pinned
            ),
            lambda value: msgspec.convert(value, AdapterInfo),
        )

    def unload_adapter(self, adapter_id: str) -> concurrent.futures.Future[None]:
        """Unregister; done when the last request on it has finished and its memory is free."""
        return self._call(
            lambda call_id: UnloadAdapter(call_id=call_id, adapter_id=adapter_id), _as_none
        )

    def list_adapters(self) -> concurrent.futures.Future[list[AdapterInfo]]:
        return self._call(
            lambda call_id: ListAdapters(call_id=call_id),
            lambda value: msgspec.convert(value, list[AdapterInfo]),
        )

    def stats(self) -> concurrent.futures.Future[dict[str, Any]]:
        return self._call(lambda call_id: GetStats(call_id=call_id), dict)

    def drain(self) -> concurrent.futures.Future[None]:
        with self._lock:
            if self._state == "ready":
                self._state = "draining"
        return self._call(lambda call_id: Drain(call_id=call_id), _as_none)

    def _call(
        self, make: Callable[[int], ToEngine], convert: Callable[[Any], Any]
    ) -> concurrent.futures.Future[Any]:
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        future.set_running_or_notify_cancel()  # from here on only the reply, or death, ends it
        call_id = next(self._call_ids)
        with self._lock:
            if self._state == "dead":
                future.set_exception(EngineUnavailable(self._detail))
                return future
            self._calls[call_id] = _Call(future, convert)
        try:
            self._send(make(call_id))
        except EngineUnavailable as error:
            self._resolve(call_id, error=error)
        return future

    def _resolve(self, call_id: int, value: Any = None, error: SlorajError | None = None) -> None:
        with self._lock:
            call = self._calls.pop(call_id, None)
        if call is None:
            return
        try:
            result = None if error is not None else call.convert(value)
        except (msgspec.ValidationError, TypeError, ValueError) as wrong:
            error = InternalError(f"the engine's reply cannot be read: {wrong}")
        if error is not None:
            call.future.set_exception(error)
        else:
            call.future.set_result(result)

    # --- life ------------------------------------------------------------------------------------

    def health(self) -> EngineHealth:
        with self._lock:
            age_s = time.monotonic() - self._last_heard_s
            return EngineHealth(state=self._state, heartbeat_age_s=age_s, detail=self._detail)

    def stop(self) -> None:
        """See FrontendApi. Bounded by the transport's stop."""
        self._die("the engine was stopped")
        self._transport.stop()

    # --- receiver thread -------------------------------------------------------------------------

    def _receive(self, batch: list[FromEngine]) -> None:
        self._last_heard_s = time.monotonic()
        for message in batch:
            match message:
                case TokenOutput():
                    self._on_tokens(message)
                case RequestFailed():
                    self._on_failure(message)
                case Reply():
                    error = from_wire(message.error) if message.error is not None else None
                    self._resolve(message.call_id, message.value, error)
                case Dead():
                    self._die(message.reason)

    def _on_tokens(self, message: TokenOutput) -> None:
        with self._lock:
            request = self._requests.get(message.request_id)
        if request is None:
            return  # aborted, or ended by a stop string, while this was under way
        try:
            request.accept(message)
        except Exception as error:
            _log.exception("request %r is dropped: its output failed", message.request_id)
            self._forget(request)
            self._send_abort(message.request_id)
            self._fail(request, InternalError(f"output failed: {type(error).__name__}: {error}"))
            return
        if request.is_finished:
            self._forget(request)
            if request.was_cut_short:
                self._send_abort(message.request_id)

    def _on_failure(self, message: RequestFailed) -> None:
        with self._lock:
            request = self._requests.pop(message.request_id, None)
        if request is not None:
            self._fail(request, from_wire(message.error))

    def _fail(self, request: OpenRequest, error: SlorajError) -> None:
        try:
            request.fail(error)
        except Exception:
            _log.exception("request %r: its caller failed to take the error", request.request_id)

    def _die(self, reason: str) -> None:
        """Fail everything open. The first reason stays."""
        with self._lock:
            if self._state != "dead":
                self._state, self._detail = "dead", reason
                self._has_died.set()
            requests, calls = list(self._requests.values()), list(self._calls)
            self._requests.clear()
        for request in requests:
            self._fail(request, EngineUnavailable(self._detail))
        for call_id in calls:
            self._resolve(call_id, error=EngineUnavailable(self._detail))


def _as_none(_: Any) -> None:
    return None
