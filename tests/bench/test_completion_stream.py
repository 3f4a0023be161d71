"""However the bytes of an answer arrive, it is read the same, and what is wrong with it is said."""

from __future__ import annotations

import asyncio
import itertools
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.completion_stream import CompletionStream, Events
from bench.http_exchange import BadResponse, Cut, Server, exchange
from bench.outcome import Outcome
from bench.trace import Request
from tests.bench.fake_completions import (
    DONE,
    SSE,
    Answer,
    FakeServer,
    choice,
    chunk,
    event,
    refuses,
    sends,
    streams,
    usage,
    well,
    whole,
)

REQUEST = Request(arrival_s=0.0, adapter=0, tenant="a", num_prompt_tokens=4, num_output_tokens=3)
BODY = {"model": "lora-0", "max_tokens": 3}
WHOLE = b"".join(whole(BODY))


@given(st.lists(st.integers(0, len(WHOLE))), st.booleans())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_events_do_not_depend_on_where_the_stream_is_cut(cuts: list[int], is_crlf: bool) -> None:
    text = b": hello\n\nevent: token\nid: 5\n" + WHOLE + b"data:no space\ndata: two\n\ndata: torn"
    text = text.replace(b"\n", b"\r\n") if is_crlf else text
    events, found = Events(), []
    edges = sorted({0, *cuts, len(text)})
    for begin, end in itertools.pairwise(edges):
        found += events.feed(text[begin:end])
    plain = [part.removeprefix(b"data: ") for part in WHOLE.split(b"\n\n")[:-1]]
    assert found == [*plain, b"no space\ntwo"]


def ask(answer: Answer) -> tuple[Outcome, str | None]:
    """What an answer over a real connection is read as."""

    async def one() -> tuple[Outcome, str | None]:
        async with FakeServer(answer) as fake:
            server = Server.parse(fake.url)
            stream = CompletionStream(asyncio.get_running_loop().time())
            body = b'{"model": "lora-0", "max_tokens": 3}'
            await exchange(server, server.request("POST", "/v1/completions", body=body), stream)
            outcome = Outcome.of(0, REQUEST)
            now = asyncio.get_running_loop().time()
            stream.fill(outcome, now=now, keeps_moments=True)
            return outcome, stream.verdict()

    return asyncio.run(one())


CHUNKED = SSE + b"Transfer-Encoding: Chunked\r\n\r\n" + chunk(WHOLE[:50]) + chunk(WHOLE[50:])
LENGTH = SSE + f"content-length:{len(WHOLE)}\r\n\r\n".encode() + WHOLE


