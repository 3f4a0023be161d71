"""From logits to tokens, on the device, without sorting the vocabulary.

Order of effects, as vLLM's: penalties, logit bias, temperature, then top-k, top-p and min-p on the
result. Thresholds are exact: a bisection over the bits of the float finds the k-th largest value,
or the largest cut whose tokens hold at least top_p of the probability; ties at the cut are all
kept.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from sloraj.request import MAX_LOGPROBS

GREEDY, FULL, LOGPROBS = "greedy", "full", "logprobs"
VARIANTS = (GREEDY, FULL, LOGPROBS)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SamplingRows:
    """Sampling parameters of each row, `[rows]` unless said."""

    temperature: jax.Array  # f32; 0 is greedy
    top_p: jax.Array  # f32
    min_p: jax.Array  # f32
    presence: jax.Array  # f32
    frequency: jax.Array  # f32
    repetition: jax.Array  # f32
    top_k: jax.Array  # i32; 0 is off
    seed: jax.Array  # i32
    prompt_len: jax.Array  # i32
    bias_ids: jax.Array  # i32 [rows, entries]; vocab_size marks an unused entry
    bias_values: jax.Array  # f32 [rows, entries]
    bias_until: jax.Array  # i32 [rows, entries]; applies while fewer output tokens than this exist


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TokenCounts:
    """What penalties look back on, `[rows, V]`."""

    in_prompt: jax.Array  # bool
    output: jax.Array  # i32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """One row each: `[B]`, and `[B, MAX_LOGPROBS]` where log-probabilities were asked for."""

    tokens: jax.Array  # i32
    is_finite: jax.Array  # bool
    logprob: jax.Array | None = None
    top_ids: jax.Array | None = None
    top_logprobs: jax.Array | None = None


def sample(
    logits: jax.Array,
    rows: jax.Array,
    positions: jax.Array,
    params: SamplingRows,
    counts: TokenCounts,
    variant: str,
) -> Sampled:
    """Draw one token a row.

    logits f32 `[B, V]`; rows i32 `[B]` index params and counts; positions i32 `[B]` are those of
    the drawn tokens: noise depends on (seed, position) alone, so a row draws the same token in any
    batch.
    """
    is_finite = jnp.isfinite(logits).all(axis=-1)
    if variant == GREEDY:
        return Sampled(tokens=jnp.argmax(logits, axis=-1).astype(jnp.int32), is_finite=is_finite)
    mine = jax.tree.map(lambda leaf: leaf[rows], params)
    shaped = _penalise(logits, mine, jax.tree.map(lambda leaf: leaf[rows], counts))
    shaped = _add_bias(shaped, mine, positions)
    is_greedy = mine.temperature == 0.0
    temperature = jnp.where(is_greedy, jnp.float32(1), mine.temperature)
    kept = _filter(shaped / temperature[:, None], mine)
    drawn = jnp.argmax(kept + _noise(mine.seed, positions, logits.shape[1]), axis=-1)
    tokens = jnp.where(is_greedy, jnp.argmax(shaped, axis=-1), drawn).astype(jnp.int32)
    if variant == FULL:
        return Sampled(tokens=tokens, is_finite=is_finite)
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    top, ids = jax.lax.top_k(logprobs, min(MAX_LOGPROBS, logits.shape[1]))
    chosen = jnp.take_along_axis(logprobs, tokens[:, None], axis=1)[:, 0]
    return Sampled(
        tokens=tokens, is_finite=is_finite, logprob=chosen, top_ids=ids, top_logprobs=top
    )


def _penalise(logits: jax.Array, rows: SamplingRows, counts: TokenCounts) -> jax.Array:
    seen = counts.in_prompt | (counts.output > 0)
    factor = jnp.where(seen, rows.repetition[:, None], jnp.float32(1))
    logits = jnp.where(logits > 0, logits / factor, logits * factor)
    return (
        logits
        - rows.frequency[:, None] * counts.output.astype(jnp.float32)
        - rows.presence[:, None] * (counts.output > 0).astype(jnp.float32)
    )


def _add_bias(logits: jax.Array, rows: SamplingRows, positions: jax.Array) -> jax.Array:
    num_output = positions - rows.prompt_len
    active = num_output[:, None] < rows.bias_until
    values = jnp.where(active, rows.bias_values, jnp.float32(0))
    index = jnp.arange(logits.shape[0], dtype=jnp.int32)[:, None]
    return logits.at[index, rows.bias_ids].add(values, mode="drop")


def _filter(logits: jax.Array, rows: SamplingRows) -> jax.Array:
    """Logits with -inf where top-k, top-p or min-p rules a token out."""
    vocab = logits.shape[1]
    lowest = jnp.float32(-jnp.inf)
    k = jnp.where(rows.top_k > 0, jnp.minimum(rows.top_k, vocab), vocab)
    at_least = largest_threshold(
        logits, lambda cut: (logits >= cut[:, None]).sum(axis=-1, dtype=jnp.int32) >= k
    )
    logits = jnp.where(logits >= at_least[:, None], logits, lowest)
    probabilities = jax.nn.softmax(logits, axis=-1)

    def holds_top_p(cut: jax.Array) -> jax.Array:
        inside = jnp.where(probabilities >= cut[:, None], probabilities, jnp.float32(0))
        return inside.sum(axis=-1) >= rows.top_p

    cut = largest_threshold(probabilities, holds_top_p)
    cut = jnp.where(rows.top_p < 1.0, cut, jnp.float32(0))
    floor = rows.min_p * probabilities.max(axis=-1)
    return jnp.where(probabilities >= jnp.maximum(cut, floor)[:, None], logits, lowest)


def largest_threshold(values: jax.Array, holds: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """The largest f32 threshold a row for which `holds` (true at -inf, then falling) is still true.

    Bisects over the integers that order like floats: 32 halvings are exact.
    """

    def to_float(ordered: jax.Array) -> jax.Array:
        bits = jnp.where(ordered < 0, ordered ^ jnp.int32(0x7FFFFFFF), ordered)
        return jax.lax.bitcast_convert_type(bits, jnp.float32)

    infinity = jnp.int32(0x7F800000)
    low = jnp.full(values.shape[:1], -infinity - 1, jnp.int32)  # orders as -inf
    high = jnp.full(values.shape[:1], infinity, jnp.int32)  # +inf

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = (low >> 1) + (high >> 1) + ((low | high) & 1)  # ceiling, without overflow
        good = holds(to_float(middle))
        return jnp.where(good, middle, low), jnp.where(good, high, middle - 1)

    return to_float(jax.lax.fori_loop(0, 32, halve, (low, high))[0])


def _noise(seeds: jax.Array, positions: jax.Array, vocab: int) -> jax.Array:
    """Gumbel noise f32 `[B, V]`: argmax(logits + noise) draws from softmax(logits)."""

    def one(seed: jax.Array, position: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(seed), position)
        return jax.random.gumbel(key, (vocab,), jnp.float32)

    return jax.vmap(one)(seeds, positions)


def count_sampled(counts: TokenCounts, rows: jax.Array, tokens: jax.Array) -> TokenCounts:
    return dataclasses.replace(counts, output=counts.output.at[rows, tokens].add(jnp.int32(1)))


def count_known(
    counts: TokenCounts, rows: jax.Array, tokens: jax.Array, is_output: jax.Array
) -> TokenCounts:
    """Count tokens that a prefill computed: prompt tokens by presence, earlier outputs by
    number.
    """
    return TokenCounts(
        in_prompt=counts.in_prompt.at[rows, tokens].max(is_output == 0),
        output=counts.output.at[rows, tokens].add(is_output),
    )
