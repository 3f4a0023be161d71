"""Text to ids: special tokens in text are text, bos is the post-processor's, length is bounded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from sloraj.errors import ConfigError, InvalidRequest
from sloraj.tokenizer import Tokenizer, load_tokenizer
from tests.sloraj.fake_core import (
    byte_alphabet,
    byte_level,
    sentencepiece_like,
    word_pieces,
    write_model,
)

BYTES = Tokenizer(byte_level(merges=(b"th", b"\xc3\xa9", b"  ")))
PIECES = Tokenizer(sentencepiece_like())
WORDS = Tokenizer(word_pieces())


@pytest.mark.parametrize("tokenizer", [BYTES, PIECES], ids=["bytes", "pieces"])
def test_special_tokens_in_user_text_are_plain_text_unless_allowed(tokenizer: Tokenizer) -> None:
    plain = tokenizer.encode("a</s>", add_special_tokens=False)
    assert 257 not in plain
    assert tokenizer.decode(plain) == "a</s>"
    assert tokenizer.encode("a</s>", add_special_tokens=False, allow_special=True)[-1] == 257


def test_bos_is_added_iff_the_post_processor_adds_it() -> None:
    assert BYTES.encode("a") == [97]
    with_bos = Tokenizer(byte_level(adds_bos=True))
    assert with_bos.encode("a") == [256, 97]
    assert with_bos.encode("a", add_special_tokens=False) == [97]


@given(st.text())
@settings(max_examples=100, deadline=None)
def test_decode_undoes_encode(text: str) -> None:
    assert BYTES.decode(BYTES.encode(text)) == text
    if "▁" not in text:  # SentencePiece itself cannot tell its space mark from a space
        assert PIECES.decode(PIECES.encode(text)) == text


@given(st.lists(st.integers(0, 299)))
@settings(max_examples=200, deadline=None)
def test_decode_equals_the_librarys(ids: list[int]) -> None:
    assert BYTES.decode(ids) == BYTES.library_decode(ids)
    if "\ufffd" not in PIECES.decode(ids):  # of a broken run the library replaces sound parts too
        assert PIECES.decode(ids) == PIECES.library_decode(ids)


@given(st.text(alphabet=st.sampled_from("th é<s>▁\n😀"), max_size=200))
@settings(max_examples=100, deadline=None)
def test_no_token_covers_more_bytes_than_the_bound(text: str) -> None:
    for tokenizer in (BYTES, PIECES):
        bound = tokenizer.max_token_bytes
        assert bound is not None
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert len(text.encode()) <= len(ids) * bound


def test_a_tokenizer_that_may_drop_text_promises_no_bound() -> None:
    assert WORDS.max_token_bytes is None
    state = json.loads(byte_level())
    for change in (
        {"normalizer": {"type": "Strip", "strip_left": True, "strip_right": True}},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"added_tokens": [state["added_tokens"][0] | {"lstrip": True}]},
    ):
        assert Tokenizer(json.dumps(state | change)).max_token_bytes is None


def test_one_token_reads_alone() -> None:
    assert BYTES.token_text(256) == "<s>"
    assert BYTES.token_text(0xC3) == "\ufffd"
    assert BYTES.token_text(259) == "é"
    assert PIECES.token_text(0x41) == "A"
    assert PIECES.token_text(271) == " he"
    assert WORDS.token_text(3) == "##s"


def test_ids_outside_the_vocabulary_read_as_nothing() -> None:
    assert BYTES.decode([65, 5000, 66]) == "AB"
    assert BYTES.token_text(5000) == ""


def test_lone_surrogates_are_an_invalid_request() -> None:
    with pytest.raises(InvalidRequest, match="lone surrogate at character 1") as caught:
        BYTES.encode("a\ud800")
    assert caught.value.param == "prompt"


def test_truncation_and_padding_stored_in_the_file_are_not_applied() -> None:
    stored = tokenizers.Tokenizer.from_str(byte_level())
    stored.enable_truncation(3)
    stored.enable_padding(length=8)
    tokenizer = Tokenizer(stored.to_str())
    assert len(tokenizer.encode("abcdef")) == 6
    assert len(tokenizer.encode("a")) == 1


def test_loads_from_a_directory_or_a_file(tmp_path: Path) -> None:
    write_model(tmp_path)
    assert load_tokenizer(tmp_path).encode("a") == [97]
    assert load_tokenizer(tmp_path / "tokenizer.json").encode("a") == [97]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_an_older_format_is_converted_by_transformers(tmp_path: Path) -> None:
    alphabet = {char: byte for byte, char in enumerate(byte_alphabet())}
    vocabulary = alphabet | {"<|endoftext|>": 256, "th": 257}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nt h\n")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("the") == [257, ord("e")]
    assert tokenizer.decode([257, 0xC3, 0xA9]) == "thé"


def test_what_is_no_tokenizer_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"tokenizer: cannot read one from .*allowed") as caught:
        load_tokenizer(tmp_path)
    assert caught.value.param == "model"


def test_a_directory_that_does_not_exist_is_refused_as_that(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model: got .*nothing', allowed: an existing") as caught:
        load_tokenizer(tmp_path / "nothing")
    assert caught.value.param == "model"


def test_a_directory_without_tokenizer_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="tokenizer: cannot read one"):
        load_tokenizer(tmp_path)
