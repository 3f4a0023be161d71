"""Tokens to text while they arrive: whole code points, and stop strings wherever they are split.

One `Detokenizer` and one `StopMatcher` belong to each choice of a request.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Protocol

from sloraj.tokenizer import Tokenizer

CONTEXT_TOKENS = 6  # of the prompt: enough for a decoder that looks back to get spaces right
MAX_HELD_TOKENS = 16  # a code point takes 4 byte tokens; more that end in U+FFFD really mean U+FFFD


class Detokenizer(Protocol):
    """Text of tokens pushed one by one: pieces of whole code points that join to the whole text."""

    def push(self, token_id: int) -> str:
        """The text that this token completes, perhaps none."""

    def flush(self) -> str:
        """What is still held when no more tokens come: U+FFFD for a code point never completed."""


def make_detokenizer(
    tokenizer: Tokenizer, prompt_token_ids: Sequence[int] = (), *, skip_special_tokens: bool = True
) -> Detokenizer:
    """A detokenizer for text that continues a prompt, so that a first space is kept."""
    if tokenizer.has_token_bytes:
        return _ByteDetokenizer(tokenizer, skip_special_tokens)
    return _SuffixDetokenizer(tokenizer, prompt_token_ids, skip_special_tokens)


class _ByteDetokenizer:
    """Joins the bytes of tokens and reads UTF-8 incrementally."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset[int]()
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        return self._utf8.decode(self._tokenizer.token_bytes(token_id))

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class _SuffixDetokenizer:
    """For any other decoder: decodes the last few tokens again and emits what they add.

    `ids[start:]` is decoded each time; `ids[start:shown]` is the part whose text was emitted, kept
    as context because a decoder may write a token differently at the start of a text.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], skip_special_tokens: bool
    ) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._ids = list(prompt_token_ids[-CONTEXT_TOKENS:])
        self._start = 0
        self._shown = len(self._ids)

    def _text(self, stop: int) -> str:
        return self._tokenizer.library_decode(
            self._ids[self._start : stop], skip_special_tokens=self._skip
        )

    def push(self, token_id: int) -> str:
        self._ids.append(token_id)
        is_held = len(self._ids) - self._shown <= MAX_HELD_TOKENS
        if is_held and self._text(len(self._ids)).endswith("\ufffd"):
            return ""
        return self.flush()

    def flush(self) -> str:
        before, after = self._text(self._shown), self._text(len(self._ids))
        if len(after) > len(before):
            self._start, self._shown = self._shown, len(self._ids)
        return after[len(before) :]


class StopMatcher:
    """Finds the first stop string to be completed, in text that arrives in pieces of any size.

    Of two that are completed by the same character the longer counts. Text that may yet become part
    of a stop string is held back. With `include`, the stop string itself is emitted too.
    """

    def __init__(self, stop: Sequence[str], *, include: bool = False) -> None:
        self._stop = tuple(stop)
        self._include = include
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """(text to emit, stop string found or None). Nothing may be pushed after a stop string."""
        if not self._stop:
            return text, None
        text = self._held + text
        found = [(at + len(s), -len(s), s) for s in self._stop if (at := text.find(s)) >= 0]
        if found:
            end, _, stop = min(found)
            self._held = ""
            return text[: end if self._include else end - len(stop)], stop
        num_held = max(_overlap(text, s) for s in self._stop)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held], None

    def flush(self) -> str:
        """What is held, once no more text comes."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`, less than the whole."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if stop.startswith(text[len(text) - n :])), 0)
