"""Text while it arrives: however it is cut, the same text, whole code points, and the same stop."""

from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sloraj.detokenizer import MAX_HELD_TOKENS, StopMatcher, make_detokenizer
from sloraj.tokenizer import Tokenizer
from tests.sloraj.fake_core import byte_level, sentencepiece_like, word_pieces

BYTES = Tokenizer(byte_level(merges=(b"th", b"\xc3\xa9", b"\xf0\x9f")))
PIECES = Tokenizer(sentencepiece_like())
WORDS = Tokenizer(word_pieces())
SHORT = st.text(alphabet="ab", min_size=1, max_size=4)


def pieces_of(tokenizer: Tokenizer, ids: list[int], prompt: list[int] | None = None) -> list[str]:
    detokenizer = make_detokenizer(tokenizer, prompt or [])
    return [*(detokenizer.push(i) for i in ids), detokenizer.flush()]


@given(st.text())
@settings(max_examples=150, deadline=None)
def test_pieces_join_to_the_text_and_never_end_in_half_a_code_point(text: str) -> None:
    ids = BYTES.encode(text)
    pieces = pieces_of(BYTES, ids)
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@given(st.text().filter(lambda text: "▁" not in text))
@settings(max_examples=150, deadline=None)
def test_sentencepiece_text_that_continues_a_prompt_keeps_its_first_space(text: str) -> None:
    ids = PIECES.encode(text, add_special_tokens=False)
    expected = " " + text if text else ""
    assert "".join(pieces_of(PIECES, ids, prompt=[256, 261])) == expected


@given(st.binary(max_size=40))
@settings(max_examples=200, deadline=None)
def test_any_bytes_give_the_text_that_python_reads(data: bytes) -> None:
    expected = data.decode("utf-8", errors="replace")
    for tokenizer in (BYTES, PIECES):
        assert "".join(pieces_of(tokenizer, list(data))) == expected


def test_half_a_code_point_is_held_and_replaced_only_at_the_end() -> None:
    assert pieces_of(BYTES, [0xE2, 0x82, 0xAC]) == ["", "", "€", ""]
    assert pieces_of(BYTES, [0xE2, 0x82]) == ["", "", "\ufffd"]
    assert pieces_of(BYTES, [0xE2, 65]) == ["", "\ufffdA", ""]


def test_special_tokens_are_left_out_unless_asked_for() -> None:
    assert "".join(pieces_of(BYTES, [65, 257, 66])) == "AB"
    shown = make_detokenizer(BYTES, skip_special_tokens=False)
    assert shown.push(257) == "</s>"


@given(st.lists(st.sampled_from([1, 2, 3, 4, 5, 6, 7, 8]), max_size=30))
@settings(max_examples=150, deadline=None)
def test_any_other_decoder_gives_the_text_it_gives_at_once(ids: list[int]) -> None:
    prompt = [1, 2]
    whole = WORDS.library_decode(prompt + ids)
    assert WORDS.library_decode(prompt) + "".join(pieces_of(WORDS, ids, prompt)) == whole


def test_tokens_that_mean_u_fffd_are_not_held_for_ever() -> None:
    pieces = pieces_of(WORDS, [9] * (MAX_HELD_TOKENS + 1), prompt=[1])
    assert pieces[-2].count("\ufffd") == MAX_HELD_TOKENS + 1


def first_stop(text: str, stop: list[str]) -> tuple[int, str] | None:
    """Oracle: the first prefix that ends with a stop string, and the longest such string."""
    for end in range(1, len(text) + 1):
        ending = [s for s in stop if text[:end].endswith(s)]
        if ending:
            return end, max(ending, key=len)
    return None


def cut(text: str, places: list[int]) -> list[str]:
    edges = [0, *sorted(p for p in places if p <= len(text)), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(edges)]


@given(
    st.text(alphabet="ab", max_size=30), st.lists(SHORT, min_size=1, max_size=4),
    st.lists(st.integers(0, 30)), st.booleans(),
)  # fmt: skip
@settings(max_examples=400, deadline=None)
def test_a_stop_string_is_found_wherever_it_is_split(
    text: str, stop: list[str], places: list[int], include: bool
) -> None:
    matcher = StopMatcher(stop, include=include)
    emitted, found = "", None
    for part in cut(text, places):
        new, found = matcher.push(part)
        emitted += new
        if found:
            break
    expected = first_stop(text, stop)
    if expected is None:
        assert found is None
        assert emitted + matcher.flush() == text
    else:
        end, longest = expected
        assert found == longest
        assert emitted == text[: end if include else end - len(longest)]


@given(st.lists(SHORT, min_size=1, max_size=3), st.lists(st.text("abc", max_size=3), max_size=12))
@settings(max_examples=300, deadline=None)
def test_what_may_become_a_stop_string_is_held_and_nothing_more(
    stop: list[str], parts: list[str]
) -> None:
    matcher, seen, emitted = StopMatcher(stop), "", ""
    for part in parts:
        new, found = matcher.push(part)
        if found:
            return
        seen, emitted = seen + part, emitted + new
        held = seen[len(emitted) :]
        longest = max(
            (n for s in stop for n in range(len(s)) if n and seen.endswith(s[:n])), default=0
        )
        assert len(held) == longest


def test_without_stop_strings_nothing_is_held() -> None:
    matcher = StopMatcher(())
    assert matcher.push("abc") == ("abc", None)
    assert matcher.flush() == ""


@pytest.mark.parametrize("stop", ["é", "😀", "\n\n", "</s>"])
def test_a_stop_string_split_over_byte_tokens_is_found(stop: str) -> None:
    detokenizer, matcher = make_detokenizer(BYTES), StopMatcher([stop])
    out = ""
    for byte in f"before{stop}after".encode():
        text, found = matcher.push(detokenizer.push(byte))
        out += text
        if found:
            break
    assert re.fullmatch("before", out)
