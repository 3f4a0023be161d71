"""Text to token ids and back, over a `tokenizer.json` read with the `tokenizers` library.

Everything that makes text here (decode, token_text, the detokenizer) joins the bytes that tokens
stand for and then reads UTF-8; see `sloraj.token_bytes`. Decoders that do not work so are left to
the library.
"""

from __future__ import annotations

import os
from pathlib import Path

import tokenizers

from sloraj.errors import ConfigError, InvalidRequest
from sloraj.token_bytes import Disguise, loses_no_bytes


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer of a model directory (or a `tokenizer.json` itself). Raises ConfigError.

    transformers is imported only for a directory without a tokenizer.json, and only to convert one
    of the older formats from local files.
    """
    directory = Path(path)
    file = directory if directory.is_file() else directory / "tokenizer.json"
    if not directory.exists():
        raise ConfigError(
            f"model: got {str(directory)!r}, allowed: an existing directory", param="model"
        )
    try:
        if file.is_file():
            return Tokenizer(file.read_text(encoding="utf-8"))
        return Tokenizer(_convert_older_format(directory))
    except ConfigError:
        raise
    except (
        Exception
    ) as error:  # the libraries raise bare Exception, OSError, ValueError, ImportError
        raise ConfigError(
            f"tokenizer: cannot read one from {str(directory)!r} ({error}), allowed: a directory "
            "with a tokenizer.json, or files that transformers converts to one",
            param="model",
        ) from error


def _convert_older_format(directory: Path) -> str:
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(
        str(directory), local_files_only=True, trust_remote_code=False
    )
    backend: tokenizers.Tokenizer = loaded.backend_tokenizer
    return str(backend.to_str())


class Tokenizer:
    """Implements `TokenizerApi`. Safe to use from many threads.

    Special tokens written out in a text are plain text unless `allow_special`. Two library objects
    are kept, because that choice is a property of the object. bos (or whatever the post-processor
    adds) is added by `add_special_tokens` exactly as the tokenizer's own post-processor does it.
    """

    def __init__(self, tokenizer_json: str) -> None:
        self._plain = _without_limits(tokenizer_json)
        self._plain.encode_special_tokens = True
        self._special = _without_limits(tokenizer_json)
        vocabulary: dict[str, int] = self._plain.get_vocab(with_added_tokens=True)
        added = self._plain.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self.vocab_size = 1 + max(vocabulary.values(), default=-1)
        self._disguise = Disguise(self._plain.decoder)
        self._longest = max((len(piece.encode()) for piece in vocabulary), default=1)
        self._is_lossless = loses_no_bytes(tokenizer_json)

    @property
    def has_token_bytes(self) -> bool:
        """Whether text is the joined bytes of its tokens, so that `token_bytes` may be used."""
        return self._disguise.kind != "other"

    @property
    def max_token_bytes(self) -> int | None:
        """No token stands for more UTF-8 bytes than this; None where that cannot be promised."""
        return self._longest if self._is_lossless else None

    def encode(
        self, text: str, *, add_special_tokens: bool = True, allow_special: bool = False
    ) -> list[int]:
        """Token ids of a text. Raises InvalidRequest for lone surrogates."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequest(
                f"prompt: got a lone surrogate at character {error.start}, allowed: Unicode text",
                param="prompt",
            ) from None
        chosen = self._special if allow_special else self._plain
        ids: list[int] = chosen.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = True) -> str:
        """Text of a whole sequence. What is not UTF-8 reads as U+FFFD, unknown ids as nothing."""
        if not self.has_token_bytes:
            return self.library_decode(token_ids, skip_special_tokens=skip_special_tokens)
        kept = [i for i in token_ids if not (skip_special_tokens and i in self.special_ids)]
        joined = b"".join(map(self.token_bytes, kept))
        if self._disguise.strips_first_space:
            joined = joined.removeprefix(b" ")
        return joined.decode("utf-8", errors="replace")

    def library_decode(self, token_ids: list[int], *, skip_special_tokens: bool = True) -> str:
        """Text of a whole sequence by the decoder of tokenizer.json itself."""
        text: str = self._plain.decode(token_ids, skip_special_tokens=skip_special_tokens)
        return text

    def token_text(self, token_id: int) -> str:
        """One token's text as it reads alone, special tokens written out."""
        if self.has_token_bytes:
            return self.token_bytes(token_id).decode("utf-8", errors="replace")
        return self._plain.id_to_token(token_id) or ""

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token adds to a text; empty for an id outside the vocabulary."""
        piece = self._plain.id_to_token(token_id)
        return b"" if piece is None else self._disguise.undo(piece)


def _without_limits(tokenizer_json: str) -> tokenizers.Tokenizer:
    loaded = tokenizers.Tokenizer.from_str(tokenizer_json)
    loaded.no_truncation()
    loaded.no_padding()
    return loaded
