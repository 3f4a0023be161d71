"""From a Generate message to sequences: every check that needs the engine's numbers, and every
default.

Raises RequestError subclasses that name the field, what came and what is allowed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable

import msgspec

from sloraj.adapters.host_store import AdapterVersion
from sloraj.config import SchedulerConfig, div_ceil
from sloraj.errors import ContextTooLong, InvalidRequest
from sloraj.messages import Generate
from sloraj.request import MAX_PRIORITY, MAX_TENANT_NAME, SamplingParams, Sequence

_PARAM_NAMES = frozenset(field.name for field in dataclasses.fields(SamplingParams))


def make_sequences(
    message: Generate,
    version: AdapterVersion | None,
    config: SchedulerConfig,
    next_tag: Callable[[], int],
    now_s: float,
) -> list[Sequence]:
    """The `params.n` sequences of a request, none of which needs more than the whole pool."""
    params = parse_params(message)
    _check_standing(message, config.queue.queue_order)
    _check_vocabulary(message.prompt_token_ids, params, config.vocab_size)
    max_output_tokens = _max_output_tokens(len(message.prompt_token_ids), params, version, config)
    stop_ids = frozenset(params.stop_token_ids)
    if not params.ignore_eos:
        stop_ids |= frozenset(config.eos_token_ids)
    return [
        Sequence(
            request_id=message.request_id,
            index=index,
            prompt_token_ids=list(message.prompt_token_ids),
            params=params,
            max_output_tokens=max_output_tokens,
            stop_ids=stop_ids,
            seed=choice_seed(params.seed, message.request_id, index),
            tag=next_tag(),
            version_id=None if version is None else version.version_id,
            arrival_s=now_s,
            priority=message.priority,
            tenant=tenant_of(message),
            adapter_bytes=0 if version is None else version.packed.num_bytes,
        )
        for index in range(params.n)
    ]


def resolve_slo(message: Generate, config: SchedulerConfig) -> float | None:
    """Seconds to the first token that the request is to be answered within: its own, or the
    engine's; None: whenever it comes.
    """
    slo_s = message.first_token_slo_s
    if slo_s is None:
        return config.first_token_slo_s
    if not (slo_s > 0 and math.isfinite(slo_s)):
        raise InvalidRequest(
            f"first_token_slo_s: got {slo_s}, allowed: above 0, or null", param="first_token_slo_s"
        )
    return slo_s


def tenant_of(message: Generate) -> str:
    """To whose account the request goes."""
    return message.tenant or message.adapter_id or ""


def parse_params(message: Generate) -> SamplingParams:
    """SamplingParams from plain values, as they come out of msgpack (lists for tuples)."""
    unknown = sorted(set(message.params) - _PARAM_NAMES)
    if unknown:
        allowed = ", ".join(sorted(_PARAM_NAMES))
        raise InvalidRequest(f"params: got {unknown[0]!r}, allowed: {allowed}", param=unknown[0])
    try:
        return msgspec.convert(message.params, SamplingParams)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"params: {error}", param="params") from None


def _check_standing(message: Generate, queue_order: str) -> None:
    """A priority that nothing would heed is refused, as vLLM does, and not ignored."""
    if not -MAX_PRIORITY <= message.priority <= MAX_PRIORITY:
        raise InvalidRequest(
            f"priority: got {message.priority}, allowed: {-MAX_PRIORITY} to {MAX_PRIORITY}",
            param="priority",
        )
    if message.priority and queue_order == "fcfs":
        raise InvalidRequest(
            f"priority: got {message.priority}, allowed: 0, unless the engine runs with "
            "--queue-order priority or vtc",
            param="priority",
        )
    if message.tenant is not None and not 1 <= len(message.tenant) <= MAX_TENANT_NAME:
        raise InvalidRequest(
            f"tenant: got {len(message.tenant)} characters, allowed: 1 to {MAX_TENANT_NAME}",
            param="tenant",
        )


def choice_seed(seed: int | None, request_id: str, index: int) -> int:
    """32 bits that differ between the choices of a request and are the same on every run."""
    key = f"{request_id if seed is None else seed}/{index}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=4).digest(), "little")


def _check_vocabulary(prompt: list[int], params: SamplingParams, vocab_size: int) -> None:
    if not prompt:
        raise InvalidRequest("prompt: got no tokens, allowed: 1 token and up", param="prompt")
    fields = (
        ("prompt", prompt),
        ("logit_bias", [token for token, _ in params.logit_bias]),
        ("stop_token_ids", list(params.stop_token_ids)),
    )
    for name, tokens in fields:
        for token in (min(tokens, default=0), max(tokens, default=0)):
            if not 0 <= token < vocab_size:
                raise InvalidRequest(
                    f"{name}: got token id {token}, allowed: 0 to {vocab_size - 1}", param=name
                )


def _max_output_tokens(
    num_prompt: int, params: SamplingParams, version: AdapterVersion | None, config: SchedulerConfig
) -> int:
    """`max_tokens` within the context limit; if it is null, within the pool too."""
    if num_prompt >= config.max_model_len:
        raise ContextTooLong(
            f"prompt: got {num_prompt} tokens, allowed: at most {config.max_model_len - 1} "
            "(max_model_len - 1)",
            param="prompt",
        )
    limit = config.max_model_len - num_prompt
    num_adapter_pages = 0 if version is None else version.num_pages
    if config.num_adapter_pages is not None:
        num_adapter_pages = config.num_adapter_pages
    num_pages = config.num_pages - 1 - num_adapter_pages  # 1: the null page
    if params.max_tokens is None:
        # The last token sampled is never computed, so it needs no place in a page.
        limit = min(limit, num_pages * config.page_size + 1 - num_prompt)
    else:
        limit = min(limit, params.max_tokens)
    needed = div_ceil(num_prompt + max(limit, 1) - 1, config.page_size)
    if needed > num_pages:
        raise InvalidRequest(
            f"max_tokens: {num_prompt} prompt + {max(limit, 1)} output tokens take {needed} pages "
            f"beside {num_adapter_pages} pages of adapters, allowed: at most "
            f"{config.num_pages - 1} pages together; ask for less, or raise --pool-bytes",
            param="max_tokens",
        )
    return limit
