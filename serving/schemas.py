"""What each endpoint's JSON means: a parsed, checked request, or InvalidRequest naming the fields.

Unknown fields are ignored, as clients of this protocol expect; known fields that cannot be
honoured are refused.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from serving.errors import shown
from serving.fields import Fields, are_ids
from serving.sampling_fields import MAX_TOKENS, read_logprobs, sampling_params
from sloraj.frontend_api import ModelInfo
from sloraj.request import MAX_PRIORITY, SamplingParams

ROLES = ("system", "developer", "user", "assistant", "tool")
MAX_MESSAGES = 4096
MAX_SLO_S = 86_400.0
DEFAULT_MAX_TOKENS = 16


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StreamOptions:
    is_stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """What the two completion endpoints have in common."""

    model: str | None
    params: SamplingParams
    stream: StreamOptions
    return_token_ids: bool
    priority: int = 0
    user: str | None = None
    first_token_slo_s: float | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CompletionRequest(GenerationRequest):
    prompts: list[str | list[int]]
    echo: bool
    add_special_tokens: bool


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ChatRequest(GenerationRequest):
    messages: list[dict[str, Any]]
    template_values: dict[str, Any]  # extra variables for the chat template
    add_generation_prompt: bool
    continue_final_message: bool
    add_special_tokens: bool


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TokenizeRequest:
    model: str | None
    text: str | None  # None: `chat` is given
    chat: ChatRequest | None
    add_special_tokens: bool
    return_token_strs: bool


def _stream_options(fields: Fields) -> StreamOptions:
    is_stream = fields.boolean("stream")
    options = Fields(fields.mapping("stream_options"))
    if fields.has("stream_options") and not is_stream:
        fields.refuse("stream_options", "null unless stream is true")
    for name in ("include_usage", "continuous_usage_stats"):
        value = options.values.get(name)
        if value is not None and not isinstance(value, bool):
            fields.refuse("stream_options", f"true or false for {name}", value)
    continuous = options.values.get("continuous_usage_stats") is True
    return StreamOptions(
        is_stream=is_stream,
        include_usage=options.values.get("include_usage") is True,
        continuous_usage=continuous,
    )


def _model(fields: Fields) -> str | None:
    """The model asked for; `lora_path`, which other servers' clients send along, must agree with
    it.
    """
    model = fields.string("model")
    lora_path = fields.string("lora_path")
    if lora_path is not None and lora_path not in (model, (model or "").partition(":")[2]):
        fields.refuse(
            "lora_path", f"null or the model ({shown(model)}): name the adapter in 'model'"
        )
    return model


def _priority(fields: Fields) -> int:
    return fields.integer("priority", 0, -MAX_PRIORITY, MAX_PRIORITY) or 0


def _first_token_slo_s(fields: Fields) -> float | None:
    return fields.number("first_token_slo_s", 0.0, 0.0, MAX_SLO_S, above_low=True) or None


def _prompts(fields: Fields, vocab_size: int, max_prompts: int) -> list[str | list[int]]:
    """A string, a list of strings, a list of token ids, or a list of lists of token ids."""
    prompt = fields.values.get("prompt")
    ids = f"token ids of 0 to {vocab_size - 1}"
    if isinstance(prompt, str) and prompt:
        return [prompt]
    if not isinstance(prompt, list) or not prompt:
        fields.refuse("prompt", "a string or a list, not empty")
    elif all(type(item) is int for item in prompt):
        if are_ids(prompt, vocab_size):
            return [prompt]
        wrong = next(item for item in prompt if not 0 <= item < vocab_size)
        fields.refuse("prompt", ids, wrong)
    elif len(prompt) > max_prompts:
        fields.refuse("prompt", f"at most {max_prompts} prompts")
    elif all(isinstance(item, str) for item in prompt):
        if all(prompt):
            return list(prompt)
        fields.refuse("prompt", "strings of 1 character and up", "")
    elif all(isinstance(item, list) for item in prompt):
        wrong = next((item for item in prompt if not item or not are_ids(item, vocab_size)), None)
        if wrong is None:
            return list(prompt)
        fields.refuse("prompt", f"lists of 1 and more {ids}", wrong)
    else:
        fields.refuse("prompt", "all strings, all token ids, or all lists of token ids")
    return []


def parse_completion(
    values: dict[str, Any], info: ModelInfo, max_prompts: int
) -> CompletionRequest:
    fields = Fields(values)
    prompts = _prompts(fields, info.vocab_size, max_prompts)
    logprobs = read_logprobs(fields, "logprobs")
    echo = fields.boolean("echo")
    if echo and logprobs is not None:
        fields.refuse("echo", "false together with logprobs: those of the prompt are not computed")
    max_tokens = fields.integer("max_tokens", DEFAULT_MAX_TOKENS, 1, MAX_TOKENS, clamp=True)
    model, stream = _model(fields), _stream_options(fields)
    add_special_tokens = fields.boolean("add_special_tokens", True)
    return_token_ids = fields.boolean("return_token_ids")
    priority, user = _priority(fields), fields.string("user")
    first_token_slo_s = _first_token_slo_s(fields)
    return CompletionRequest(
        params=sampling_params(fields, info, max_tokens=max_tokens, logprobs=logprobs),
        model=model,
        stream=stream,
        return_token_ids=return_token_ids,
        priority=priority,
        user=user,
        first_token_slo_s=first_token_slo_s,
        prompts=prompts,
        echo=echo,
        add_special_tokens=add_special_tokens,
    )


def _content(part: Any) -> str | None:
    """Text of a message's content: a string, or a list of text parts; None if it is neither."""
    if isinstance(part, str):
        return part
    if isinstance(part, list) and part:
        texts = [
            item["text"]
            for item in part
            if isinstance(item, dict)
            and item.get("type") == "text"
            and isinstance(item.get("text"), str)
        ]
        return "".join(texts) if len(texts) == len(part) else None
    return None


