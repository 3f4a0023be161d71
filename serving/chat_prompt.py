"""From chat messages to a prompt, in which only the template can place special tokens.

The rendered text is encoded with special tokens recognised. A message whose own text would then
read as a special token (say `<|im_end|>` typed by a user) must not: such texts are rendered as
marks, the text is cut at the marks, and the message's text is encoded as plain characters
between them.
"""

from __future__ import annotations

import re
import secrets
from typing import Any

from serving.bridge import Bridge
from serving.chat_template import ChatTemplates
from serving.schemas import ChatRequest
from sloraj.errors import InvalidRequest
from sloraj.frontend_api import ModelInfo, TokenizerApi

RESERVED = frozenset({"messages", "add_generation_prompt", "bos_token", "eos_token", "tools"})


def _values(parsed: ChatRequest, messages: list[dict[str, Any]], bridge: Bridge) -> dict[str, Any]:
    info, tokenizer = bridge.engine.info, bridge.engine.tokenizer
    taken = sorted(RESERVED & parsed.template_values.keys())
    if taken:
        raise InvalidRequest(
            f"chat_template_kwargs: got {taken[0]!r}, allowed: names that the server does not set",
            param="chat_template_kwargs",
        )
    return {
        **parsed.template_values,
        "messages": messages,
        "add_generation_prompt": parsed.add_generation_prompt,
        "tools": None,
        **_special_texts(info, tokenizer),
    }


def _special_texts(info: ModelInfo, tokenizer: TokenizerApi) -> dict[str, str]:
    bos = "" if info.bos_token_id is None else tokenizer.token_text(info.bos_token_id)
    eos = tokenizer.token_text(info.eos_token_ids[0]) if info.eos_token_ids else ""
    return {"bos_token": bos, "eos_token": eos}


async def chat_prompt(
    bridge: Bridge, templates: ChatTemplates, parsed: ChatRequest
) -> str | list[int]:
    """Text to be encoded with special tokens recognised, or token ids where a message imitates
    one.
    """
    tokenizer = bridge.engine.tokenizer

    def imitates(text: str) -> bool:
        plain = tokenizer.encode(text, add_special_tokens=False)
        return plain != tokenizer.encode(text, add_special_tokens=False, allow_special=True)

    def mark() -> tuple[list[dict[str, Any]], dict[str, str]]:
        marked, texts = [], {}
        for message in parsed.messages:
            if imitates(message["content"]):
                key = f"\ue000{secrets.token_hex(8)}\ue001"
                texts[key] = message["content"]
                message = {**message, "content": key}
            marked.append(message)
        return marked, texts

    messages, texts = await bridge.call(mark)
    text = await templates.render(bridge.engine.info.model_path, _values(parsed, messages, bridge))
    if parsed.continue_final_message:
        text = _cut_after_last(text, messages[-1]["content"])
    if not texts:
        return text
    pieces = re.split(f"({'|'.join(texts)})", text)

    def encode() -> list[int]:
        ids: list[int] = []
        for piece in pieces:
            if piece:
                ids += tokenizer.encode(
                    texts.get(piece, piece),
                    add_special_tokens=parsed.add_special_tokens and not ids,
                    allow_special=piece not in texts,
                )
        return ids

    return await bridge.call(encode)


def _cut_after_last(text: str, content: str) -> str:
    """`text` up to the end of the last message's content, which the model is to continue."""
    wanted = content.strip()
    at = text.rfind(wanted)
    if not wanted or at < 0:
        raise InvalidRequest(
            "continue_final_message: got true, allowed: false, because the chat template "
            "does not show the last message as it is",
            param="continue_final_message",
        )
    return text[: at + len(wanted)]
