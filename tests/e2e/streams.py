"""A stream that runs in the background of a test, and what has come of it."""

from __future__ import annotations

import json
import threading
from types import TracebackType
from typing import Any

from checkpoints.demo.tasks import prompt
from tests.e2e.served import Served, wait_until

NUM_CHOICES = 12  # of the 16 rows; they make every step slower, and the stream longer
LONG = {"max_tokens": 450, "n": NUM_CHOICES, "ignore_eos": True}  # some seconds


class Stream:
    """One streamed completion, read by a thread. `ended` holds after its last byte."""

    def __init__(self, demo: Served, model: str, text: str, **fields: Any) -> None:
        body = {"model": model, "prompt": prompt(text), "temperature": 0, "stream": True, **fields}
        self.texts = [""] * fields.get("n", 1)
        self.finish_reasons: list[str] = []
        self.events: list[Any] = []
        self.version: str | None = None
        self._demo, self._body = demo, body
        self._thread = threading.Thread(target=self._read)

    def __enter__(self) -> Stream:
        """Returns once the first tokens are here."""
        self._thread.start()
        wait_until(lambda: bool(self.events), 60, "the stream has begun")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.wait()

    @property
    def ended(self) -> bool:
        return not self._thread.is_alive()

    def wait(self) -> None:
        self._thread.join(120)
        assert self.ended, "the stream hangs"

    def _read(self) -> None:
        url = f"{self._demo.url}/v1/completions"
        with self._demo.http.stream("POST", url, json=self._body) as answer:
            assert answer.status_code == 200, answer.read()
            self.version = answer.headers.get("x-sloraj-adapter-version")
            for line in answer.iter_lines():
                if line:
                    self._take(line.removeprefix("data: "))

    def _take(self, data: str) -> None:
        event = data if data == "[DONE]" else json.loads(data)
        if event != "[DONE]":
            for choice in event.get("choices", ()):
                self.texts[choice["index"]] += choice["text"]
                if choice["finish_reason"]:
                    self.finish_reasons.append(choice["finish_reason"])
        self.events.append(event)
