"""What a test asks of an EngineCore and hears from it, whatever runner the core drives."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

from sloraj.core import EngineCore
from sloraj.errors import SlorajError, from_wire
from sloraj.messages import (
    Dead,
    FromEngine,
    Generate,
    LoadAdapter,
    Reply,
    RequestFailed,
    TokenOutput,
    UnloadAdapter,
)


class HandExecutor(concurrent.futures.Executor):
    """Runs what is submitted in the caller's thread: at once or, if held, on `release`."""

    def __init__(self) -> None:
        self.is_held = False
        self._held: list[Callable[[], None]] = []

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> concurrent.futures.Future[Any]:
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()

        def work() -> None:
            try:
                future.set_result(fn(*args, **kwargs))
            except Exception as error:
                future.set_exception(error)

        if self.is_held:
            self._held.append(work)
        else:
            work()
        return future

    def release(self) -> None:
        work, self._held = self._held, []
        for each in work:
            each()


@dataclasses.dataclass
class Answer:
    """All that came back for one choice."""

    token_ids: list[int] = dataclasses.field(default_factory=list)
    finish_reason: str | None = None
    stop_token_id: int | None = None
    versions: set[str | None] = dataclasses.field(default_factory=set)
    logprobs: list[Any] = dataclasses.field(default_factory=list)


class Conversation:
    """All that one core was asked by hand, and all that it has said so far. Subclasses make the
    core, and step it.
    """

    core: EngineCore

    def __init__(self) -> None:
        self.executor = HandExecutor()
        self.now_s = 1000.0
        self.answers: dict[tuple[str, int], Answer] = {}
        self.failures: dict[str, SlorajError] = {}
        self.replies: dict[int, Any] = {}
        self.death: str | None = None
        self.messages: list[FromEngine] = []
        self._ids = itertools.count(1)

    def submit(
        self,
        prompt: list[int],
        params: dict[str, Any],
        adapter_id: str | None,
        request_id: str | None = None,
        priority: int = 0,
        tenant: str | None = None,
    ) -> str:
        request_id = request_id or f"r{next(self._ids)}"
        self.core.submit(
            Generate(
                request_id=request_id,
                prompt_token_ids=prompt,
                params=params,
                adapter_id=adapter_id,
                priority=priority,
                tenant=tenant,
            )
        )
        return request_id

    def load(self, adapter_id: str, path: str, **options: Any) -> int:
        call_id = next(self._ids)
        message = LoadAdapter(call_id=call_id, adapter_id=adapter_id, path=path, **options)
        self.core.submit(message)
        return call_id

    def unload(self, adapter_id: str) -> int:
        call_id = next(self._ids)
        self.core.submit(UnloadAdapter(call_id=call_id, adapter_id=adapter_id))
        return call_id

    def take_step(self) -> None:
        """One step of the core, 10 ms later, and what it says."""
        self.now_s += 0.01
        for message in self.core.step():
            self._hear(message)

    def _hear(self, message: FromEngine) -> None:
        self.messages.append(message)
        match message:
            case TokenOutput():
                key = (message.request_id, message.index)
                answer = self.answers.setdefault(key, Answer())
                assert answer.finish_reason is None, "tokens after the finish"
                assert message.request_id not in self.failures, "tokens after a failure"
                answer.token_ids += message.token_ids
                answer.finish_reason = message.finish_reason
                answer.stop_token_id = message.stop_token_id
                answer.versions.add(message.adapter_version)
                answer.logprobs += message.logprobs or []
            case RequestFailed():
                assert message.request_id not in self.failures, "failed twice"
                self.failures[message.request_id] = from_wire(message.error)
            case Reply():
                assert message.call_id not in self.replies, "replied twice"
                error = message.error
                self.replies[message.call_id] = message.value if error is None else from_wire(error)
            case Dead():
                self.death = message.reason
