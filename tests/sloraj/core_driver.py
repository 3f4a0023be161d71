"""Drives an EngineCore over a FakeRunner by hand: no threads, a clock that ticks with each step."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

from checkpoints.errors import CheckpointNotFound, InvalidCheckpoint
from sloraj.admission import choice_seed
from sloraj.batch import PackedAdapter
from sloraj.config import SchedulerConfig
from sloraj.core import EngineCore
from sloraj.errors import AdapterLoadError, SlorajError, from_wire
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
from tests.sloraj.fake_runner import FakeRunner, packed_adapter, tokens_alone

VOCAB = 50
EOS = 7
DEFAULT_CONFIG = SchedulerConfig(
    num_pages=40,
    page_size=4,
    max_model_len=64,
    max_num_seqs=4,
    max_num_batched_tokens=16,
    max_adapter_slots=4,
    max_num_waiting=1000,
    max_rank=64,
    vocab_size=VOCAB,
    eos_token_ids=(EOS,),
)


def load_from_path(path: str) -> tuple[PackedAdapter, dict[str, Any]]:
    """ "content:num_pages[:rank]" -> an adapter; a word is what it says."""
    match path:
        case "missing":
            raise CheckpointNotFound("adapter_config.json is missing")
        case "damaged":
            raise InvalidCheckpoint("the tensor is cut short")
        case "unreadable":
            raise PermissionError("not for you")
        case "fault":
            raise ZeroDivisionError("a fault of ours")
    try:
        content, num_pages, *rank = map(int, path.split(":"))
    except ValueError:
        raise AdapterLoadError(f"bad path {path!r}", param="lora_path") from None
    return packed_adapter(content, num_pages, *rank), {}


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


class CoreDriver:
    """One core, and what it has said so far."""

    def __init__(self, **changes: Any) -> None:
        self.config = dataclasses.replace(DEFAULT_CONFIG, **changes)
        self.executor = HandExecutor()
        self.now_s = 1000.0
        self.runner = FakeRunner(
            self.config.num_pages,
            self.config.page_size,
            self.config.max_num_seqs,
            self.config.vocab_size,
            self.config.max_num_batched_tokens,
        )
        self.core = EngineCore(
            self.config,
            self.runner,
            load_from_path,
            clock=lambda: self.now_s,
            loader_executor=self.executor,
        )
        self.answers: dict[tuple[str, int], Answer] = {}
        self.failures: dict[str, SlorajError] = {}
        self.replies: dict[int, Any] = {}
        self.death: str | None = None
        self.messages: list[FromEngine] = []
        self._ids = itertools.count(1)

    # --- what a frontend would do ---

    def generate(
        self,
        prompt: list[int],
        adapter_id: str | None = None,
        request_id: str | None = None,
        **params: Any,
    ) -> str:
        request_id = request_id or f"r{next(self._ids)}"
        params = {"temperature": 0.0, "ignore_eos": True, **params}
        self.core.submit(
            Generate(
                request_id=request_id,
                prompt_token_ids=prompt,
                params=params,
                adapter_id=adapter_id,
            )
        )
        return request_id

    def loaded(self, adapter_id: str, path: str, **options: Any) -> dict[str, Any]:
        """Load, and see that it worked."""
        call_id = self.load(adapter_id, path, **options)
        self.step()
        info = self.replies[call_id]
        assert isinstance(info, dict), info
        return info

    def load(self, adapter_id: str, path: str, **options: Any) -> int:
        call_id = next(self._ids)
        message = LoadAdapter(call_id=call_id, adapter_id=adapter_id, path=path, **options)
        self.core.submit(message)
        return call_id

    def unload(self, adapter_id: str) -> int:
        call_id = next(self._ids)
        self.core.submit(UnloadAdapter(call_id=call_id, adapter_id=adapter_id))
        return call_id

    def call(self, kind: Any, **fields: Any) -> int:
        call_id = next(self._ids)
        self.core.submit(kind(call_id=call_id, **fields))
        return call_id

    def ask(self, kind: Any, **fields: Any) -> Any:
        """The reply to a call that is answered within a step."""
        call_id = self.call(kind, **fields)
        self.step()
        return self.replies[call_id]

    # --- time ---

    def step(self) -> None:
        self.now_s += 0.01
        for message in self.core.step():
            self._hear(message)
        self.core.check_integrity()
        assert not self.runner.violations, self.runner.violations[0]

    def run(self, max_steps: int = 10_000) -> None:
        """Step until idle."""
        self.step()
        for _ in range(max_steps):
            if self.core.is_idle:
                return
            self.step()
        raise AssertionError(f"not idle after {max_steps} steps")

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

    # --- what is right ---

    def expect(
        self,
        request_id: str,
        prompt: list[int],
        content: int = 0,
        index: int = 0,
        max_tokens: int = 16,
        seed: int | None = None,
        stop_ids: tuple[int, ...] = (),
    ) -> None:
        """Assert that a choice answered as it would alone, under the adapter `content`."""
        choice = 0 if seed is None else choice_seed(seed, request_id, index)
        tokens, reason = tokens_alone(
            prompt, content, choice, self.config.vocab_size, max_tokens, set(stop_ids)
        )
        answer = self.answers[request_id, index]
        assert (answer.token_ids, answer.finish_reason) == (tokens, reason)
        assert answer.versions == {f"v{content}" if content else None}

    def expect_clean(self) -> None:
        """Assert that an idle core holds nothing but idle adapters."""
        assert self.core.is_idle
        stats = self.core.stats()
        assert stats["num_requests"] == stats["num_running"] == stats["num_waiting"] == 0
        assert stats["num_adapters_draining"] == 0
        assert stats["num_pages_adapters_idle"] == stats["num_pages_adapters"]
        assert stats["num_pages_free"] + stats["num_pages_adapters"] == stats["num_pages"]
