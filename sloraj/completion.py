"""Whole answers, as `Engine.generate` returns them, and how increments add up to one."""

from __future__ import annotations

import dataclasses

from sloraj.errors import SlorajError
from sloraj.frontend_api import PositionLogprobs, RequestOutput


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One of a prompt's `n` continuations."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None  # "stop" or "length"; None in a completion that failed
    stop_reason: str | int | None = None  # the stop string or stop token id that ended it
    logprobs: tuple[PositionLogprobs, ...] | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """The answer to one prompt. `text` and the like are those of the first choice.

    `error` is set only with `return_errors=True`; the choices then hold what had arrived before it.
    """

    adapter_id: str | None
    choices: tuple[Choice, ...]
    num_prompt_tokens: int
    adapter_version: str | None = None  # content hash of the adapter that answered
    error: SlorajError | None = None

    @property
    def text(self) -> str:
        return self.choices[0].text

    @property
    def texts(self) -> tuple[str, ...]:
        return tuple(choice.text for choice in self.choices)

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.choices[0].token_ids

    @property
    def finish_reason(self) -> str | None:
        return self.choices[0].finish_reason

    @property
    def logprobs(self) -> tuple[PositionLogprobs, ...] | None:
        return self.choices[0].logprobs


class CompletionBuilder:
    """Adds up the increments of one request. Used by one thread at a time."""

    def __init__(self, adapter_id: str | None, n: int) -> None:
        self._adapter_id = adapter_id
        self._parts: list[list[RequestOutput]] = [[] for _ in range(n)]
        self._num_unfinished = n
        self._last: RequestOutput | None = None
        self.error: SlorajError | None = None

    @property
    def is_finished(self) -> bool:
        return self._num_unfinished == 0 or self.error is not None

    def add(self, output: RequestOutput) -> None:
        if output.error is not None:
            self.fail(output.error)
            return
        self._last = output
        self._parts[output.index].append(output)
        self._num_unfinished -= output.finish_reason is not None

    def fail(self, error: SlorajError) -> None:
        self.error = error

    def build(self) -> Completion:
        last = self._last
        return Completion(
            adapter_id=self._adapter_id,
            choices=tuple(_join(index, parts) for index, parts in enumerate(self._parts)),
            num_prompt_tokens=last.num_prompt_tokens if last else 0,
            adapter_version=last.adapter_version if last else None,
            error=self.error,
        )


def _join(index: int, parts: list[RequestOutput]) -> Choice:
    has_logprobs = any(part.logprobs is not None for part in parts)
    return Choice(
        index=index,
        text="".join(part.text for part in parts),
        token_ids=tuple(token for part in parts for token in part.token_ids),
        finish_reason=parts[-1].finish_reason if parts else None,
        stop_reason=parts[-1].stop_reason if parts else None,
        logprobs=tuple(entry for part in parts for entry in part.logprobs or ())
        if has_logprobs
        else None,
    )
