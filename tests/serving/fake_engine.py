"""An engine whose answers can be worked out by hand, with faults that a test can switch on.

Tokens are UTF-8 bytes (0-255), then `<s>` 256, `</s>` 257 and `<user>` 258. The base model
repeats the prompt's bytes, over and over, until max_tokens. An adapter with shift k (read
from the first digits in its id, 0 without any) adds k to every byte. One token comes every
`token_delay_s`. Choice i starts i bytes later in the prompt.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import heapq
import itertools
import os
import re
import threading
import time
from collections.abc import Callable
from typing import Any

from sloraj.errors import (
    AdapterBusy,
    AdapterExists,
    AdapterFilesNotFound,
    AdapterLoadError,
    AdapterNotFound,
    ContextTooLong,
    EngineUnavailable,
    FirstTokenTooLate,
    InternalError,
    InvalidRequest,
    QueueFull,
    SlorajError,
)
from sloraj.frontend_api import (
    AdapterInfo,
    EngineHealth,
    LogprobEntry,
    ModelInfo,
    PositionLogprobs,
    RequestOutput,
)
from sloraj.request import SamplingParams

SPECIAL = {"<s>": 256, "</s>": 257, "<user>": 258}
VOCAB_SIZE = 259
MAX_MODEL_LEN = 256
MODEL_INFO = ModelInfo(
    model_id="fake-base", model_path="/models/fake", max_model_len=MAX_MODEL_LEN,
    vocab_size=VOCAB_SIZE, eos_token_ids=(257,), bos_token_id=256, max_rank=64,
    dtype="float32", kernels="xla", device="none", num_pages=101, page_size=16,
    num_programs=1, startup_s=0.1,
)  # fmt: skip
_SPECIAL_TEXT = {token: text for text, token in SPECIAL.items()}


class ByteTokenizer:
    vocab_size = VOCAB_SIZE

    def encode(
        self, text: str, *, add_special_tokens: bool = True, allow_special: bool = False
    ) -> list[int]:
        ids = [SPECIAL["<s>"]] if add_special_tokens else []
        pieces = re.split("(<s>|</s>|<user>)", text) if allow_special else [text]
        for piece in pieces:
            is_special = allow_special and piece in SPECIAL
            ids += [SPECIAL[piece]] if is_special else list(piece.encode())
        return ids

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = True) -> str:
        data = b""
        for token in token_ids:
            if token < 256:
                data += bytes([token])
            elif not skip_special_tokens:
                data += _SPECIAL_TEXT[token].encode()
        return data.decode("utf-8", "replace")

    def token_text(self, token_id: int) -> str:
        return self.decode([token_id], skip_special_tokens=False)


@dataclasses.dataclass(eq=False)
class Running:
    """One request in the fake: what it will say, and to whom."""

    request_id: str
    prompt_ids: list[int]
    params: SamplingParams
    adapter: AdapterInfo | None
    on_output: Callable[[RequestOutput], None]
    answers: list[list[int]] = dataclasses.field(default_factory=list)
    num_sent: int = 0


def expected_text(prompt: str, num_tokens: int, *, shift: int = 0, start: int = 0) -> str:
    """What the fake answers to an ASCII prompt; the oracle of the tests."""
    data = prompt.encode()
    return "".join(chr((data[(start + i) % len(data)] + shift) % 128) for i in range(num_tokens))


class FakeEngine:
    """Implements FrontendApi on a thread of its own. Public fields may be changed by a test at
    any time.
    """

    def __init__(self, *, model_path: str = "/models/fake", token_delay_s: float = 0.0) -> None:
        self.token_delay_s = token_delay_s
        self.first_token_delay_s = 0.0
        self.max_waiting = 10**9  # above this many requests: QueueFull
        self.fail_after: int | None = None  # tokens after which every request gets an InternalError
        self.retry_after_s = 2.5  # what QueueFull and FirstTokenTooLate say
        self.is_late = False  # every request: FirstTokenTooLate
        self.load_delay_s = 0.0
        self.is_frozen = False  # no output, no heartbeat
        self.submitted: list[tuple[str, list[int], SamplingParams, str | None]] = []
        self.slos_s: list[float | None] = []  # first_token_slo_s of each submitted
        self.standings: list[tuple[int, str | None]] = []  # priority and tenant of each submitted
        self.aborted: list[str] = []
        self.abort_times: dict[str, float] = {}
        self._model_path = model_path
        self._lock = threading.RLock()
        self._running: dict[str, Running] = {}
        self._adapters: dict[str, AdapterInfo] = {}
        self._busy: set[str] = set()
        self._due: list[tuple[float, int, str]] = []
        self._order = itertools.count()
        self._wake = threading.Condition(self._lock)
        self._state = "ready"
        self._detail = ""
        self._heartbeat_s = time.monotonic()
        self._drained: list[concurrent.futures.Future[None]] = []
        self._versions = itertools.count(1)
        self._thread = threading.Thread(target=self._loop, name="fake-engine", daemon=True)
        self._thread.start()

    # --- FrontendApi ---

    @property
    def info(self) -> ModelInfo:
        return dataclasses.replace(MODEL_INFO, model_path=self._model_path)

    tokenizer = ByteTokenizer()

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
        if isinstance(prompt, str):
            if len(prompt) > MAX_MODEL_LEN * 16:  # no token stands for more than 16 characters
                raise ContextTooLong(f"prompt: {len(prompt)} characters", param="prompt")
            prompt = self.tokenizer.encode(
                prompt, add_special_tokens=add_special_tokens, allow_special=allow_special
            )
        if not prompt:
            raise InvalidRequest("prompt: empty", param="prompt")
        if len(prompt) >= MAX_MODEL_LEN:
            raise ContextTooLong(f"prompt: {len(prompt)} tokens", param="prompt")
        with self._lock:
            if self._state != "ready":
                raise EngineUnavailable(f"the engine is {self._state}")
            self.submitted.append((request_id, prompt, params, adapter_id))
            self.standings.append((priority, tenant))
            self.slos_s.append(first_token_slo_s)
            running = Running(
                request_id, prompt, params, self._adapters.get(adapter_id or ""), on_output
            )
            if adapter_id is not None and running.adapter is None:
                self._emit_error(
                    running, AdapterNotFound(f"no adapter {adapter_id!r}", param="model")
                )
            elif self.is_late:
                late = FirstTokenTooLate("too late", retry_after_s=self.retry_after_s)
                self._emit_error(running, late)
            elif len(self._running) >= self.max_waiting:
                full = QueueFull("too many waiting requests", retry_after_s=self.retry_after_s)
                self._emit_error(running, full)
            else:
                self._start(running)
        return len(prompt)

    def abort(self, request_id: str) -> None:
        with self._lock:
            if self._running.pop(request_id, None) is not None:
                self.aborted.append(request_id)
                self.abort_times[request_id] = time.monotonic()
                self._check_drained()

    def load_adapter(
        self, adapter_id: str, path: str, *, replace: bool = False, pinned: bool = False
    ) -> concurrent.futures.Future[AdapterInfo]:
        with self._lock:
            if adapter_id in self._busy:
                return _failed(
                    AdapterBusy(f"adapter {adapter_id!r} is being loaded", param="lora_name")
                )
            if adapter_id in self._adapters and not replace:
                return _failed(AdapterExists(f"adapter {adapter_id!r} exists", param="lora_name"))
            self._busy.add(adapter_id)
        return self._later(self.load_delay_s, lambda: self._load(adapter_id, path, pinned))

    def unload_adapter(self, adapter_id: str) -> concurrent.futures.Future[None]:
        with self._lock:
            if adapter_id in self._busy:
                return _failed(
                    AdapterBusy(f"adapter {adapter_id!r} is being loaded", param="lora_name")
                )
            adapter = self._adapters.pop(adapter_id, None)
        if adapter is None:
            return _failed(AdapterNotFound(f"no adapter {adapter_id!r}", param="lora_name"))
        return self._later(0, lambda: self._wait_for_leases(adapter))

    def list_adapters(self) -> concurrent.futures.Future[list[AdapterInfo]]:
        with self._lock:
            return _done([self._adapters[name] for name in sorted(self._adapters)])

    def stats(self) -> concurrent.futures.Future[dict[str, Any]]:
        with self._lock:
            return _done(
                {"num_running": len(self._running), "num_waiting": 0, "num_pages": 100,
                 "num_pages_free": 90, "runner": {"compiles": 0}}
            )  # fmt: skip

    def health(self) -> EngineHealth:
        with self._lock:
            age_s = time.monotonic() - self._heartbeat_s
            return EngineHealth(state=self._state, heartbeat_age_s=age_s, detail=self._detail)

    def drain(self) -> concurrent.futures.Future[None]:
        future: concurrent.futures.Future[None] = concurrent.futures.Future()
        with self._lock:
            self._state = "draining"
            self._drained.append(future)
            self._check_drained()
        return future

    def stop(self) -> None:
        self.die("stopped")
        if threading.current_thread() is not self._thread:
            self._thread.join(5)

    # --- what tests may do ---

    def die(self, reason: str) -> None:
        """As when the engine's process ends: running requests fail, nothing new is taken."""
        with self._wake:
            if self._state == "dead":
                return
            self._state, self._detail = "dead", reason
            for running in list(self._running.values()):
                self._emit_error(running, EngineUnavailable(f"the engine died: {reason}"))
            self._wake.notify_all()

    def add_adapter(
        self, adapter_id: str, path: str = "/adapters/x", *, state: str = "on_device"
    ) -> AdapterInfo:
        with self._lock:
            info = AdapterInfo(
                adapter_id=adapter_id, path=path, version=f"v{next(self._versions):04d}", rank=8,
                num_pages=2, num_bytes=4096, state=state, pinned=False, num_leases=0,
                loaded_at=1.7e9,
            )  # fmt: skip
            self._adapters[adapter_id] = info
            return info

    @property
    def num_running(self) -> int:
        with self._lock:
            return len(self._running)

    # --- inside ---

    def _start(self, running: Running) -> None:
        shift = (
            int((re.findall(r"\d+", running.adapter.adapter_id) or ["0"])[0])
            if running.adapter
            else 0
        )
        data = [token for token in running.prompt_ids if token < 256] or [63]
        room = MAX_MODEL_LEN - len(running.prompt_ids)
        length = min(running.params.max_tokens or room, room)
        for choice in range(running.params.n):
            running.answers.append(
                [(data[(choice + i) % len(data)] + shift) % 128 for i in range(length)]
            )
        self._running[running.request_id] = running
        self._schedule(self.first_token_delay_s, running.request_id)

    def _schedule(self, delay_s: float, request_id: str) -> None:
        heapq.heappush(self._due, (time.monotonic() + delay_s, next(self._order), request_id))
        self._wake.notify_all()

    def _loop(self) -> None:
        with self._wake:
            while self._state != "dead":
                now = time.monotonic()
                if not self.is_frozen:
                    self._heartbeat_s = now
                if self.is_frozen or not self._due:
                    self._wake.wait(0.02)
                elif self._due[0][0] > now:
                    self._wake.wait(min(self._due[0][0] - now, 0.02))
                else:
                    running = self._running.get(heapq.heappop(self._due)[2])
                    if running is not None:
                        self._step(running)

    def _step(self, running: Running) -> None:
        """One token of every choice."""
        at = running.num_sent
        if self.fail_after is not None and at >= self.fail_after:
            self._emit_error(running, InternalError("the row's logits are not finite"))
            return
        is_last = at + 1 == len(running.answers[0])
        for index, answer in enumerate(running.answers):
            token = answer[at]
            self._emit(running, index, token, at, "length" if is_last else None)
        running.num_sent += 1
        if is_last:
            self._running.pop(running.request_id, None)
            self._check_drained()
        else:
            self._schedule(self.token_delay_s, running.request_id)

    def _emit(
        self, running: Running, index: int, token: int, at: int, finish_reason: str | None
    ) -> None:
        logprobs = None
        if running.params.logprobs is not None:
            top = tuple(
                LogprobEntry(
                    token_id=(token + k) % 128, token=chr((token + k) % 128), logprob=-float(k)
                )
                for k in range(running.params.logprobs)
            )
            chosen = LogprobEntry(token_id=token, token=chr(token), logprob=0.0)
            logprobs = (PositionLogprobs(chosen=chosen, top=top),)
        running.on_output(
            RequestOutput(
                request_id=running.request_id, index=index, text=chr(token), token_ids=(token,),
                logprobs=logprobs, finish_reason=finish_reason,
                num_prompt_tokens=len(running.prompt_ids), num_output_tokens=at + 1,
                adapter_version=running.adapter.version if running.adapter else None,
            )
        )  # fmt: skip

    def _emit_error(self, running: Running, error: SlorajError) -> None:
        self._running.pop(running.request_id, None)
        running.on_output(RequestOutput(request_id=running.request_id, error=error))
        self._check_drained()

    def _check_drained(self) -> None:
        if not self._running:
            while self._drained:
                self._drained.pop().set_result(None)

    def _later(self, delay_s: float, work: Callable[[], Any]) -> concurrent.futures.Future[Any]:
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()

        def run() -> None:
            time.sleep(delay_s)
            try:
                future.set_result(work())
            except SlorajError as exc:
                future.set_exception(exc)

        threading.Thread(target=run, daemon=True).start()
        return future

    def _load(self, adapter_id: str, path: str, pinned: bool) -> AdapterInfo:
        try:
            if not os.path.exists(os.path.join(path, "adapter_config.json")):
                raise AdapterFilesNotFound(
                    f"{path}: adapter_config.json is missing", param="lora_path"
                )
            weights = os.path.join(path, "adapter_model.safetensors")
            if not os.path.exists(weights):
                raise AdapterFilesNotFound(f"{weights} is missing", param="lora_path")
            if os.path.getsize(weights) == 0:
                raise AdapterLoadError(f"{weights} is empty", param="lora_path")
            return self.add_adapter(adapter_id, path)
        finally:
            with self._lock:
                self._busy.discard(adapter_id)

    def _wait_for_leases(self, adapter: AdapterInfo) -> None:
        while True:
            with self._lock:
                if not any(running.adapter is adapter for running in self._running.values()):
                    return
            time.sleep(0.005)


def _done(value: Any) -> concurrent.futures.Future[Any]:
    future: concurrent.futures.Future[Any] = concurrent.futures.Future()
    future.set_result(value)
    return future


def _failed(error: SlorajError) -> concurrent.futures.Future[Any]:
    future: concurrent.futures.Future[Any] = concurrent.futures.Future()
    future.set_exception(error)
    return future
