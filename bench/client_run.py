"""Drives a server with a trace: sends every request at its moment, whatever the server does, and
writes down what became of it.

Open loop: a slow server does not slow the arrivals down; only the cap on open connections does,
and what waits for it is late by its `sent_s`, while its first-token time still counts from its
arrival. Each request ends in the record file exactly once, with its error if it failed; one that
is given up half-way (a second Ctrl-C) or never sent is not there, and is sent when the run is
resumed.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
from typing import Any, TextIO

from bench.completion_stream import CompletionStream
from bench.http_exchange import BadResponse, Server, exchange
from bench.outcome import Outcome
from bench.records import RecordFile
from bench.trace import Request, Trace, prompt_token_ids

PROGRESS_EVERY_S = {True: 1.0, False: 10.0}  # on a terminal or not


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Asking:
    """How a request of a trace is asked of a server."""

    model_template: str  # "{i}" becomes the adapter's number
    base_model: str
    vocab_size: int  # prompts are random ids below it
    seed: int = 42  # of the prompts
    ignore_eos: bool = True
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)  # more fields of the body
    api_key: str | None = None

    def body(self, index: int, request: Request) -> dict[str, Any]:
        is_base = request.adapter is None
        prompt = prompt_token_ids(self.seed, index, request.num_prompt_tokens, self.vocab_size)
        return {
            "model": self.base_model
            if is_base
            else self.model_template.replace("{i}", str(request.adapter)),
            "prompt": prompt.tolist(),
            "max_tokens": request.num_output_tokens,
            "temperature": 0.0,
            "ignore_eos": self.ignore_eos,
            "stream": True,
            "stream_options": {"include_usage": True},
            "user": request.tenant,
            **self.extra,
        }

    def headers(self, index: int) -> dict[str, str]:
        found = {
            "Content-Type": "application/json",
            "Accept": "text/event-stream",
            "X-Request-Id": f"bench-{index}",
        }
        return found | ({"Authorization": f"Bearer {self.api_key}"} if self.api_key else {})


class ClientRun:
    """One run, or one part of a resumed run, of a trace against a server."""

    def __init__(
        self,
        server: Server,
        trace: Trace,
        asking: Asking,
        file: RecordFile,
        *,
        max_open: int,
        timeout_s: float,
        keeps_moments: bool = False,
        progress: TextIO | None = None,
    ) -> None:
        self.done = [Outcome.from_record(record) for record in file.records]
        self.segment = 1 + max((outcome.segment for outcome in self.done), default=-1)
        recorded = {outcome.index for outcome in self.done}
        self.todo = [index for index in range(len(trace)) if index not in recorded]
        self._server, self._trace, self._asking, self._file = server, trace, asking, file
        self._timeout_s, self._keeps_moments, self._progress = timeout_s, keeps_moments, progress
        self._slots = asyncio.Semaphore(max_open)
        self._open: set[asyncio.Task[None]] = set()
        self._sender: asyncio.Task[None] | None = None
        self._failure: BaseException | None = None
        self._origin = 0.0
        self.num_sent = 0
        self.is_interrupted = False

    async def run(self) -> None:
        """Send all that has no record yet, and wait for the last to end.

        Raises: whatever stopped the run, such as a disk that is full.
        """
        loop = asyncio.get_running_loop()
        start = self._trace[self.todo[0]].arrival_s if self.todo and self.segment else 0.0
        self._origin = loop.time() - start
        self._sender = asyncio.create_task(self._send_all())
        reporter = asyncio.create_task(self._report())
        try:
            await asyncio.wait([self._sender])
            while self._open:
                await asyncio.wait(set(self._open))
        finally:
            reporter.cancel()
            for task in (self._sender, *self._open):
                task.cancel()
            await asyncio.gather(self._sender, reporter, *self._open, return_exceptions=True)
        if not self._sender.cancelled():
            self._sender.result()
        if self._failure is not None:
            raise self._failure
        self._print_progress("\n")

    def interrupt(self) -> None:
        """The first time: send no more, and wait for what is open. The second: give it up."""
        for task in list(self._open) if self.is_interrupted else ():
            task.cancel()
        self.is_interrupted = True
        if self._sender is not None:
            self._sender.cancel()

    async def _send_all(self) -> None:
        loop = asyncio.get_running_loop()
        for index in self.todo:
            request = self._trace[index]
            body = json.dumps(self._asking.body(index, request)).encode()
            content = self._server.request(
                "POST", "/v1/completions", headers=self._asking.headers(index), body=body
            )
            await asyncio.sleep(max(0.0, self._origin + request.arrival_s - loop.time()))
            await self._slots.acquire()
            task = asyncio.create_task(self._send(index, content))
            self._open.add(task)
            task.add_done_callback(self._ended)
            self.num_sent += 1

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._open.discard(task)
        self._slots.release()
        if not task.cancelled() and task.exception() is not None:
            self._failure = self._failure or task.exception()
            self.interrupt()
            self.interrupt()

    async def _send(self, index: int, content: bytes) -> None:
        loop = asyncio.get_running_loop()
        outcome = Outcome.of(index, self._trace[index], self.segment)
        outcome.sent_s = round(loop.time() - self._origin, 6)
        stream = CompletionStream(self._origin)
        limit = asyncio.timeout(self._timeout_s)
        try:
            async with limit:
                await exchange(self._server, content, stream)
            outcome.error = stream.verdict()
        except OSError as exc:  # a TimeoutError is one, whoever's it is
            if limit.expired():
                outcome.error = f"timeout: not ended after {self._timeout_s:g} s"
            else:
                kind = "connect" if stream.status is None else "disconnect"
                outcome.error = f"{kind}: {exc or type(exc).__name__}"
        except BadResponse as exc:
            outcome.error = f"malformed: {exc}"
        stream.fill(outcome, now=loop.time(), keeps_moments=self._keeps_moments)
        self._file.append(outcome.record())
        self.done.append(outcome)

    async def _report(self) -> None:
        if self._progress is None:
            return
        while True:
            await asyncio.sleep(PROGRESS_EVERY_S[self._progress.isatty()])
            self._print_progress("\r" if self._progress.isatty() else "\n")

    def _print_progress(self, end: str) -> None:
        if self._progress is None:
            return
        elapsed_s = asyncio.get_running_loop().time() - self._origin
        failed = sum(not outcome.is_finished for outcome in self.done)
        line = (
            f"{elapsed_s:8.1f} s  sent {self.num_sent} of {len(self.todo)}  "
            f"open {len(self._open)}  finished {len(self.done) - failed}  failed {failed}"
        )
        print(line.ljust(78), end=end, file=self._progress, flush=True)


async def listed_models(server: Server, headers: dict[str, str]) -> list[str]:
    """The ids of GET /v1/models, the base's first. Raises OSError, or BadResponse."""
    reply = _Reply()
    async with asyncio.timeout(30):
        await exchange(server, server.request("GET", "/v1/models", headers=headers), reply)
    try:
        models = [str(model["id"]) for model in json.loads(reply.body)["data"]]
    except (ValueError, LookupError, TypeError):
        models = []
    if reply.status != 200 or not models:
        raise BadResponse(
            f"GET /v1/models: got status {reply.status} and {reply.body[:80]!r}, allowed: a list"
        )
    return models


class _Reply:
    """A sink that keeps the whole body."""

    def __init__(self) -> None:
        self.status, self.body = 0, b""

    def head(self, status: int, headers: dict[str, str]) -> None:
        self.status = status

    def data(self, content: bytes, now: float) -> None:
        self.body += content