@pytest.mark.parametrize(
    "answer",
    [
        well,
        sends(CHUNKED + b"0\r\n\r\n"),
        sends(CHUNKED + b"0;last\r\nTrailer: x\r\n\r\n"),
        sends(*(bytes([byte]) for byte in CHUNKED + b"0\r\n\r\n")),
        sends(LENGTH),
        sends(*(LENGTH[i : i + 7] for i in range(0, len(LENGTH), 7))),
        sends(SSE + b"\r\n" + WHOLE),
        sends(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Hints\r\nLink: x\r\n\r\n" + LENGTH),
        streams(b": ping\n\n", WHOLE.replace(b"\n", b"\r\n")),
        streams(choice(), choice(), choice(), choice("", "length"), usage(3), DONE),
        streams(choice(token_ids=[1, 2]), choice(finish="length", token_ids=[3]), DONE),
        streams(choice("xy"), choice("z", "length"), usage(3), DONE, b"data: after the end\n\n"),
        streams(event({"choices": [{"text": "x", "finish_reason": "stop"}], "error": None}),
                usage(3), DONE),
    ],
    ids=["chunks", "one-write", "trailer", "bytes", "length", "sevens", "to-close", "interim",
         "crlf", "bare-finish", "token-ids", "two-a-chunk", "null-error"],
)  # fmt: skip
def test_every_legal_form_of_an_answer_is_the_same_answer(answer: Answer) -> None:
    outcome, error = ask(answer)
    assert error is None
    assert (outcome.status, outcome.num_output_tokens) == (200, 3)
    assert outcome.first_token_s is not None and outcome.last_token_s is not None
    assert outcome.token_s is not None and len(outcome.token_s) <= 3
    assert 0 < outcome.first_token_s <= outcome.last_token_s <= outcome.ended_s


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (refuses(503, b'{"error": {"message": "try later"}}', b"Retry-After: 7\r\n"),
         "http: 503 try later"),
        (refuses(429, b'{"message": "too many"}'), "http: 429 too many"),
        (refuses(404, b'{"error": "no such model"}'), "http: 404 no such model"),
        (refuses(500, b"<html>\n oops"), "http: 500 <html> oops"),
        (refuses(500, b"\xff" * 100_000), "http: 500 \ufffd"),
        (refuses(502), "http: 502 "),
        (sends(b"HTTP/1.1 204 No Content\r\n\r\n"), "http: 204 "),
        (streams(choice(), event({"error": {"message": "engine died"}}), DONE),
         "stream: engine died"),
        (streams(choice(), choice(), choice(finish="length")), "malformed: .* without \\[DONE\\]"),
        (streams(choice(), choice(finish="abort"), DONE), "aborted: finish_reason abort"),
        (streams(choice(), DONE), "aborted: finish_reason None"),
        (streams(DONE), "aborted"),
        (streams(), "malformed: .* without"),
        (streams(b"data: [DONE]\n"), "malformed: .* without"),
    ],
)  # fmt: skip
def test_an_answer_that_ends_well_as_http_may_still_be_a_failure(
    answer: Answer, error: str
) -> None:
    outcome, found = ask(answer)
    assert found is not None
    assert re.match(error, found)
    assert outcome.retry_after_s == (7.0 if "later" in error else None)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (sends(b"SSH-2.0-OpenSSH_9.2\r\n"), "allowed: an HTTP/1 response"),
        (sends(b"HTTP/2 200\r\n\r\n"), "allowed: an HTTP/1 response"),
        (sends(b"HTTP/1.1 OK\r\n\r\n"), "allowed: an HTTP/1 response"),
        (sends(b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 20_000), "allowed: an HTTP/1 response"),
        (refuses(200, b"{}", b"Content-Type: application/json\r\n"), "content-type: got 'applic"),
        (sends(SSE + b"Content-Length: many\r\n\r\n"), "content-length: got 'many'"),
        (sends(SSE + b"Transfer-Encoding: chunked\r\n\r\n-5\r\n"), "allowed: the size of a chunk"),
        (sends(SSE + b"Transfer-Encoding: chunked\r\n\r\n" + b"1" * 2000), "a line of more than"),
        (sends(SSE + b"Transfer-Encoding: chunked\r\n\r\n1\r\nxyz\r\n"), "the end of a chunk"),
        (streams(b"data: {torn\n\n"), "allowed: JSON"),
        (streams(b"data: \xff\n\n"), "allowed: JSON"),
        (streams(b"data: [1]\n\n"), "allowed: a JSON object"),
        (streams(b'data: {"choices": [5]}\n\n'), "choices as a list of objects"),
        (streams(b'data: {"choices": {"0": {}}}\n\n'), "choices as a list of objects"),
    ],
)
def test_what_is_not_the_protocol_is_refused(answer: Answer, message: str) -> None:
    with pytest.raises(BadResponse, match=message):
        ask(answer)


@pytest.mark.parametrize(
    "content", [b"", b"HTTP/1.1 200", CHUNKED, CHUNKED + b"0\r\n", LENGTH[:-1]]
)
def test_a_connection_that_ends_early_is_said_to(content: bytes) -> None:
    with pytest.raises(Cut, match="the server closed the connection"):
        ask(sends(content))


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://a:8000", ("a", 8000, "")),
        ("http://a:8000/v1/", ("a", 8000, "")),
        ("https://b.example/llm/v1", ("b.example", 443, "/llm")),
        ("http://[::1]:9/", ("::1", 9, "")),
    ],
)
def test_a_url_may_end_in_v1_or_not(url: str, expected: tuple[Any, ...]) -> None:
    server = Server.parse(url)
    assert (server.host, server.port, server.path) == expected
    assert (server.tls is not None) == url.startswith("https")


@pytest.mark.parametrize("url", ["a:8000", "ftp://a", "http://", "http://a?x=1", "http://u:p@a"])
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"url: got .*, allowed: http"):
        Server.parse(url)
