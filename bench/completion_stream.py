"""Reads the stream of one completion, of any OpenAI-compatible server, into an outcome.

Tolerant of what is legal (LF or CRLF, comments, several events in one read or one in several, a
chunk of usage alone), and strict about the rest: an answer that is not whole is a failure.

Kinds of failure, before the colon of `Outcome.error`:

    connect     no connection, or it broke before the response began
    disconnect  the connection broke in the middle of the response
    http        a status other than 200, with the server's message; 429 and 503 are such
    stream      an error event in the stream
    aborted     the server ended it for another reason than "stop" or "length"
    malformed   not HTTP, not an event stream, not JSON, or without its end
    timeout     not ended within the time of the client
"""

from __future__ import annotations

import json
from typing import Any

from bench.http_exchange import BadResponse
from bench.outcome import Outcome, gap_quantiles

MAX_EVENT_BYTES = 16 << 20
_MAX_ERROR_BYTES = 64 << 10
_MAX_ERROR_CHARS = 500


class Events:
    """Splits a byte stream into the data of its server-sent events."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, content: bytes) -> list[bytes]:
        """The events that `content` completes. Raises BadResponse if one is far too long."""
        *lines, self._rest = (self._rest + content).split(b"\n")
        if len(self._rest) > MAX_EVENT_BYTES:
            raise BadResponse(f"an event of more than {MAX_EVENT_BYTES} bytes")
        found = []
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif not line and self._data:
                found.append(b"\n".join(self._data))
                self._data.clear()
        return found


class CompletionStream:
    """The sink of one request: takes the response in, and in the end fills the outcome.

    `origin` is the event loop's time at the start of the trace.
    """

    def __init__(self, origin: float) -> None:
        self._origin = origin
        self._events = Events()
        self._moments: list[float] = []
        self._num_token_ids = 0
        self._num_tokens: int | None = None  # as the server counts
        self._finish_reason: str | None = None
        self._is_done = False
        self._failure: str | None = None
        self._body = b""
        self._retry_after_s: float | None = None
        self.status: int | None = None

    def head(self, status: int, headers: dict[str, str]) -> None:
        self.status = status
        after = headers.get("retry-after", "")
        if after.replace(".", "", 1).isdecimal():  # else a date, or nothing
            self._retry_after_s = float(after)
        kind = headers.get("content-type", "")
        if status == 200 and not kind.lower().startswith("text/event-stream"):
            raise BadResponse(f"content-type: got {kind!r}, allowed: text/event-stream")

    def data(self, content: bytes, now: float) -> None:
        if self.status != 200:
            self._body = (self._body + content)[:_MAX_ERROR_BYTES]
            return
        for event in self._events.feed(content):
            if event == b"[DONE]":
                self._is_done = True
            elif not self._is_done:
                self._take(event, now)

    def _take(self, event: bytes, now: float) -> None:
        try:
            chunk = json.loads(event)
        except ValueError as exc:
            raise BadResponse(f"got event {event[:80]!r}, allowed: JSON") from exc
        if not isinstance(chunk, dict):
            raise BadResponse(f"got event {event[:80]!r}, allowed: a JSON object")
        if chunk.get("error"):
            self._failure = self._failure or f"stream: {_message(chunk)}"
            return
        choices, usage = chunk.get("choices"), chunk.get("usage")
        if isinstance(usage, dict) and isinstance(usage.get("completion_tokens"), int):
            self._num_tokens = usage["completion_tokens"]
        if not choices:  # usage alone
            return
        choice = choices[0] if isinstance(choices, list) else None
        if not isinstance(choice, dict):
            raise BadResponse(f"got event {event[:80]!r}, allowed: choices as a list of objects")
        self._moments.append(round(now - self._origin, 6))
        self._num_token_ids += len(choice.get("token_ids") or ())
        self._finish_reason = choice.get("finish_reason") or self._finish_reason

    def fill(self, outcome: Outcome, *, now: float, keeps_moments: bool) -> None:
        """Write down what came, whether or not the request ended well."""
        known = self._num_tokens if self._num_tokens is not None else self._num_token_ids or None
        moments = self._moments[:known]  # an event that only tells the reason brought no token
        outcome.status = self.status
        outcome.finish_reason = self._finish_reason
        outcome.retry_after_s = self._retry_after_s
        outcome.num_output_tokens = len(moments) if known is None else known
        outcome.first_token_s = moments[0] if moments else None
        outcome.last_token_s = moments[-1] if moments else None
        outcome.gaps_s = gap_quantiles(moments)
        outcome.token_s = moments if keeps_moments else None
        outcome.ended_s = round(now - self._origin, 6)

    def verdict(self) -> str | None:
        """The error of a response that has ended as HTTP has it; None if it is whole."""
        if self.status != 200:
            return f"http: {self.status} {_message(_parsed(self._body))}"[:_MAX_ERROR_CHARS]
        if self._failure:
            return self._failure
        if not self._is_done:
            return "malformed: the stream ended without [DONE]"
        if self._finish_reason not in ("stop", "length"):
            return f"aborted: finish_reason {self._finish_reason}"
        return None


def _parsed(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        return body.decode("utf-8", "replace")


def _message(body: Any) -> str:
    """What a server says went wrong: {"error": {"message": ...}} or anything else."""
    found = body.get("error", body) if isinstance(body, dict) else body
    if isinstance(found, dict):
        found = found.get("message", found)
    text = found if isinstance(found, str) else json.dumps(found)
    return " ".join(text.split())[:_MAX_ERROR_CHARS]
