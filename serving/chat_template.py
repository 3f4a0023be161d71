"""Finds the model's chat template and renders it off the event loop, sandboxed and within a time
limit.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import logging
import queue
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from checkpoints.errors import CheckpointError
from checkpoints.tokenizer_files import read_chat_templates
from serving import template_worker
from sloraj.errors import ConfigError, InvalidRequest

log = logging.getLogger("serving")

NUM_WORKERS = 2
_READ_BYTES = 1 << 16


def find_template(model_path: str) -> str | None:
    """The template in a Hugging Face directory that is used unless another is asked for; None if
    there is none. Raises ConfigError for files that cannot be read.
    """
    try:
        return read_chat_templates(model_path).get("default")
    except (CheckpointError, OSError) as exc:
        raise ConfigError(f"chat template of {model_path}: {exc}") from exc


class _Worker:
    """One rendering process, used by one thread at a time."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", template_worker.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def ask(self, job: bytes, timeout_s: float) -> dict[str, Any]:
        """Raises TimeoutError or OSError; the worker is of no use after either."""
        assert self._process.stdin is not None and self._process.stdout is not None
        deadline = time.monotonic() + timeout_s
        self._process.stdin.write(job + b"\n")
        self._process.stdin.flush()
        answer, source = bytearray(), self._process.stdout
        while not answer.endswith(b"\n"):
            left_s = deadline - time.monotonic()
            if left_s <= 0 or not select.select([source], [], [], left_s)[0]:
                raise TimeoutError
            piece = source.read1(_READ_BYTES)  # type: ignore[attr-defined]
            if not piece:
                raise OSError("the template process ended")
            answer += piece
        answered: dict[str, Any] = json.loads(answer)
        return answered

    def kill(self) -> None:
        """Stop it; safe while another thread waits for its answer."""
        self._process.kill()

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:  # a job it never read was still in the pipe's buffer
                    log.debug("the template process ended with a job unread")


class ChatTemplates:
    """The server's one template and the processes that render it. `stop` ends them."""

    def __init__(self, override: str | None, timeout_s: float) -> None:
        self._override = _read_override(override)
        self._timeout_s = timeout_s
        self._found: dict[str, str | None] = {}
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._all: set[_Worker] = set()
        self._executor = concurrent.futures.ThreadPoolExecutor(NUM_WORKERS, "chat-template")

    def template(self, model_path: str) -> str:
        """Raises InvalidRequest when the model has none."""
        if self._override is not None:
            return self._override
        if model_path not in self._found:
            self._found[model_path] = find_template(model_path)
        template = self._found[model_path]
        if template is None:
            raise InvalidRequest(
                "messages: this model has no chat template (looked for chat_template.jinja, and "
                "chat_template in tokenizer_config.json); use /v1/completions, or start "
                "the server with --chat-template FILE",
                param="messages",
            )
        return template

    async def render(self, model_path: str, values: dict[str, Any]) -> str:
        """The prompt's text. Raises InvalidRequest for what the template refuses, or takes too long
        over.
        """
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor, self._render, model_path, values)

    def _render(self, model_path: str, values: dict[str, Any]) -> str:
        job = json.dumps({"template": self.template(model_path), "values": values}).encode()
        try:
            worker = self._idle.get_nowait()
        except queue.Empty:
            worker = _Worker()
            self._all.add(worker)
        try:
            answer = worker.ask(job, self._timeout_s)
        except TimeoutError as exc:
            self._end(worker)
            raise InvalidRequest(
                f"messages: the chat template ran longer than {self._timeout_s:g} s",
                param="messages",
            ) from exc
        except (OSError, ValueError) as exc:  # it died, or answered half a line
            self._end(worker)
            raise InvalidRequest("messages: the chat template failed", param="messages") from exc
        self._idle.put(worker)
        if "error" in answer:
            raise InvalidRequest(
                f"messages: the chat template refuses them: {answer['error']}", param="messages"
            )
        return str(answer["text"])

    def _end(self, worker: _Worker) -> None:
        self._all.discard(worker)
        worker.end()

    def stop(self) -> None:
        """End every process; what is being rendered fails, and its thread clears up after it."""
        self._executor.shutdown(wait=False, cancel_futures=True)
        for worker in list(self._all):
            worker.kill()
        self._executor.shutdown(wait=True)
        for worker in list(self._all):
            self._end(worker)


def _read_override(path: str | None) -> str | None:
    if path is None:
        return None
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as exc:
        raise ConfigError(f"chat_template: {path}: {exc}", param="chat_template") from exc
