"""One open request on the frontend's side: tokens in, text increments out, choice by choice."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any

from sloraj.detokenizer import StopMatcher, make_detokenizer
from sloraj.errors import SlorajError
from sloraj.frontend_api import LogprobEntry, PositionLogprobs, RequestOutput
from sloraj.messages import TokenOutput
from sloraj.request import SamplingParams
from sloraj.tokenizer import Tokenizer

LOGPROB_FLOOR = -9999.0  # stands for minus infinity, which JSON cannot say


class ChoiceStream:
    """Text of one choice, and whether it is over."""

    def __init__(self, tokenizer: Tokenizer, prompt: list[int], params: SamplingParams) -> None:
        self._detokenizer = make_detokenizer(tokenizer, prompt)
        self._matcher = StopMatcher(params.stop, include=params.include_stop_str_in_output)
        self._min_tokens = params.min_tokens
        self.num_tokens = 0
        self.is_finished = False

    def push(self, token_ids: list[int]) -> tuple[str, int, str | None]:
        """(new text, tokens taken, stop string or None). What follows a stop string is left."""
        pieces: list[str] = []
        for num_taken, token_id in enumerate(token_ids, start=1):
            text = self._detokenizer.push(token_id)
            self.num_tokens += 1
            if self.num_tokens < self._min_tokens:
                pieces.append(text)  # too early to stop: not even looked at
                continue
            emitted, stop = self._matcher.push(text)
            pieces.append(emitted)
            if stop is not None:
                return "".join(pieces), num_taken, stop
        return "".join(pieces), len(token_ids), None

    def flush(self) -> tuple[str, str | None]:
        """What was held back, at the end; even that may complete a stop string."""
        emitted, stop = self._matcher.push(self._detokenizer.flush())
        return (emitted, stop) if stop is not None else (emitted + self._matcher.flush(), None)


class OpenRequest:
    """Turns the engine's messages about one request into calls of `on_output`, until closed."""

    def __init__(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        params: SamplingParams,
        tokenizer: Tokenizer,
        on_output: Callable[[RequestOutput], None],
    ) -> None:
        self.request_id = request_id
        self.was_cut_short = False  # a choice ended here, by a stop string, not in the engine
        self._tokenizer = tokenizer
        self._on_output = on_output
        self._num_prompt_tokens = len(prompt_token_ids)
        self._choices = [ChoiceStream(tokenizer, prompt_token_ids, params) for _ in range(params.n)]
        self._is_closed = False
        self._lock = threading.RLock()  # held while calling out, so that close() means silence

    @property
    def is_finished(self) -> bool:
        return self._is_closed or all(choice.is_finished for choice in self._choices)

    def close(self) -> None:
        """Nothing is put out any more; waits for an output under way in another thread."""
        with self._lock:
            self._is_closed = True

    def fail(self, error: SlorajError) -> None:
        """Put out the failure of the whole request, as its last output."""
        with self._lock:
            if not self._is_closed:
                self._is_closed = True
                self._on_output(
                    RequestOutput(
                        request_id=self.request_id,
                        num_prompt_tokens=self._num_prompt_tokens,
                        error=error,
                    )
                )

    def accept(self, message: TokenOutput) -> None:
        """Put out the text of new tokens; nothing for a choice that is over here already."""
        choice = self._choices[message.index]
        with self._lock:
            if not self._is_closed and not choice.is_finished:
                self._on_output(self._advance(choice, message))

    def _advance(self, choice: ChoiceStream, message: TokenOutput) -> RequestOutput:
        text, num_taken, stop = choice.push(message.token_ids)
        finish_reason: str | None = message.finish_reason
        stop_reason: str | int | None = message.stop_token_id
        if stop is None and finish_reason is not None:
            rest, stop = choice.flush()
            text += rest
        if stop is not None:
            self.was_cut_short |= finish_reason is None
            finish_reason, stop_reason = "stop", stop
        choice.is_finished = finish_reason is not None
        logprobs = message.logprobs
        return RequestOutput(
            request_id=self.request_id,
            index=message.index,
            text=text,
            token_ids=tuple(message.token_ids[:num_taken]),
            logprobs=None if logprobs is None else tuple(map(self._position, logprobs[:num_taken])),
            finish_reason=finish_reason,
            stop_reason=stop_reason,
            num_prompt_tokens=self._num_prompt_tokens,
            num_output_tokens=choice.num_tokens,
            adapter_version=message.adapter_version,
        )

    def _position(self, entry: Any) -> PositionLogprobs:
        token_id, logprob, top = entry
        return PositionLogprobs(
            chosen=self._entry(token_id, logprob), top=tuple(self._entry(*pair) for pair in top)
        )

    def _entry(self, token_id: int, logprob: float) -> LogprobEntry:
        return LogprobEntry(
            token_id=token_id,
            token=self._tokenizer.token_text(token_id),
            logprob=max(logprob, LOGPROB_FLOOR) if math.isfinite(logprob) else LOGPROB_FLOOR,
        )
