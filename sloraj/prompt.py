"""Checks of a prompt and its parameters against the model, before the engine hears of them."""

from __future__ import annotations

import dataclasses

from sloraj.errors import ContextTooLong, InvalidRequest
from sloraj.frontend_api import ModelInfo
from sloraj.request import SamplingParams
from sloraj.tokenizer import Tokenizer


def check_prompt(
    prompt: str | list[int],
    tokenizer: Tokenizer,
    info: ModelInfo,
    *,
    add_special_tokens: bool,
    allow_special: bool,
) -> list[int]:
    """The prompt's token ids. Raises InvalidRequest or ContextTooLong, `param` "prompt".

    A prompt leaves room for one token at least. A text that must be too long, because no token
    covers so many bytes, is refused without being tokenized.
    """
    limit = info.max_model_len - 1
    if isinstance(prompt, str):
        if not prompt:
            raise InvalidRequest("prompt: got '', allowed: 1 character and up", param="prompt")
        bound = tokenizer.max_token_bytes
        if bound is not None and len(prompt) > limit * bound:  # a character is a byte, or more
            raise _too_long(f"{len(prompt)} characters, above {limit} tokens", info)
        ids = tokenizer.encode(
            prompt, add_special_tokens=add_special_tokens, allow_special=allow_special
        )
    else:
        ids = list(prompt)
        _check_token_ids(ids, info.vocab_size)
    if not ids:
        raise InvalidRequest("prompt: got no tokens, allowed: 1 and up", param="prompt")
    if len(ids) > limit:
        raise _too_long(f"{len(ids)} tokens", info)
    return ids


def _check_token_ids(ids: list[int], vocab_size: int) -> None:
    for place, token_id in enumerate(ids):
        is_int = isinstance(token_id, int) and not isinstance(token_id, bool)
        if not is_int or not 0 <= token_id < vocab_size:
            raise InvalidRequest(
                f"prompt: got {token_id!r} at place {place}, "
                f"allowed: token ids 0 to {vocab_size - 1}",
                param="prompt",
            )


def _too_long(got: str, info: ModelInfo) -> ContextTooLong:
    return ContextTooLong(
        f"prompt: got {got}, allowed: {info.max_model_len - 1}, because this model's context is "
        f"{info.max_model_len} tokens and one must be left for the output",
        param="prompt",
    )


def resolve_params(
    params: SamplingParams, num_prompt_tokens: int, info: ModelInfo, random_seed: int
) -> SamplingParams:
    """Parameters with a seed and a max_tokens. Raises InvalidRequest for token ids the model lacks.

    max_tokens above what the context leaves is cut to that: the output then ends with "length".
    """
    room = info.max_model_len - num_prompt_tokens
    if params.min_tokens > room:
        raise InvalidRequest(
            f"min_tokens: got {params.min_tokens}, allowed: 0 to {room}, what the context leaves",
            param="min_tokens",
        )
    for name, ids in (
        ("logit_bias", [token_id for token_id, _ in params.logit_bias]),
        ("stop_token_ids", list(params.stop_token_ids)),
    ):
        if (largest := max(ids, default=0)) >= info.vocab_size:
            raise InvalidRequest(
                f"{name}: got {largest}, allowed: token ids 0 to {info.vocab_size - 1}", param=name
            )
    return dataclasses.replace(
        params,
        seed=random_seed if params.seed is None else params.seed,
        max_tokens=room if params.max_tokens is None else min(params.max_tokens, room),
    )
