"""A completions server on 127.0.0.1 that answers as it is told to: well, slowly, or badly."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Any, Self

Answer = Callable[[dict[str, Any], asyncio.StreamWriter], Awaitable[None]]

SSE = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n"
DONE = b"data: [DONE]\n\n"


def event(value: Any) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def choice(text: str = "x", finish: str | None = None, **more: Any) -> bytes:
    return event({"choices": [{"index": 0, "text": text, "finish_reason": finish} | more]})


def usage(num_tokens: int) -> bytes:
    return event({"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": num_tokens}})


def chunk(content: bytes) -> bytes:
    return f"{len(content):x}\r\n".encode() + content + b"\r\n"


def whole(body: dict[str, Any]) -> list[bytes]:
    """The events of a right answer."""
    last = body["max_tokens"] - 1
    tokens = [choice(finish="length" if i == last else None) for i in range(last + 1)]
    return [*tokens, usage(last + 1), DONE]


async def well(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    writer.write(SSE + b"Transfer-Encoding: chunked\r\n\r\n")
    for content in whole(body):
        writer.write(chunk(content))
        await writer.drain()
    writer.write(b"0\r\n\r\n")


def paced(first_s: float, gap_s: float) -> Answer:
    async def answer(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        writer.write(SSE + b"Transfer-Encoding: chunked\r\n\r\n")
        *tokens, count, done = whole(body)
        for index, content in enumerate(tokens):
            await asyncio.sleep(gap_s if index else first_s)
            writer.write(chunk(content))
        writer.write(chunk(count + done) + b"0\r\n\r\n")

    return answer


def together(num: int) -> Answer:
    """Answers well once `num` requests are open at once."""
    is_full, here = asyncio.Event(), 0

    async def answer(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        nonlocal here
        here += 1
        if here == num:
            is_full.set()
        await is_full.wait()
        await well(body, writer)

    return answer


def sends(*parts: bytes) -> Answer:
    """Exactly these bytes, one part at a time, then the end of the connection."""

    async def answer(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        for part in parts:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(0.001)

    return answer


def streams(*events: bytes) -> Answer:
    """These events as the body of an event stream that ends as it should."""
    chunks = [chunk(content) for content in events]
    return sends(SSE + b"Transfer-Encoding: chunked\r\n\r\n", *chunks, b"0\r\n\r\n")


def refuses(status: int, body: bytes = b"", headers: bytes = b"") -> Answer:
    head = f"HTTP/1.1 {status} No\r\nContent-Length: {len(body)}\r\n".encode()
    return sends(head + headers + b"\r\n" + body)


async def hangs(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    writer.write(SSE + b"\r\n" + choice())
    await asyncio.Event().wait()


async def resets(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    writer.write(SSE + b"\r\n" + choice())
    await writer.drain()
    await asyncio.sleep(0.02)
    at_once = struct.pack("ii", 1, 0)  # no lingering: the other side gets a reset
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, at_once)
    writer.transport.abort()


class FakeServer:
    """Answers the request to model "lora-I" with `answers[I % len(answers)]`, the base with "well".

    `bodies` are those that came, `most_open` how many there were at once.
    """

    def __init__(self, *answers: Answer) -> None:
        self._answers = answers or (well,)
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.open = self.most_open = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0, backlog=1000)
        self.port = self._server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            await self._serve(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # the client went, or the test is over
        finally:
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        first, *lines = head.strip().split("\r\n")
        headers = {k.lower(): v for k, _, v in (line.partition(": ") for line in lines)}
        if first == "GET /v1/models HTTP/1.1":
            models = json.dumps({"data": [{"id": "the-base"}, {"id": "lora-0"}]}).encode()
            await refuses(200, models)({}, writer)
            return
        assert first == "POST /v1/completions HTTP/1.1", first
        body = json.loads(await reader.readexactly(int(headers["content-length"])))
        self.bodies.append(body)
        self.headers.append(headers)
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        try:
            name = body["model"]
            number = int(name.removeprefix("lora-")) if name.startswith("lora-") else None
            answer = well if number is None else self._answers[number % len(self._answers)]
            await answer(body, writer)
            await writer.drain()
        finally:
            self.open -= 1
