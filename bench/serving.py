"""Sends a trace to any server of OpenAI's completions API, this project's, vLLM or SGLang, and
measures what its clients see.

    python -m bench.workloads --adapters 200 --rate 10 --duration 120 --out trace.jsonl
    python -m bench.serving --url http://127.0.0.1:8000 --trace trace.jsonl \\
        --model-template "lora-{i}" --vocab-size 32000 --device "NVIDIA H200" --out serving.jsonl
    python -m bench.slo serving.jsonl --slo 6 1

writes one record a request (`bench.outcome`) as each ends and prints the summary of `bench.slo`.
Prompts are random token ids, the same ones for the same trace and seed; answers stream, greedily,
past the end-of-text token. Ctrl-C stops sending and waits for what is open, a second one gives
that up; `--resume` sends what has no record yet. The times of a resumed run are those of a server
that had an empty queue in the middle: say so, or run again.

The client is asyncio on plain sockets: every token is timed where its bytes are read, and
thousands of streams cost one callback an event. "sent late by" in the summary says how well it
kept the pace; if that is not small beside the first-token times, the client was the bottleneck,
or `--max-open` was.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import signal
import sys
from pathlib import Path
from typing import Any

from bench.client_run import Asking, ClientRun, listed_models
from bench.http_exchange import BadResponse, Server
from bench.records import RecordError, RecordFile, header
from bench.settings import SLO_S
from bench.slo import summarise, table
from bench.trace import Trace, digest
from bench.trace_files import read_trace

SPARE_FILES = 64  # descriptors beside those of the connections
INTERRUPTED = 130  # the exit status of a process that Ctrl-C ended


async def measure(args: argparse.Namespace, trace: Trace, server: Server) -> ClientRun:
    """Run what is left of the trace. Raises OSError, BadResponse, or RecordError."""
    server = await server.resolved()
    api_key = args.api_key_file.read_text().strip() if args.api_key_file else None
    base_model = args.base_model
    if base_model is None:
        head = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        base_model = (await listed_models(server, head))[0]
    asking = Asking(
        model_template=args.model_template, base_model=base_model, vocab_size=args.vocab_size,
        seed=args.seed, ignore_eos=not args.keep_eos, extra=args.extra, api_key=api_key,
    )  # fmt: skip
    start = RecordFile.resume if args.resume else RecordFile.create
    with start(args.out, _header(args, trace, base_model)) as file:
        run = ClientRun(
            server, trace, asking, file, max_open=args.max_open, timeout_s=args.timeout,
            keeps_moments=args.keep_moments, progress=None if args.quiet else sys.stderr,
        )  # fmt: skip
        loop = asyncio.get_running_loop()
        for name in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(name, run.interrupt)
        await run.run()
    return run


def _header(args: argparse.Namespace, trace: Trace, base_model: str) -> dict[str, Any]:
    settings = {
        "trace": args.trace.name,
        "trace_digest": digest(trace),
        "num_requests": len(trace),
        "model_template": args.model_template,
        "base_model": base_model,
        "vocab_size": args.vocab_size,
        "ignore_eos": not args.keep_eos,
        "extra": args.extra,
        "max_open": args.max_open,
        "timeout_s": args.timeout,
    }
    made = header(
        bench="serving", device=args.device, settings=settings, seed=args.seed,
        commit_name=args.commit,
    )  # fmt: skip
    return made | {"url": args.url}


def _check(args: argparse.Namespace, trace: Trace) -> None:
    """Refuse what cannot work, and ask for enough open files. Raises ValueError."""
    if "{i}" not in args.model_template and len({r.adapter for r in trace} - {None}) > 1:
        raise ValueError(f"--model-template: got {args.model_template!r}, allowed: with {{i}}")
    wanted = args.max_open + SPARE_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        if hard != resource.RLIM_INFINITY and hard < wanted:
            raise ValueError(f"--max-open: {wanted} open files needed, allowed: {hard} (ulimit -n)")
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def main() -> int:
    args = _parse()
    try:
        trace = read_trace(args.trace)
        server = Server.parse(args.url)
        _check(args, trace)
    except (OSError, ValueError) as exc:
        raise SystemExit(f"bench.serving: {exc}") from exc
    try:
        run = asyncio.run(measure(args, trace, server))
    except (OSError, BadResponse, RecordError) as exc:
        raise SystemExit(f"bench.serving: {exc or type(exc).__name__}") from exc
    if run.done:
        print(table(summarise(run.done, slos_s=args.slo)))
    missing = len(trace) - len(run.done)
    if missing:
        print(
            f"INTERRUPTED    {missing} of {len(trace)} requests have no record; --resume sends them"
        )
    return INTERRUPTED if missing else 0


def _extra(text: str) -> dict[str, Any]:
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError("not an object")
    return found


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError("not above 0")
    return number


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--url", default="http://127.0.0.1:8000", help="of the server, without /v1/completions")
    add("--trace", type=Path, required=True, help="of bench.workloads")
    add("--out", type=Path, required=True, help="the records, JSONL")
    add("--resume", action="store_true", help="go on with the records that are there")
    add("--model-template", default="adapter-{i}", help="an adapter's name; {i} is its number")
    add("--base-model", help="its name; the first of /v1/models if left out")
    add("--vocab-size", type=_positive, default=32000, help="prompts are ids below it")
    add("--seed", type=int, default=42, help="of the prompts")
    add("--max-open", type=_positive, default=4096, help="connections at once")
    add("--timeout", type=float, default=3600.0, help="seconds for one request")
    add("--keep-eos", action="store_true", help="let an answer end where the model ends it")
    add("--keep-moments", action="store_true", help="record when every event came, too")
    add("--extra", type=_extra, default={}, help="more fields of the body, a JSON object")
    add("--api-key-file", type=Path, help="a file that holds the bearer token")
    add("--slo", type=float, nargs="+", default=[SLO_S, 1.0], help="seconds to the first token")
    add("--device", default="unknown", help="of the server, for the records")
    add("--commit", help="where the tree is not a repository")
    add("--quiet", action="store_true", help="no progress")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
