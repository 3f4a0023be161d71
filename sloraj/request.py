"""What a caller asks for, and one running copy of it. Host values only; never imports JAX."""

from __future__ import annotations

import dataclasses
import enum
import math
from typing import Any

from sloraj.errors import InvalidRequest

MAX_N = 16
MAX_STOP = 16
MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 300
MAX_PRIORITY = 2**31 - 1  # and as much below 0: room for moments in seconds
MAX_TENANT_NAME = 256


def _require(holds: bool, param: str, got: Any, allowed: str) -> None:
    if not holds:
        raise InvalidRequest(f"{param}: got {got!r}, allowed: {allowed}", param=param)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to turn logits into tokens and when to stop. Raises InvalidRequest naming the field.

    temperature 0 is greedy. top_k 0 (or -1) is off. `logprobs` is the number of alternatives to
    report besides the chosen token (None: report nothing). `max_tokens` None means up to the
    context limit.
    """

    max_tokens: int | None = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    n: int = 1
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        finite = math.isfinite
        if self.max_tokens is not None:
            _require(self.max_tokens >= 1, "max_tokens", self.max_tokens, "1 or more, or null")
        _require(
            0 <= self.min_tokens <= (self.max_tokens or self.min_tokens),
            "min_tokens", self.min_tokens, "0 to max_tokens",
        )  # fmt: skip
        _require(
            finite(self.temperature) and 0 <= self.temperature <= 2,
            "temperature", self.temperature, "0 to 2",
        )  # fmt: skip
        _require(self.top_k >= -1, "top_k", self.top_k, "-1 or 0 (off), or 1 and up")
        _require(finite(self.top_p) and 0 < self.top_p <= 1, "top_p", self.top_p, "above 0, to 1")
        _require(finite(self.min_p) and 0 <= self.min_p <= 1, "min_p", self.min_p, "0 to 1")
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            _require(finite(value) and -2 <= value <= 2, name, value, "-2 to 2")
        _require(
            finite(self.repetition_penalty) and 0 < self.repetition_penalty <= 10,
            "repetition_penalty", self.repetition_penalty, "above 0, to 10",
        )  # fmt: skip
        if self.seed is not None:
            _require(-(2**63) <= self.seed < 2**63, "seed", self.seed, "a 64-bit integer")
        _require(1 <= self.n <= MAX_N, "n", self.n, f"1 to {MAX_N}")
        _require(
            len(self.logit_bias) <= MAX_LOGIT_BIAS,
            "logit_bias", f"{len(self.logit_bias)} entries", f"at most {MAX_LOGIT_BIAS}",
        )  # fmt: skip
        for token, bias in self.logit_bias:
            _require(token >= 0, "logit_bias", token, "token ids of 0 and up")
            _require(finite(bias) and -100 <= bias <= 100, "logit_bias", bias, "-100 to 100")
        if self.logprobs is not None:
            _require(
                0 <= self.logprobs <= MAX_LOGPROBS,
                "logprobs",
                self.logprobs,
                f"0 to {MAX_LOGPROBS}",
            )
        _require(
            len(self.stop) <= MAX_STOP, "stop", f"{len(self.stop)} strings", f"at most {MAX_STOP}"
        )
        _require(all(self.stop), "stop", "", "strings of 1 character and up")
        _require(
            len(self.stop_token_ids) <= MAX_STOP and all(t >= 0 for t in self.stop_token_ids),
            "stop_token_ids", list(self.stop_token_ids[: MAX_STOP + 1]),
            f"at most {MAX_STOP} ids of 0 and up",
        )  # fmt: skip

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0


class SequenceState(enum.Enum):
    WAITING = "waiting"  # no row, no pages
    RUNNING = "running"  # owns a row and pages, pins its adapter
    ENDING = "ending"  # owns nothing; its last token is in flight
    FINISHED = "finished"  # owns nothing


@dataclasses.dataclass(slots=True, eq=False)
class Sequence:
    """One choice of one request: its tokens, its progress, and what it owns.

    `num_computed_tokens` counts tokens whose KV is written, or will be by a step already enqueued.
    `num_in_flight` (0 or 1) counts tokens sampled by an enqueued step and not yet read by the host.
    """

    request_id: str
    index: int  # which of the request's `params.n` choices
    prompt_token_ids: list[int]
    params: SamplingParams
    max_output_tokens: int  # params.max_tokens clamped to max_model_len
    stop_ids: frozenset[int]  # stop_token_ids, and the eos ids unless ignore_eos
    seed: int  # resolved, 32 bits
    tag: int  # owner tag of its pages; unique among sequences and adapter versions, never 0
    version_id: str | None  # adapter version held by lease; None is the base model
    arrival_s: float
    deadline_s: float = math.inf  # of the request's first token, on the engine's clock
    priority: int = 0  # the lower is served the earlier
    tenant: str = ""  # to whose account it goes
    adapter_bytes: int = 0  # of its adapter version
    output_token_ids: list[int] = dataclasses.field(default_factory=list)
    num_computed_tokens: int = 0
    num_in_flight: int = 0
    num_preemptions: int = 0
    admission: int = 0  # grows with every first admission; 0: not yet admitted
    state: SequenceState = SequenceState.WAITING
    row: int | None = None
    slot: int = 0
    pages: list[int] = dataclasses.field(default_factory=list)

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def num_known_tokens(self) -> int:
        """Tokens whose ids the host has read."""
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def num_tokens(self) -> int:
        return self.num_known_tokens + self.num_in_flight

    @property
    def num_missing_tokens(self) -> int:
        """Tokens without KV, the one in flight included."""
        return self.num_tokens - self.num_computed_tokens

    def token_id(self, position: int) -> int:
        """The id at a position the host knows."""
        prompt = len(self.prompt_token_ids)
        if position < prompt:
            return self.prompt_token_ids[position]
        return self.output_token_ids[position - prompt]
