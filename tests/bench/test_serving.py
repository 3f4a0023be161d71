"""The client sends on time whatever the server does, and every request is in the records once."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench import serving
from bench.client_run import Asking, ClientRun, listed_models
from bench.http_exchange import BadResponse, Server
from bench.outcome import Outcome
from bench.records import RecordFile, header, read_records
from bench.slo import summarise
from bench.trace import Request, default_tenant, prompt_token_ids
from bench.trace_files import write_trace
from tests.bench.fake_completions import (
    DONE,
    Answer,
    FakeServer,
    choice,
    event,
    hangs,
    paced,
    refuses,
    resets,
    sends,
    streams,
    together,
    well,
)

ROOT = Path(__file__).parents[2]
HEAD = header(bench="serving", device="none", settings={}, seed=42, commit_name="abc")
ASKING = Asking(model_template="lora-{i}", base_model="the-base", vocab_size=1000)


def trace_of(num: int, every_s: float = 0.0, adapters: int | None = 1) -> list[Request]:
    """Requests to adapters in turn; to the base if there are none."""
    made = []
    for index in range(num):
        adapter = None if adapters is None else index % adapters
        made.append(
            Request(
                arrival_s=round(index * every_s, 6), adapter=adapter,
                tenant=default_tenant(adapter), num_prompt_tokens=5 + index % 3,
                num_output_tokens=3,
            )
        )  # fmt: skip
    return made


@contextlib.contextmanager
def client_of(
    server: Server, trace: list[Request], path: Path, asking: Asking = ASKING, **kwargs: Any
) -> Iterator[ClientRun]:
    options = {"max_open": 1000, "timeout_s": 5.0} | kwargs
    with RecordFile.resume(path, HEAD) as file:
        yield ClientRun(server, trace, asking, file, **options)


def drive(
    trace: list[Request], path: Path, *answers: Answer, asking: Asking = ASKING, **kwargs: Any
) -> tuple[list[Outcome], FakeServer]:
    """Run a trace against a fake server; the outcomes are those of the file, by index."""

    async def run() -> FakeServer:
        async with FakeServer(*answers) as fake:
            with client_of(Server.parse(fake.url), trace, path, asking, **kwargs) as client:
                await client.run()
            return fake

    fake = asyncio.run(run())
    outcomes = [Outcome.from_record(record) for record in read_records(path)[1]]
    return sorted(outcomes, key=lambda outcome: outcome.index), fake


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "records.jsonl"


ANSWERS: dict[str, tuple[Answer, str | None]] = {
    "well": (well, None),
    "busy": (refuses(503, b'{"error": {"message": "full"}}', b"Retry-After: 2\r\n"), "http"),
    "many": (refuses(429), "http"),
    "paced": (paced(0.05, 0.01), None),
    "gone before": (sends(), "connect"),
    "gone": (sends(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
                   b"Content-Length: 999\r\n\r\n" + choice()), "disconnect"),
    "reset": (resets, "disconnect"),
    "torn": (streams(choice(), b"data: {\n\n"), "malformed"),
    "cut": (streams(choice()), "malformed"),
    "error": (streams(choice(), event({"error": {"message": "no"}}), DONE), "stream"),
    "abort": (streams(choice(finish="abort"), DONE), "aborted"),
    "hang": (hangs, "timeout"),
}  # fmt: skip


def test_whatever_the_server_does_every_request_is_recorded_once_with_its_error(
    path: Path,
) -> None:
    answers = [answer for answer, _ in ANSWERS.values()]
    trace = trace_of(10 * len(ANSWERS), every_s=0.002, adapters=len(ANSWERS))
    outcomes, fake = drive(trace, path, *answers, timeout_s=3.0)
    assert [outcome.index for outcome in outcomes] == list(range(len(trace)))
    assert len(fake.bodies) == len(trace)  # nothing was sent twice
    for outcome in outcomes:
        name = list(ANSWERS)[outcome.index % len(ANSWERS)]
        assert outcome.error_kind == ANSWERS[name][1], (name, outcome.error)
        assert outcome.is_finished == (outcome.first_token_after_s is not None)
        assert outcome.arrival_s <= (outcome.sent_s or 0) <= outcome.ended_s
        assert outcome.retry_after_s == (2.0 if name == "busy" else None)
    summary = summarise(outcomes)
    assert summary["num_finished"] == 20
    assert sum(summary["errors"].values()) == len(trace) - 20


def test_a_server_that_is_not_there_fails_every_request(path: Path) -> None:
    async def run() -> None:
        async with FakeServer() as fake:
            server = Server.parse(fake.url)
        with client_of(server, trace_of(5), path) as client:
            await client.run()

    asyncio.run(run())
    _, records = read_records(path)
    assert sorted(record["index"] for record in records) == [0, 1, 2, 3, 4]
    assert all(record["error"].startswith("connect: ") for record in records)


def test_what_is_asked_is_what_the_trace_says(path: Path) -> None:
    trace = [*trace_of(3, adapters=2), *trace_of(1, adapters=None)]
    asking = Asking(
        model_template="lora-{i}", base_model="the-base", vocab_size=1000, seed=7,
        extra={"top_k": 1, "user": "me"}, api_key="secret",
    )  # fmt: skip
    outcomes, fake = drive(trace, path, asking=asking)
    assert all(outcome.is_finished and not outcome.is_short for outcome in outcomes)
    by_prompt = {tuple(body["prompt"]): body for body in fake.bodies}
    for index, request in enumerate(trace):
        prompt = prompt_token_ids(7, index, request.num_prompt_tokens, 1000)
        assert by_prompt[tuple(prompt.tolist())] == {
            "model": "the-base" if request.adapter is None else f"lora-{request.adapter}",
            "prompt": prompt.tolist(),
            "max_tokens": 3, "temperature": 0.0, "ignore_eos": True, "stream": True,
            "stream_options": {"include_usage": True}, "top_k": 1, "user": "me",
        }  # fmt: skip
    assert {headers["x-request-id"] for headers in fake.headers} == {f"bench-{i}" for i in range(4)}
    assert all(headers["authorization"] == "Bearer secret" for headers in fake.headers)
    assert "secret" not in path.read_text()


def test_arrivals_do_not_wait_for_a_server_that_does_not_answer(path: Path) -> None:
    trace = trace_of(50, every_s=0.005)
    outcomes, fake = drive(trace, path, together(50), timeout_s=60.0)
    assert fake.most_open == 50  # else the first would have timed out
    assert all(outcome.is_finished for outcome in outcomes)
    lateness = [(o.sent_s or 0) - o.arrival_s for o in outcomes]
    assert 0 <= min(lateness) < 0.25  # one of them at least met nothing else on this machine


def test_a_request_that_is_not_answered_ends_by_its_own_timeout(path: Path) -> None:
    outcomes, _ = drive(trace_of(10, every_s=0.05), path, hangs, timeout_s=0.5)
    assert {outcome.error_kind for outcome in outcomes} == {"timeout"}
    assert all(0.49 < o.ended_s - (o.sent_s or 0) < 10 for o in outcomes)


def test_no_more_connections_are_open_than_allowed_and_waiting_counts_as_latency(
    path: Path,
) -> None:
    outcomes, fake = drive(trace_of(12), path, paced(0.1, 0.0), max_open=3)
    assert fake.most_open == 3
    assert all(outcome.is_finished for outcome in outcomes)
    assert sum((outcome.sent_s or 0) < 0.09 for outcome in outcomes) <= 3
    last = max(outcomes, key=lambda outcome: outcome.sent_s or 0)
    assert (last.first_token_after_s or 0) > 0.39  # four rounds of 0.1 s
    assert (last.first_token_s or 0) - (last.sent_s or 0) < (last.first_token_after_s or 0) - 0.28


def test_times_are_those_of_the_stream(path: Path) -> None:
    outcomes, _ = drive(trace_of(4), path, paced(0.2, 0.1), keeps_moments=True)
    for outcome in outcomes:
        assert outcome.token_s is not None and len(outcome.token_s) == 3
        for index, moment in enumerate(outcome.token_s):
            assert 0.199 + 0.099 * index < moment < 5.0  # no earlier than it was sent
        assert outcome.first_token_s == outcome.token_s[0]
        assert outcome.last_token_s == outcome.token_s[-1]
        assert outcome.gaps_s is not None and outcome.gaps_s["max"] > 0
    bare, _ = drive(trace_of(1), path.with_name("b"), well)
    assert bare[0].token_s is None and bare[0].num_output_tokens == 3


def test_a_resumed_run_sends_only_what_has_no_record(path: Path) -> None:
    trace = trace_of(20, every_s=0.01)
    with RecordFile.create(path, HEAD) as file:
        for index in (0, 3, 7):
            file.append(Outcome.of(index, trace[index]).record())
    outcomes, fake = drive(trace, path)
    assert [outcome.index for outcome in outcomes] == list(range(20))
    assert len(fake.bodies) == 17
    assert collections.Counter(o.segment for o in outcomes) == {0: 3, 1: 17}
    again, fake = drive(trace, path)
    assert again == outcomes and not fake.bodies


def test_a_resumed_run_keeps_the_clock_of_the_trace(path: Path) -> None:
    trace = trace_of(3, every_s=100.0)
    with RecordFile.create(path, HEAD) as file:
        for index in (0, 1):
            file.append(Outcome.of(index, trace[index]).record())
    outcomes, _ = drive(trace, path)  # at once: it does not wait for 200 s
    assert 200.0 <= (outcomes[2].sent_s or 0) < 210.0
    assert 0 < (outcomes[2].first_token_after_s or 0) < 10.0


def test_one_interrupt_waits_for_what_is_open_and_two_give_it_up(path: Path) -> None:
    async def run(num_interrupts: int, where: Path) -> FakeServer:
        trace = trace_of(4, adapters=2) + trace_of(1, every_s=0.0)
        late = Request(
            arrival_s=60.0, adapter=0, tenant="late", num_prompt_tokens=4, num_output_tokens=3
        )
        async with FakeServer(paced(0.3, 0.0), paced(0.3, 0.01)) as fake:
            with client_of(Server.parse(fake.url), [*trace, late], where) as client:
                task = asyncio.create_task(client.run())
                while len(fake.bodies) < 5:
                    await asyncio.sleep(0.005)
                for _ in range(num_interrupts):
                    client.interrupt()
                await asyncio.wait_for(task, 5)
            assert client.is_interrupted
            return fake

    asyncio.run(run(1, path))
    assert sorted(record["index"] for record in read_records(path)[1]) == [0, 1, 2, 3, 4]
    asyncio.run(run(2, path.with_name("second")))
    assert read_records(path.with_name("second"))[1] == []


def test_a_record_that_cannot_be_written_stops_the_run(path: Path) -> None:
    class Full(RecordFile):
        def append(self, record: dict[str, Any]) -> None:
            raise OSError(28, "No space left on device")

    async def run() -> None:
        async with FakeServer(well, hangs) as fake:
            with Full.create(path, HEAD) as file:
                client = ClientRun(
                    Server.parse(fake.url), trace_of(6, adapters=2), ASKING, file,
                    max_open=10, timeout_s=60.0,
                )  # fmt: skip
                with pytest.raises(OSError, match="No space left"):
                    await asyncio.wait_for(client.run(), 10)

    asyncio.run(run())


def test_hundreds_of_streams_at_once_are_all_read(path: Path) -> None:
    trace = trace_of(400)
    outcomes, fake = drive(trace, path, together(400), timeout_s=60.0)
    assert fake.most_open == 400
    assert all(outcome.is_finished and not outcome.is_short for outcome in outcomes)
    assert len(outcomes) == 400


def test_models_are_listed_base_first_and_a_wrong_list_is_refused() -> None:
    async def ask() -> list[str]:
        async with FakeServer() as fake:
            return await listed_models(Server.parse(fake.url), {})

    assert asyncio.run(ask()) == ["the-base", "lora-0"]

    async def ask_elsewhere() -> None:
        async def other(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 2\r\n\r\n{}")
            writer.close()

        server = await asyncio.start_server(other, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with server:
            with pytest.raises(BadResponse, match="got status 404"):
                await listed_models(Server.parse(f"http://127.0.0.1:{port}"), {})

    asyncio.run(ask_elsewhere())


@pytest.fixture
def fake_url() -> Iterator[str]:
    """A fake server in a thread: 0.2 s to the first token."""
    ready: list[Any] = []
    is_ready = threading.Event()

    async def serve() -> None:
        async with FakeServer(paced(0.2, 0.0)) as fake:
            stop = asyncio.Event()
            ready.extend([fake.url, asyncio.get_running_loop(), stop])
            is_ready.set()
            await stop.wait()

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    assert is_ready.wait(10)
    url, loop, stop = ready
    yield url
    loop.call_soon_threadsafe(stop.set)
    thread.join(10)
    assert not thread.is_alive()


def command(url: str, trace: Path, out: Path, *more: str) -> list[str]:
    return [
        sys.executable, "-m", "bench.serving", "--url", url, "--trace", str(trace), "--out",
        str(out), "--model-template", "lora-{i}", "--device", "a GPU", *more,
    ]  # fmt: skip


def call(words: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, capture_output=True, text=True, cwd=ROOT, check=False, timeout=60)


def test_ctrl_c_leaves_records_that_a_second_call_completes(
    fake_url: str, tmp_path: Path, path: Path
) -> None:
    trace = tmp_path / "trace.jsonl"
    write_trace(trace, trace_of(60, every_s=0.05), {})
    words = command(fake_url, trace, path)
    with subprocess.Popen(
        words, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        deadline = time.monotonic() + 30
        while not path.exists() or path.read_bytes().count(b"\n") < 4:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert process.returncode == serving.INTERRUPTED, err
    _, before = read_records(path)
    assert 3 <= len(before) < 60
    assert f"INTERRUPTED    {60 - len(before)} of 60 requests have no record" in out
    refused = call(words)
    assert refused.returncode == 1 and "exists; resume it" in refused.stderr
    done = call([*words, "--resume"])
    assert done.returncode == 0, done.stderr
    head, records = read_records(path)
    assert sorted(record["index"] for record in records) == list(range(60))
    assert records[: len(before)] == before
    assert (head["device"], head["settings"]["base_model"]) == ("a GPU", "the-base")
    assert "60 of 60 finished; failed: none" in done.stdout and "SLO 6s" in done.stdout
    assert "sent" in done.stderr and "open 0" in done.stderr


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--model-template", "fixed"], "--model-template: got 'fixed', allowed: with {i}"),
        (["--url", "nowhere"], "url: got 'nowhere'"),
        (["--url", "http://127.0.0.1:9"], "127.0.0.1"),
        (["--trace", "missing.jsonl"], "missing.jsonl"),
        (["--extra", "[1]"], "--extra"),
        (["--max-open", "0"], "--max-open"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_sent(
    fake_url: str, tmp_path: Path, path: Path, more: list[str], message: str,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    trace = tmp_path / "trace.jsonl"
    write_trace(trace, trace_of(4, adapters=2), {})
    monkeypatch.setattr("sys.argv", command(fake_url, trace, path, *more)[2:])
    with pytest.raises(SystemExit) as stopped:
        serving.main()
    assert message in f"{stopped.value.code} {capsys.readouterr().err}"
    assert not path.exists()


def test_nothing_here_needs_a_device_library() -> None:
    modules = (
        "client_run completion_stream fairness http_exchange outcome popularity records serving "
        "settings slo trace trace_files workloads"
    )
    code = (
        "import importlib, json, sys\n"
        f"for name in {modules!r}.split(): importlib.import_module('bench.' + name)\n"
        "print(json.dumps(sorted(sys.modules)))"
    )
    loaded = call([sys.executable, "-c", code])
    assert loaded.returncode == 0, loaded.stderr
    found = {name.partition(".")[0] for name in json.loads(loaded.stdout)}
    assert not found & {"jax", "flax", "httpx", "httpx2", "sloraj", "serving"}
    assert "numpy" in found
