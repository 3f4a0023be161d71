"""What a request may answer: every token against float64 logits of merged weights, teacher-forced.

One pass over prompt and answer gives the logits behind every token. Penalties, bias, filters and
noise are applied to them as vLLM documents them, in numpy. A token is right if it scores highest
up to rounding. Two answers that are both right, with no near tie in either, are equal: so the same
check holds an answer to what the request gets alone, in any mix, preempted or in chunks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from checkpoints.model_config import ModelConfig
from sloraj.admission import choice_seed
from sloraj.config import SchedulerConfig
from sloraj.request import SamplingParams
from tests.oracle import numpy_llama
from tests.sloraj.conversation import Answer

Float = NDArray[np.float64]
Bools = NDArray[np.bool_]
ROUNDING = 2e-4  # of a logit, at temperature 1; float32 keeps within a tenth of it
MAX_POSITIONS = 64


class Adapter:
    """An adapter's directory and the deltas that were written into it."""

    def __init__(self, path: str, modules: Mapping[tuple[int, str], Any]) -> None:
        self.path = path
        self.deltas = numpy_llama.merge(modules)


class TokenOracle:
    """Checks answers of one model. Make it before the runner is ready: it compiles once."""

    def __init__(self, config: ModelConfig, weights: Mapping[str, NDArray[Any]]) -> None:
        self._config = config
        self._weights = {name: weight.astype(np.float64) for name, weight in weights.items()}
        self._noise: dict[int, NDArray[np.float32]] = {}
        self.num_tokens = self.num_near_ties = 0

        def draw(seed: jax.Array) -> jax.Array:
            def one(position: jax.Array) -> jax.Array:
                key = jax.random.fold_in(jax.random.key(seed), position)
                return jax.random.gumbel(key, (config.vocab_size,), jnp.float32)

            return jax.vmap(one)(jnp.arange(MAX_POSITIONS, dtype=jnp.int32))

        self._draw = jax.jit(draw).lower(jax.ShapeDtypeStruct((), jnp.int32)).compile()

    def logits(self, tokens: Sequence[int], adapter: Adapter | None) -> Float:
        """[T, V] after each of the T tokens."""
        deltas = None if adapter is None else adapter.deltas
        return numpy_llama.logits(self._config, self._weights, tokens, deltas)

    def greedy(
        self, prompt: Sequence[int], num_tokens: int, adapter: Adapter | None
    ) -> list[int] | None:
        """Greedy tokens, recomputed from the start for each; None where two nearly tie."""
        tokens = list(prompt)
        for _ in range(num_tokens):
            last = self.logits(tokens, adapter)[-1]
            second, first = np.sort(last)[-2:]
            if first - second < ROUNDING:
                return None
            tokens.append(int(last.argmax()))
        return tokens[len(prompt) :]

    def check(
        self,
        prompt: list[int],
        params: SamplingParams,
        index: int,
        adapter: Adapter | None,
        answer: Answer,
        config: SchedulerConfig,
    ) -> None:
        """Assert that one choice has the right tokens, finish, and log-probabilities."""
        drawn = list(answer.token_ids)
        if answer.finish_reason == "stop":
            assert answer.stop_token_id is not None
            drawn.append(answer.stop_token_id)
        stop_ids = set(params.stop_token_ids)
        stop_ids |= set() if params.ignore_eos else set(config.eos_token_ids)
        _check_finish(drawn, params, stop_ids, len(prompt), answer, config)
        logits = self.logits(prompt + drawn[:-1], adapter)[len(prompt) - 1 :]
        noise = np.zeros((MAX_POSITIONS, logits.shape[1]), np.float32)
        if params.temperature > 0:
            noise = self._noise_of(choice_seed(params.seed, "", index))
        for i, token in enumerate(drawn):
            shaped = shape_logits(logits[i], params, prompt, drawn[:i], stop_ids)
            scores = shaped / (params.temperature or 1.0)
            tolerance = ROUNDING / min(params.temperature or 1.0, 1.0)
            may, must = keep(scores, params, tolerance)
            scores = scores + noise[len(prompt) + i]
            best = scores[must].max(initial=-np.inf)
            assert may[token] and scores[token] >= best - tolerance, (i, token, drawn)
            self.num_tokens += 1
            self.num_near_ties += int(np.count_nonzero(scores[may] > best - tolerance) > 1)
        if params.logprobs is not None:
            check_logprobs(logits[: len(answer.token_ids)], answer, params.logprobs)

    def _noise_of(self, seed: int) -> NDArray[np.float32]:
        if seed not in self._noise:
            self._noise[seed] = np.asarray(self._draw(np.uint32(seed).view(np.int32)))
        return self._noise[seed]


