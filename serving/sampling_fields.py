"""Turns the sampling fields that the completion endpoints share into `SamplingParams`."""

from __future__ import annotations

from typing import Any

from serving.fields import INT64, Fields
from sloraj.frontend_api import ModelInfo
from sloraj.request import MAX_LOGIT_BIAS, MAX_LOGPROBS, MAX_N, MAX_STOP, SamplingParams

MAX_TOKENS = (
    2**31 - 1
)  # what a larger max_tokens counts as; the engine clamps to the context anyway

# What a model's own generation defaults may set; other entries of them are not about sampling.
SAMPLING_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")

# Fields whose meaning we do not serve: refused, because ignoring them would change the answer.
UNSUPPORTED = {
    "suffix": "null: text after the completion is not taken into account",
    "prompt_logprobs": "null: log-probabilities of the prompt are not computed",
    "truncate_prompt_tokens": "null: prompts are never cut",
    "functions": "null: function calling is not offered",
    "function_call": "null: function calling is not offered",
    "structured_outputs": "null: constrained decoding is not offered",
    "guided_json": "null: constrained decoding is not offered",
    "guided_regex": "null: constrained decoding is not offered",
    "guided_choice": "null: constrained decoding is not offered",
    "guided_grammar": "null: constrained decoding is not offered",
    "chat_template": "null: the template is the server's (--chat-template)",
    "use_beam_search": "null or false: beam search is not offered",
}


def refuse_unsupported(fields: Fields) -> None:
    for name, allowed in UNSUPPORTED.items():
        if fields.has(name) and fields.values[name] is not False:
            fields.refuse(name, allowed)
    if fields.values.get("tools"):
        fields.refuse("tools", "null or an empty list: tool calling is not offered")
    if fields.values.get("tool_choice") not in (None, "none", "auto"):
        fields.refuse("tool_choice", "null, 'none' or 'auto': tool calling is not offered")
    response_format = fields.mapping("response_format")
    if response_format and response_format.get("type") != "text":
        fields.refuse(
            "response_format",
            "{'type': 'text'}: constrained decoding is not offered",
            response_format.get("type") or response_format,
        )


def _logit_bias(fields: Fields, vocab_size: int) -> tuple[tuple[int, float], ...]:
    bias = fields.mapping("logit_bias")
    if len(bias) > MAX_LOGIT_BIAS:
        fields.refuse("logit_bias", f"at most {MAX_LOGIT_BIAS} entries")
        return ()
    found = []
    for key, value in bias.items():
        if not (key.isascii() and key.isdigit() and len(key) <= 10 and int(key) < vocab_size):
            fields.refuse("logit_bias", f"token ids of 0 to {vocab_size - 1} as keys", key)
        elif (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not -100 <= value <= 100
        ):
            fields.refuse("logit_bias", "numbers of -100 to 100 as values", value)
        else:
            found.append((int(key), float(value)))
    return tuple(found)


def _default(info: ModelInfo, name: str, otherwise: Any) -> Any:
    value = info.generation_defaults.get(name)
    return otherwise if value is None else value


def sampling_params(
    fields: Fields, info: ModelInfo, *, max_tokens: int | None, logprobs: int | None
) -> SamplingParams:
    """Read what is common to both endpoints; the model's generation defaults fill what is not
    given.

    Raises InvalidRequest naming every field at fault, those noted in `fields` before included.
    """
    refuse_unsupported(fields)
    n = fields.integer("n", 1, 1, MAX_N) or 1
    best_of = fields.integer("best_of", None)
    if best_of is not None and best_of != n:
        fields.refuse("best_of", f"n ({n}): all choices are returned")
    values: dict[str, Any] = {
        "n": n,
        "max_tokens": max_tokens,
        "logprobs": logprobs,
        "min_tokens": fields.integer("min_tokens", 0, 0, MAX_TOKENS, clamp=True),
        "temperature": fields.number("temperature", _default(info, "temperature", 1.0), 0, 2),
        "top_p": fields.number("top_p", _default(info, "top_p", 1.0), 0, 1, above_low=True),
        "min_p": fields.number("min_p", _default(info, "min_p", 0.0), 0, 1),
        "top_k": fields.integer("top_k", _default(info, "top_k", 0), -1, MAX_TOKENS, clamp=True),
        "presence_penalty": fields.number("presence_penalty", 0.0, -2, 2),
        "frequency_penalty": fields.number("frequency_penalty", 0.0, -2, 2),
        "repetition_penalty": fields.number(
            "repetition_penalty", _default(info, "repetition_penalty", 1.0), 0, 10, above_low=True
        ),
        "seed": fields.integer("seed", None, -INT64, INT64 - 1),
        "logit_bias": _logit_bias(fields, info.vocab_size),
        "stop": fields.string_list("stop", MAX_STOP),
        "stop_token_ids": fields.integer_list("stop_token_ids", MAX_STOP, info.vocab_size),
        "include_stop_str_in_output": fields.boolean("include_stop_str_in_output"),
        "ignore_eos": fields.boolean("ignore_eos"),
    }
    fields.finish()
    return SamplingParams(**values)


def read_logprobs(fields: Fields, name: str) -> int | None:
    return fields.integer(name, None, 0, MAX_LOGPROBS)