def _messages(fields: Fields) -> list[dict[str, Any]]:
    messages = fields.values.get("messages")
    if not isinstance(messages, list) or not 1 <= len(messages) <= MAX_MESSAGES:
        fields.refuse("messages", f"a list of 1 to {MAX_MESSAGES} messages")
        return []
    found = []
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, dict):
            fields.refuse(where, "an object", message)
            continue
        role, content = message.get("role"), _content(message.get("content"))
        if not isinstance(role, str) or role not in ROLES:
            fields.refuse(f"{where}.role", ", ".join(ROLES), shown_or_null(role))
        elif content is None:
            fields.refuse(
                f"{where}.content", "a string, or a list of {'type': 'text', 'text': ...}",
                shown_or_null(message.get("content")),
            )  # fmt: skip
        elif message.get("tool_calls"):
            fields.refuse(
                f"{where}.tool_calls", "null: tool calling is not offered", message["tool_calls"]
            )
        else:
            found.append({**message, "content": content})
    return found


def shown_or_null(value: Any) -> Any:
    return "null" if value is None else value


def _chat_fields(fields: Fields) -> dict[str, Any]:
    messages = _messages(fields)
    add_generation_prompt = fields.boolean("add_generation_prompt", True)
    continue_final = fields.boolean("continue_final_message")
    if continue_final and fields.boolean("add_generation_prompt", False):
        fields.refuse("continue_final_message", "false together with add_generation_prompt")
    return {
        "messages": messages,
        "template_values": fields.mapping("chat_template_kwargs"),
        "add_generation_prompt": add_generation_prompt and not continue_final,
        "continue_final_message": continue_final,
        "add_special_tokens": fields.boolean("add_special_tokens", False),
        "model": _model(fields),
        "stream": _stream_options(fields),
        "return_token_ids": fields.boolean("return_token_ids"),
        "priority": _priority(fields),
        "user": fields.string("user"),
        "first_token_slo_s": _first_token_slo_s(fields),
    }


def parse_chat(values: dict[str, Any], info: ModelInfo) -> ChatRequest:
    fields = Fields(values)
    common = _chat_fields(fields)
    top_logprobs = read_logprobs(fields, "top_logprobs")
    wants_logprobs = fields.boolean("logprobs")
    if top_logprobs is not None and not wants_logprobs:
        fields.refuse("top_logprobs", "null unless logprobs is true")
    if fields.boolean("echo"):
        fields.refuse("echo", "false: a chat prompt is not echoed")
    name = "max_completion_tokens" if fields.has("max_completion_tokens") else "max_tokens"
    max_tokens = fields.integer(name, None, 1, MAX_TOKENS, clamp=True)
    logprobs = (top_logprobs or 0) if wants_logprobs else None
    params = sampling_params(fields, info, max_tokens=max_tokens, logprobs=logprobs)
    return ChatRequest(params=params, **common)


def parse_tokenize(values: dict[str, Any]) -> TokenizeRequest:
    fields = Fields(values)
    text, chat = fields.string("prompt"), None
    if fields.has("messages"):
        if text is not None:
            fields.refuse("prompt", "null together with messages")
        chat = ChatRequest(params=SamplingParams(), **_chat_fields(fields))
    elif text is None and not fields.has("prompt"):
        fields.refuse("prompt", "a string, or give messages")
    request = TokenizeRequest(
        model=_model(fields),
        text=text,
        chat=chat,
        add_special_tokens=fields.boolean("add_special_tokens", chat is None),
        return_token_strs=fields.boolean("return_token_strs"),
    )
    fields.finish()
    return request


def parse_detokenize(values: dict[str, Any], info: ModelInfo) -> list[int]:
    fields = Fields(values)
    tokens = values.get("tokens")
    if not isinstance(tokens, list) or not are_ids(tokens, info.vocab_size):
        fields.refuse("tokens", f"a list of token ids of 0 to {info.vocab_size - 1}")
    fields.finish()
    return list(values["tokens"])
