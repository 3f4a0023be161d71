"""The only boundary between the event loop and the engine's threads.

Into the engine: calls run on a small thread pool, because submitting tokenizes. Out of it:
`on_output` runs on the engine's receiver thread and hands each output to the event loop, where a
`Generation` is waiting.
"""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import contextlib
import functools
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from starlette.types import Receive

from sloraj.errors import CapacityError, EngineUnavailable
from sloraj.frontend_api import FrontendApi, RequestOutput
from sloraj.request import SamplingParams

T = TypeVar("T")

Increment = tuple[int, RequestOutput]  # which prompt of the request, and what came for it


class TooSlowReader(Exception):
    """The client does not read what it asked for."""


class ClientGone(Exception):
    """The client closed the connection."""


class DisconnectWatch:
    """Calls `on_gone` when the client disconnects, also while nothing is being sent to it.

    Uvicorn delivers `http.disconnect` through `receive`, and only to those who ask.
    """

    def __init__(self, receive: Receive, on_gone: Callable[[], None]) -> None:
        self._task = asyncio.ensure_future(self._watch(receive, on_gone))

    async def _watch(self, receive: Receive, on_gone: Callable[[], None]) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        on_gone()

    def stop(self) -> None:
        self._task.cancel()


class Generation:
    """All prompts of one HTTP request, running in the engine; owned by one task of the event loop.

    Outputs of prompt i arrive as (i, output) from `next`. `close` aborts what still runs and is
    to be called however the request ends. The first error ends the whole generation.
    """

    def __init__(self, bridge: Bridge, request_id: str, num_prompts: int, num_choices: int) -> None:
        self.request_id = request_id
        self.num_prompt_tokens = 0  # of all prompts
        self.num_open_choices = num_prompts * num_choices
        self.max_queued: int | None = None  # outputs that may wait for a reader; None: no limit
        self.arrival_s = time.monotonic()
        self._bridge = bridge
        self._engine_ids = [f"{request_id}-{index}" for index in range(num_prompts)]
        self._queue: collections.deque[Increment] = collections.deque()
        self._arrived = asyncio.Event()
        self._failure: Exception | None = None
        self._is_over = False  # nothing more is wanted from the engine

    async def submit(
        self,
        prompts: Sequence[str | list[int]],
        params: SamplingParams,
        adapter_id: str | None,
        *,
        add_special_tokens: bool,
        allow_special: bool,
        priority: int = 0,
        tenant: str | None = None,
        first_token_slo_s: float | None = None,
    ) -> None:
        """Start every prompt. Raises what the engine says about the first that it refuses at
        once.
        """
        engine, loop = self._bridge.engine, asyncio.get_running_loop()

        def start_all() -> int:
            total = 0
            for index, prompt in enumerate(prompts):
                if self._is_over:
                    break
                receive = functools.partial(self._receive, loop, index)
                total += engine.submit(
                    self._engine_ids[index],
                    prompt,
                    params,
                    adapter_id,
                    receive,
                    add_special_tokens=add_special_tokens,
                    allow_special=allow_special,
                    priority=priority,
                    tenant=tenant,
                    first_token_slo_s=first_token_slo_s,
                )
            if self._is_over:  # ended while we were submitting: the last ones are not aborted yet
                self._abort()
            return total

        self.num_prompt_tokens = await self._bridge.call(start_all)

    def _receive(self, loop: asyncio.AbstractEventLoop, index: int, output: RequestOutput) -> None:
        """Called on the engine's receiver thread."""
        if self._is_over:
            return
        try:
            loop.call_soon_threadsafe(self._deliver, index, output)
        except RuntimeError:  # the loop has ended, and with it everyone who could be told
            self._is_over = True

    def _deliver(self, index: int, output: RequestOutput) -> None:
        if self._is_over:
            return
        if output.error is not None:
            self.fail(output.error, after_queued=True)
        elif self.max_queued is not None and len(self._queue) >= self.max_queued:
            self.fail(TooSlowReader())
        else:
            self._queue.append((index, output))
            self._arrived.set()

    def fail(self, failure: Exception, *, after_queued: bool = False) -> None:
        """End the generation, from the event loop: the engine is let go and `next` raises
        `failure`, at once or when what had arrived before has been taken.
        """
        if self._is_over:
            return
        if not after_queued:
            self._queue.clear()
        self._failure = failure
        self._is_over = True
        self._arrived.set()
        self._abort()

    async def next(self) -> Increment:
        """The next increment. Raises the failure that ended the generation."""
        while not self._queue:
            if self._failure is not None:
                raise self._failure
            self._arrived.clear()
            await self._arrived.wait()
        index, output = self._queue.popleft()
        if output.finish_reason is not None:
            self.num_open_choices -= 1
        return index, output

    def close(self) -> None:
        """Abort what still runs and forget the rest. Idempotent."""
        if not self._is_over:
            self._is_over = True
            if self.num_open_choices:
                self._abort()
        self._queue.clear()
        self._bridge.forget(self)

    def _abort(self) -> None:
        self._bridge.abort(self._engine_ids)


class Bridge:
    """Makes generations, counts those that live, and runs other engine calls off the event loop."""

    def __init__(self, engine: FrontendApi) -> None:
        self.engine = engine
        self._generations: set[Generation] = set()
        self._executor = concurrent.futures.ThreadPoolExecutor(4, thread_name_prefix="bridge")
        # Its own, so that no abort waits behind the tokenizing of long prompts.
        self._aborts = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="bridge-abort")

    @property
    def num_generations(self) -> int:
        return len(self._generations)

    def generation(self, request_id: str, num_prompts: int, num_choices: int) -> Generation:
        generation = Generation(self, request_id, num_prompts, num_choices)
        self._generations.add(generation)
        return generation

    def forget(self, generation: Generation) -> None:
        self._generations.discard(generation)

    def fail_all(self, failure: Exception) -> None:
        for generation in list(self._generations):
            generation.fail(failure)

    def abort(self, engine_ids: Sequence[str]) -> None:
        """Let the engine drop requests, without waiting: an engine that stands still does not read,
        and must not make the event loop stand still.
        """

        def abort_all() -> None:
            for engine_id in engine_ids:
                with contextlib.suppress(EngineUnavailable):  # a dead engine runs nothing
                    self.engine.abort(engine_id)

        with contextlib.suppress(RuntimeError):  # closed: the engine has ended with all it ran
            self._aborts.submit(abort_all)

    async def call(self, function: Callable[[], T]) -> T:
        """Run a blocking function on the bridge's threads."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, function)

    async def wait(
        self, start: Callable[[], concurrent.futures.Future[T]], timeout_s: float | None = None
    ) -> T:
        """Start an engine call and wait for its answer. Raises CapacityError when it takes too
        long.
        """
        future = asyncio.wrap_future(await self.call(start))
        try:
            return await asyncio.wait_for(future, timeout_s)
        except TimeoutError as exc:
            raise CapacityError(f"the engine did not answer within {timeout_s:g} s") from exc

    def close(self) -> None:
        for executor in (self._executor, self._aborts):
            executor.shutdown(wait=False, cancel_futures=True)
