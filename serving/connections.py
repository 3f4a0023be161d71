"""Uvicorn's HTTP/1.1 connection, with a time limit for headers and our shape for what h11
refuses.
"""

from __future__ import annotations

import asyncio
import json

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from serving.errors import BadRequest, error_body

HEADER_TIMEOUT_S = 20.0  # from a connection's start, or its last answer's end, to a whole header


class Connection(H11Protocol):
    """Closes connections that send no whole header in time; uvicorn itself waits for ever."""

    header_timeout_s = HEADER_TIMEOUT_S
    _header_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_header()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._header_timer is None and self.conn.their_state is h11.IDLE:
            self._await_header()  # a further request on a connection that was kept alive
        super().data_received(data)

    def handle_events(self) -> None:
        super().handle_events()
        if self.conn.their_state is not h11.IDLE:
            self._stop_timer()

    def _await_header(self) -> None:
        self._header_timer = self.loop.call_later(self.header_timeout_s, self._close_idle)

    def _stop_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _close_idle(self) -> None:
        self._header_timer = None
        self.transport.close()

    def send_400_response(self, msg: str) -> None:
        """What h11 cannot parse, headers beyond its limit included."""
        body = json.dumps(error_body(BadRequest(f"request: {msg}"))).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        for event in (
            h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
            h11.Data(data=body),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