def _check_finish(
    drawn: list[int],
    params: SamplingParams,
    stop_ids: set[int],
    num_prompt: int,
    answer: Answer,
    config: SchedulerConfig,
) -> None:
    stops = [i for i, t in enumerate(drawn) if t in stop_ids and i >= params.min_tokens]
    if answer.finish_reason == "stop":
        assert stops == [len(drawn) - 1]
        return
    assert answer.finish_reason == "length" and not stops
    assert params.max_tokens is not None
    assert len(drawn) == min(params.max_tokens, config.max_model_len - num_prompt)


def shape_logits(
    logits: Float,
    params: SamplingParams,
    prompt: Sequence[int],
    outputs: Sequence[int],
    stop_ids: set[int],
) -> Float:
    """Logits after penalties, bias and the ban on early stops."""
    counts = np.bincount(np.array(outputs, int), minlength=len(logits))
    seen = counts > 0
    seen[list(prompt)] = True
    factor = np.where(seen, params.repetition_penalty, 1.0)
    shaped = np.where(logits > 0, logits / factor, logits * factor)
    shaped -= params.frequency_penalty * counts + params.presence_penalty * (counts > 0)
    for token, bias in params.logit_bias:
        shaped[token] += bias
    if len(outputs) < params.min_tokens:
        shaped[list(stop_ids)] = -np.inf
    return shaped


def keep(scores: Float, params: SamplingParams, tolerance: float) -> tuple[Bools, Bools]:
    """Tokens that top-k, top-p and min-p may leave, and those that they must leave.

    The two differ where rounding decides. Greedy leaves all.
    """
    if params.temperature == 0:
        return np.ones_like(scores, bool), np.ones_like(scores, bool)
    k = params.top_k if 0 < params.top_k < len(scores) else len(scores)
    may, must = _largest(scores, k, k, tolerance)
    weights = np.where(scores >= np.sort(scores)[-k], np.exp(scores - scores.max()), 0.0)
    shares = weights / weights.sum()
    if params.top_p < 1:
        held = np.cumsum(np.sort(shares)[::-1])
        most, least = (1 + int((held < params.top_p + s).sum()) for s in (1e-5, -1e-5))
        may_hold, must_hold = _largest(shares, min(most, len(shares)), least, 1e-5)
        may, must = may & may_hold, must & must_hold
    floor = params.min_p * shares.max()
    return may & (shares >= floor * (1 - 1e-4)), must & (shares >= floor * (1 + 1e-4))


def _largest(values: Float, most: int, least: int, tolerance: float) -> tuple[Bools, Bools]:
    """Those that may be among the `most` largest; those that must be among the `least` largest."""
    falling = np.append(np.sort(values)[::-1], -np.inf)
    return values >= falling[most - 1] - tolerance, values > falling[least] + tolerance


def check_logprobs(logits: Float, answer: Answer, num_top: int) -> None:
    """Assert that reported numbers are the log-softmax of the model's own logits."""
    logits = logits - logits.max(axis=1, keepdims=True)
    expected = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    assert len(answer.logprobs) == len(answer.token_ids)
    for row, token, (reported, logprob, top) in zip(
        expected, answer.token_ids, answer.logprobs, strict=True
    ):
        assert reported == token
        assert abs(logprob - row[token]) < ROUNDING
        assert len({t for t, _ in top}) == len(top) == num_top
        highest = np.sort(row)[::-1][:num_top]
        np.testing.assert_allclose([p for _, p in top], highest, atol=ROUNDING, rtol=0)
        np.testing.assert_allclose([row[t] for t, _ in top], highest, atol=ROUNDING, rtol=0)
