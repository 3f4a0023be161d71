"""The bytes that a token stands for, read off the components of a `tokenizer.json`.

The tokens of nearly every model are bytes in disguise: byte-level BPE writes each byte as a
printable character, SentencePiece BPE writes a space as "▁" and a lone byte as "<0x0A>". `Disguise`
undoes that.
"""

from __future__ import annotations

import json
import re
from typing import Any

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_level_alphabet() -> dict[str, int]:
    """Printable character -> byte, as GPT-2's byte-level BPE assigns them.

    Printable bytes of Latin-1 stand for themselves; the rest take the characters from 256 up, in
    order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    pairs = [(chr(b), b) for b in printable]
    return dict(pairs + [(chr(256 + n), b) for n, b in enumerate(others)])


_BYTE_OF = _byte_level_alphabet()


class Disguise:
    """How a decoder, an object of the `tokenizers` library, turns one piece into bytes.

    kind: "byte_level"; "marked" (a space mark, perhaps byte tokens); "other", where `undo` must not
    be used. strips_first_space: the decoder drops one space at the start of a whole text.
    """

    def __init__(self, decoder: Any) -> None:
        state = json.loads(decoder.__getstate__()) if decoder is not None else {}
        steps = state.get("decoders", [state])
        kinds = [step.get("type") for step in steps]
        self.kind = "other"
        self.strips_first_space = False
        self._has_byte_tokens = "ByteFallback" in kinds
        self._replacements: list[tuple[str, str]] = []
        if kinds == ["ByteLevel"]:
            self.kind = "byte_level"
        elif kinds == ["Metaspace"]:
            self.kind = "marked"
            self.strips_first_space = steps[0].get("prepend_scheme") != "never"
            self._replacements = [(steps[0]["replacement"], " ")]
        elif _acts_on_each_token(steps):
            self.kind = "marked"
            self.strips_first_space = "Strip" in kinds
            self._replacements = [
                (s["pattern"]["String"], s["content"]) for s in steps if s["type"] == "Replace"
            ]

    def undo(self, piece: str) -> bytes:
        """The bytes of a piece. One outside the byte-level alphabet stands for itself."""
        if self.kind == "byte_level":
            known = [_BYTE_OF[character] for character in piece if character in _BYTE_OF]
            return bytes(known) if len(known) == len(piece) else piece.encode()
        if self._has_byte_tokens and (match := _BYTE_TOKEN.fullmatch(piece)):
            return bytes([int(match[1], 16)])
        for old, new in self._replacements:
            piece = piece.replace(old, new)
        return piece.encode()


def _acts_on_each_token(steps: list[dict[str, Any]]) -> bool:
    """Replace and ByteFallback on single tokens, Fuse, then at most one space off the start."""
    kinds = [step.get("type") for step in steps]
    if "Fuse" not in kinds:
        return False
    fuse = kinds.index("Fuse")
    before, after = steps[:fuse], steps[fuse + 1 :]
    return all(
        s["type"] == "ByteFallback" or (s["type"] == "Replace" and "String" in s["pattern"])
        for s in before
    ) and all(
        s["type"] == "Strip" and (s["content"], s["start"], s["stop"]) == (" ", 1, 0) for s in after
    )


def loses_no_bytes(tokenizer_json: str) -> bool:
    """Whether every byte of a text is sure to be covered by a token, so that length can be bounded.

    False is the safe answer: for a normalizer or pre-tokenizer that may drop or shorten text, added
    tokens that take spaces with them, or a vocabulary that cannot spell every byte.
    """
    state = json.loads(tokenizer_json)
    if any(token["lstrip"] or token["rstrip"] for token in state["added_tokens"]):
        return False
    normalizers, pre_tokenizers = (
        _steps(state.get("normalizer"), "normalizers"),
        _steps(state.get("pre_tokenizer"), "pretokenizers"),
    )
    if not all(n["type"] == "Prepend" or _lengthens(n) for n in normalizers):
        return False
    if not all(
        p["type"] in ("ByteLevel", "Digits", "Metaspace")
        or (p["type"] == "Split" and p["behavior"] != "Removed")
        for p in pre_tokenizers
    ):
        return False
    vocabulary = state["model"].get("vocab", {})
    if state["model"].get("byte_fallback"):
        return all(f"<0x{byte:02X}>" in vocabulary for byte in range(256))
    is_byte_level = any(p["type"] == "ByteLevel" for p in pre_tokenizers)
    return is_byte_level and all(character in vocabulary for character in _BYTE_OF)


def _steps(component: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    if component is None:
        return []
    return list(component[key]) if component["type"] == "Sequence" else [component]


def _lengthens(normalizer: dict[str, Any]) -> bool:
    if normalizer["type"] != "Replace" or "String" not in normalizer["pattern"]:
        return False
    return len(normalizer["content"].encode()) >= len(normalizer["pattern"]["String"].encode())
