"""The bodies of the two completion endpoints: how increments of the engine are told to a client.

A `Reply` belongs to one HTTP request. `chunks` gives the stream's events for one increment;
`add` collects increments and `whole` gives the one body of a request that does not stream.
"""

from __future__ import annotations

import dataclasses
import math
import time
from typing import Any

from sloraj.frontend_api import LogprobEntry, PositionLogprobs, RequestOutput

FLOOR_LOGPROB = -9999.0  # stands for minus infinity, which JSON cannot say


@dataclasses.dataclass(slots=True)
class Choice:
    """What one choice has produced so far; the texts and logprobs are kept only for a whole
    body.
    """

    text: str = ""
    token_ids: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[PositionLogprobs] = dataclasses.field(default_factory=list)
    num_output_tokens: int = 0
    num_chars: int = 0  # of the tokens reported with logprobs
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    has_started: bool = False


@dataclasses.dataclass(slots=True, kw_only=True)
class Usage:
    """Token counts of one request."""

    prompt_tokens: int
    completion_tokens: int

    def body(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": 0},
        }


class Reply:
    """What both endpoints share: the head of every body, and the bookkeeping of choices."""

    id_prefix: str
    object_name: str
    chunk_name: str

    def __init__(
        self, request_id: str, model: str, *, num_choices: int, n: int, return_token_ids: bool
    ) -> None:
        self.id = f"{self.id_prefix}-{request_id}"
        self.model = model
        self.created = int(time.time())
        self.num_prompt_tokens = 0
        self.adapter_version: str | None = None
        self.choices = [Choice() for _ in range(num_choices)]
        self._n = n
        self._return_token_ids = return_token_ids

    @property
    def fingerprint(self) -> str:
        """The adapter version that answers; a reload under the same name changes it."""
        return self.adapter_version or "base"

    @property
    def usage(self) -> Usage:
        return Usage(
            prompt_tokens=self.num_prompt_tokens,
            completion_tokens=sum(choice.num_output_tokens for choice in self.choices),
        )

    def _head(self, object_name: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": object_name,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": choices,
        }

    def _advance(self, prompt_index: int, output: RequestOutput) -> tuple[int, Choice]:
        index = prompt_index * self._n + output.index
        choice = self.choices[index]
        choice.num_output_tokens = max(choice.num_output_tokens, output.num_output_tokens)
        choice.finish_reason, choice.stop_reason = output.finish_reason, output.stop_reason
        self.adapter_version = output.adapter_version or self.adapter_version
        return index, choice

    def add(self, prompt_index: int, output: RequestOutput) -> None:
        """Collect one increment for the whole body."""
        _, choice = self._advance(prompt_index, output)
        choice.text += output.text
        choice.token_ids.extend(output.token_ids)
        choice.logprobs.extend(output.logprobs or ())

    def whole(self) -> dict[str, Any]:
        choices = [self._choice(index, choice) for index, choice in enumerate(self.choices)]
        return {**self._head(self.object_name, choices), "usage": self.usage.body()}

    def chunks(
        self, prompt_index: int, output: RequestOutput, *, with_usage: bool
    ) -> list[dict[str, Any]]:
        """The stream's events for one increment."""
        index, choice = self._advance(prompt_index, output)
        deltas = self._deltas(index, choice, output)
        choice.has_started = True
        choice.num_chars += sum(len(entry.chosen.token) for entry in output.logprobs or ())
        bodies = [self._head(self.chunk_name, [delta]) for delta in deltas]
        if with_usage:
            for body in bodies:
                body["usage"] = self.usage.body()
        return bodies

    def usage_chunk(self) -> dict[str, Any]:
        return {**self._head(self.chunk_name, []), "usage": self.usage.body()}

    def _ends(self, choice: Choice, token_ids: list[int] | tuple[int, ...]) -> dict[str, Any]:
        """The fields that close every choice."""
        ends: dict[str, Any] = {
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }
        if self._return_token_ids:
            ends["token_ids"] = list(token_ids)
        return ends

    def _choice(self, index: int, choice: Choice) -> dict[str, Any]:
        raise NotImplementedError

    def _deltas(self, index: int, choice: Choice, output: RequestOutput) -> list[dict[str, Any]]:
        raise NotImplementedError


class CompletionReply(Reply):
    """Bodies of /v1/completions. `echoes` holds each prompt's text where it is to be repeated."""

    id_prefix, object_name, chunk_name = "cmpl", "text_completion", "text_completion"

    def __init__(self, *args: Any, echoes: list[str] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._echoes = echoes

    def _echo(self, index: int) -> str:
        return self._echoes[index // self._n] if self._echoes else ""

    def _choice(self, index: int, choice: Choice) -> dict[str, Any]:
        return {
            "index": index,
            "text": self._echo(index) + choice.text,
            "logprobs": _completion_logprobs(choice.logprobs, 0),
            **self._ends(choice, choice.token_ids),
        }

    def _deltas(self, index: int, choice: Choice, output: RequestOutput) -> list[dict[str, Any]]:
        return [
            {
                "index": index,
                "text": output.text if choice.has_started else self._echo(index) + output.text,
                "logprobs": _completion_logprobs(output.logprobs, choice.num_chars),
                **self._ends(choice, output.token_ids),
            }
        ]


class ChatReply(Reply):
    """Bodies of /v1/chat/completions."""

    id_prefix, object_name, chunk_name = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def _choice(self, index: int, choice: Choice) -> dict[str, Any]:
        return {
            "index": index,
            "message": {"role": "assistant", "content": choice.text},
            "logprobs": _chat_logprobs(choice.logprobs),
            **self._ends(choice, choice.token_ids),
        }

    def _deltas(self, index: int, choice: Choice, output: RequestOutput) -> list[dict[str, Any]]:
        deltas = []
        if not choice.has_started:
            delta = {"role": "assistant", "content": ""}
            deltas.append({"index": index, "delta": delta, "logprobs": None, "finish_reason": None})
        deltas.append(
            {
                "index": index,
                "delta": {"content": output.text},
                "logprobs": _chat_logprobs(output.logprobs),
                **self._ends(choice, output.token_ids),
            }
        )
        return deltas


def finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else FLOOR_LOGPROB


def _completion_logprobs(
    positions: list[PositionLogprobs] | tuple[PositionLogprobs, ...] | None, offset: int
) -> dict[str, Any] | None:
    """The parallel lists of the older format; `offset` is the first token's place in the text."""
    if not positions:
        return None
    offsets = []
    for position in positions:
        offsets.append(offset)
        offset += len(position.chosen.token)
    top = []
    for position in positions:
        # the first of two tokens that read the same is the more probable one: it is kept
        named: dict[str, float] = {}
        for entry in (*position.top, position.chosen):
            named.setdefault(entry.token, finite(entry.logprob))
        top.append(named)
    return {
        "tokens": [position.chosen.token for position in positions],
        "token_logprobs": [finite(position.chosen.logprob) for position in positions],
        "top_logprobs": top,
        "text_offset": offsets,
    }


def _chat_logprobs(
    positions: list[PositionLogprobs] | tuple[PositionLogprobs, ...] | None,
) -> dict[str, Any] | None:
    if not positions:
        return None

    def told(entry: LogprobEntry) -> dict[str, Any]:
        return {
            "token": entry.token,
            "logprob": finite(entry.logprob),
            "bytes": list(entry.token.encode("utf-8", "replace")),
        }

    return {
        "content": [
            {**told(position.chosen), "top_logprobs": [told(entry) for entry in position.top]}
            for position in positions
        ]
    }
