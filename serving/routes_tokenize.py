"""POST /tokenize and /detokenize: what the engine would see, without generating."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from serving import models
from serving.chat_prompt import chat_prompt
from serving.schemas import parse_detokenize, parse_tokenize
from serving.sse import encode_json
from serving.state import read_object, server_state


async def tokenize(request: Request) -> Response:
    server = server_state(request)
    bridge = server.host.bridge()
    parsed = parse_tokenize(await read_object(request))
    models.resolve(parsed.model, bridge.engine.info)
    tokenizer = bridge.engine.tokenizer
    prompt: str | list[int] = parsed.text or ""
    if parsed.chat is not None:
        prompt = await chat_prompt(bridge, server.templates, parsed.chat)

    def encode() -> tuple[list[int], list[str] | None]:
        ids = prompt if isinstance(prompt, list) else tokenizer.encode(
            prompt,
            add_special_tokens=parsed.add_special_tokens,
            allow_special=parsed.chat is not None,
        )  # fmt: skip
        return ids, [tokenizer.token_text(i) for i in ids] if parsed.return_token_strs else None

    ids, texts = await bridge.call(encode)
    return _json(
        {
            "count": len(ids),
            "max_model_len": bridge.engine.info.max_model_len,
            "tokens": ids,
            "token_strs": texts,
        }
    )


async def detokenize(request: Request) -> Response:
    bridge = server_state(request).host.bridge()
    ids = parse_detokenize(await read_object(request), bridge.engine.info)
    decode = bridge.engine.tokenizer.decode
    text = await bridge.call(lambda: decode(ids, skip_special_tokens=False))
    return _json({"prompt": text})


def _json(value: object) -> Response:
    return Response(encode_json(value), media_type="application/json")
