"""Laws of the loop under callers in many threads: answers stay right, and all is given back."""

from __future__ import annotations

import dataclasses
import itertools
import queue
import random
import threading
from typing import Any

from sloraj.core import EngineCore
from sloraj.messages import (
    Abort,
    Dead,
    Drain,
    FromEngine,
    Generate,
    LoadAdapter,
    Reply,
    RequestFailed,
    Shutdown,
    TokenOutput,
    UnloadAdapter,
)
from tests.sloraj.core_driver import DEFAULT_CONFIG, VOCAB, load_from_path
from tests.sloraj.fake_runner import FakeRunner, tokens_alone

NUM_CALLERS = 6
NUM_REQUESTS = 60  # of each caller
MAX_TOKENS = 6


class _Engine:
    """A core that runs in its own thread, with a mailbox for every request and call."""

    def __init__(self) -> None:
        self.config = dataclasses.replace(DEFAULT_CONFIG, num_pages=24, max_num_seqs=8)
        self.runner = FakeRunner(24, 4, 8, VOCAB, self.config.max_num_batched_tokens)
        self.core = EngineCore(self.config, self.runner, load_from_path)
        self.mailboxes: dict[str | int, queue.SimpleQueue[Any]] = {}
        self.call_ids = itertools.count(1)
        self.last_messages: list[FromEngine] = []
        self.thread = threading.Thread(target=self.core.run, args=(self._deliver,))

    def _deliver(self, messages: list[FromEngine]) -> None:
        for message in messages:
            match message:
                case TokenOutput() | RequestFailed():
                    self.mailboxes[message.request_id].put(message)
                case Reply():
                    self.mailboxes[message.call_id].put(message)
                case Dead():
                    self.last_messages.append(message)

    def call(self, kind: Any, **fields: Any) -> Reply:
        call_id = next(self.call_ids)
        mailbox = self.mailboxes[call_id] = queue.SimpleQueue()
        self.core.submit(kind(call_id=call_id, **fields))
        reply: Reply = mailbox.get(timeout=30)
        return reply

    def start(self, request_id: str, prompt: list[int], adapter_id: str) -> queue.SimpleQueue[Any]:
        mailbox = self.mailboxes[request_id] = queue.SimpleQueue()
        params = {"temperature": 0.0, "ignore_eos": True, "max_tokens": MAX_TOKENS}
        self.core.submit(
            Generate(
                request_id=request_id, prompt_token_ids=prompt, params=params, adapter_id=adapter_id
            )
        )
        return mailbox


def _be_a_caller(engine: _Engine, number: int, wrong: list[str]) -> None:
    """Load an adapter of one's own, use it, cancel at times, reload it, unload it."""
    rng = random.Random(number)
    content, name = number + 1, f"adapter-{number}"
    engine.call(LoadAdapter, adapter_id=name, path=f"{content}:3")
    for turn in range(NUM_REQUESTS):
        request_id, prompt = f"{number}/{turn}", [rng.randrange(VOCAB) for _ in range(5)]
        mailbox = engine.start(request_id, prompt, name)
        if rng.random() < 0.2:
            engine.core.submit(Abort(request_id=request_id))
            continue
        right = tokens_alone(prompt, content, 0, VOCAB, MAX_TOKENS, set())[0]
        tokens: list[int] = []
        reason = None
        while reason is None:
            message = mailbox.get(timeout=30)
            if isinstance(message, RequestFailed):
                wrong.append(f"{request_id}: {message.error}")
                break
            tokens += message.token_ids
            reason = message.finish_reason
        if reason is not None and tokens != right:
            wrong.append(f"{request_id}: {tokens} for {right}")
        if turn % 20 == 10:
            content += NUM_CALLERS
            engine.call(LoadAdapter, adapter_id=name, path=f"{content}:3", replace=True)
    reply = engine.call(UnloadAdapter, adapter_id=name)
    if reply.error is not None:
        wrong.append(f"unload {name}: {reply.error}")


def test_callers_in_many_threads_get_their_own_answers_and_leave_nothing_behind() -> None:
    threads_before = set(threading.enumerate())
    engine = _Engine()
    engine.thread.start()
    wrong: list[str] = []
    callers = [
        threading.Thread(target=_be_a_caller, args=(engine, number, wrong))
        for number in range(NUM_CALLERS)
    ]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(timeout=60)
        assert not caller.is_alive()
    assert engine.call(Drain).error is None
    engine.core.submit(Shutdown())
    engine.thread.join(timeout=10)
    assert not engine.thread.is_alive() and not engine.last_messages
    assert wrong == []
    assert engine.runner.violations == []
    engine.core.check_integrity()
    stats = engine.core.stats()
    assert stats["num_pages_free"] == stats["num_pages"]
    assert stats["num_adapter_versions"] == stats["num_requests"] == 0
    assert stats["adapter_evictions"] > 0
    for thread in set(threading.enumerate()) - threads_before:
        thread.join(timeout=10)  # the loader's are told to end, and do in their own time
        assert not thread.is_alive()
