"""One HTTP/1.1 request and its response, on a connection of its own, parsed as the bytes come.

For a client that holds thousands of streams and reads the clock at every event: the event loop
calls straight into the parser, and no coroutine wakes up before the response has ended. There is
no reuse of connections, no redirect, no compression, and nothing is ever tried twice: a request
that failed is a result.
"""

from __future__ import annotations

import asyncio
import dataclasses
import re
import ssl
import urllib.parse
from typing import Protocol, Self

MAX_HEAD_BYTES = 64 << 10
_MAX_CHUNK_LINE_BYTES = 1 << 10


class BadResponse(Exception):
    """What came is not HTTP/1.1 as this client reads it."""


class Cut(ConnectionError):
    """The connection ended before the response did."""


class Sink(Protocol):
    """Who takes a response. `now` is the event loop's time at which the bytes were read."""

    def head(self, status: int, headers: dict[str, str]) -> None: ...

    def data(self, content: bytes, now: float) -> None: ...


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """Where requests go. `address` is what `host` was found to be, so that no request looks it up
    again.
    """

    host: str
    port: int
    path: str  # before /v1; "" or "/..."
    tls: ssl.SSLContext | None = None
    address: str | None = None

    @classmethod
    def parse(cls, url: str) -> Self:
        """From http(s)://host[:port][/path], with or without a /v1 at its end."""
        parts = urllib.parse.urlsplit(url)
        is_whole = parts.hostname and not (parts.query or parts.fragment or parts.username)
        if parts.scheme not in ("http", "https") or not parts.hostname or not is_whole:
            raise ValueError(f"url: got {url!r}, allowed: http(s)://host[:port][/path]")
        path = parts.path.rstrip("/").removesuffix("/v1")
        is_tls = parts.scheme == "https"
        return cls(
            host=parts.hostname, port=parts.port or (443 if is_tls else 80), path=path,
            tls=ssl.create_default_context() if is_tls else None,
        )  # fmt: skip

    async def resolved(self) -> Self:
        """The same server by the first of its addresses that takes a connection.

        Raises: OSError: none does.
        """
        loop = asyncio.get_running_loop()
        failure: OSError | None = None
        for _, _, _, _, where in await loop.getaddrinfo(self.host, self.port, type=1):
            try:
                _, writer = await asyncio.open_connection(str(where[0]), self.port)
            except OSError as exc:
                failure = exc
                continue
            writer.close()
            return dataclasses.replace(self, address=str(where[0]))
        raise failure or OSError(f"no address of {self.host}")

    def request(
        self, method: str, path: str, *, headers: dict[str, str] | None = None, body: bytes = b""
    ) -> bytes:
        """The bytes of a request."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        lines = [f"{method} {self.path}{path} HTTP/1.1", f"Host: {host}:{self.port}"]
        lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
        lines += [f"Content-Length: {len(body)}", "Connection: close", "", ""]
        return "\r\n".join(lines).encode("latin-1") + body


async def exchange(server: Server, request: bytes, sink: Sink) -> None:
    """Send a request and give its response to `sink` until it has ended. Cancelling closes the
    connection at once.

    Raises: OSError: no connection, or it broke (`Cut` if it ended early). BadResponse: not HTTP.
    Whatever `sink` raises.
    """
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[None] = loop.create_future()
    transport: asyncio.Transport | None = None
    try:
        transport, _ = await loop.create_connection(
            lambda: _Exchange(loop, request, sink, ended),
            server.address or server.host,
            server.port,
            ssl=server.tls,
            server_hostname=server.host if server.tls else None,
        )
        await ended
    finally:
        if transport is not None:
            transport.abort()
        if not ended.cancel() and not ended.cancelled():
            ended.exception()  # is raised above, or is of a connection that was given up


class _Exchange(asyncio.Protocol):
    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        request: bytes,
        sink: Sink,
        ended: asyncio.Future[None],
    ) -> None:
        self._loop, self._request, self._sink, self._ended = loop, request, sink, ended
        self._buffer = bytearray()
        self._read = self._read_head
        self._left = 0  # bytes of the body, or of its chunk, that have not come
        self._is_chunked = self._until_close = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        if self._ended.done():
            return
        now = self._loop.time()
        self._buffer += data
        try:
            while self._read(now):
                pass
        except Exception as exc:  # to whoever awaits the exchange
            if not self._ended.done():
                self._ended.set_exception(exc)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._ended.done():
            return
        if exc is not None:
            self._ended.set_exception(exc)
        elif self._until_close:
            self._ended.set_result(None)
        else:
            self._ended.set_exception(Cut("the server closed the connection"))

    def _take(self, count: int) -> bytes:
        taken = bytes(self._buffer[:count])
        del self._buffer[:count]
        return taken

    def _take_line(self, limit: int) -> bytes | None:
        """The next line without its end, or None if it has not come whole."""
        end = self._buffer.find(b"\n")
        if end > limit or (end < 0 and len(self._buffer) > limit):
            raise BadResponse(f"a line of more than {limit} bytes")
        return None if end < 0 else self._take(end + 1).rstrip(b"\r\n")

    # Each reader returns whether it got on, and so whether to call the current one again.

    def _read_head(self, now: float) -> bool:
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            if len(self._buffer) > MAX_HEAD_BYTES or not b"HTTP/1.".startswith(
                bytes(self._buffer[:7])
            ):
                raise BadResponse(f"got {bytes(self._buffer[:40])!r}, allowed: an HTTP/1 response")
            return False
        first, *lines = self._take(end + 4).decode("latin-1").split("\r\n")
        version, _, rest = first.partition(" ")
        if not version.startswith("HTTP/1.") or not rest[:3].isdecimal():
            raise BadResponse(f"got {first[:40]!r}, allowed: an HTTP/1 response")
        status = int(rest[:3])
        if status < 200:  # an interim response; the real one follows
            return True
        pairs = (line.partition(":") for line in lines if line)
        headers = {name.strip().lower(): value.strip() for name, _, value in pairs}
        self._choose_body(status, headers)
        self._sink.head(status, headers)
        return True

    def _choose_body(self, status: int, headers: dict[str, str]) -> None:
        length = headers.get("content-length", "")
        if headers.get("transfer-encoding", "").lower() == "chunked":
            self._is_chunked, self._read = True, self._read_chunk_size
        elif status in (204, 304):
            self._read = self._read_body
        elif not length:
            self._until_close, self._read = True, self._read_to_close
        elif length.isdecimal():
            self._left, self._read = int(length), self._read_body
        else:
            raise BadResponse(f"content-length: got {length[:40]!r}, allowed: a number")

    def _read_to_close(self, now: float) -> bool:
        if self._buffer:
            self._sink.data(self._take(len(self._buffer)), now)
        return False

    def _read_body(self, now: float) -> bool:
        if self._left and not self._buffer:
            return False
        content = self._take(self._left)
        self._left -= len(content)
        if content:
            self._sink.data(content, now)
        if not self._left:
            if self._is_chunked:
                self._read = self._read_chunk_end
                return True
            self._ended.set_result(None)
        return False

    def _read_chunk_size(self, now: float) -> bool:
        line = self._take_line(_MAX_CHUNK_LINE_BYTES)
        if line is None:
            return False
        size = line.partition(b";")[0].strip()
        if not re.fullmatch(rb"[0-9a-fA-F]{1,8}", size):
            raise BadResponse(f"got {size[:40]!r}, allowed: the size of a chunk")
        self._left = int(size, 16)
        self._read = self._read_body if self._left else self._read_trailer
        return True

    def _read_chunk_end(self, now: float) -> bool:
        line = self._take_line(_MAX_CHUNK_LINE_BYTES)
        if line is None:
            return False
        if line:
            raise BadResponse(f"got {line[:40]!r}, allowed: the end of a chunk")
        self._read = self._read_chunk_size
        return True

    def _read_trailer(self, now: float) -> bool:
        line = self._take_line(MAX_HEAD_BYTES)
        if line is None:
            return False
        if line:
            return True
        self._ended.set_result(None)
        return False
