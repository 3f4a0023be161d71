"""Sampling against sorting oracles, and the laws that make it independent of the batch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sloraj.runner.rows import NUM_BIAS
from sloraj.sampler import (
    FULL,
    GREEDY,
    LOGPROBS,
    SamplingRows,
    TokenCounts,
    _filter,
    count_known,
    count_sampled,
    largest_threshold,
    sample,
)

VOCAB = 257


def make_rows(num_rows: int = 4, **values: object) -> SamplingRows:
    """Rows with neutral parameters; `values` are scalars or one value a row."""
    floats = ("temperature", "top_p", "min_p", "presence", "frequency", "repetition")
    rows = SamplingRows(
        **{name: jnp.zeros(num_rows, jnp.float32) for name in floats},
        **{name: jnp.zeros(num_rows, jnp.int32) for name in ("top_k", "seed", "prompt_len")},
        bias_ids=jnp.zeros((num_rows, NUM_BIAS), jnp.int32),
        bias_values=jnp.zeros((num_rows, NUM_BIAS), jnp.float32),
        bias_until=jnp.zeros((num_rows, NUM_BIAS), jnp.int32),
    )
    neutral: dict[str, object] = {"temperature": 1.0, "top_p": 1.0, "repetition": 1.0}
    fields = {}
    for name, value in (neutral | values).items():
        old = getattr(rows, name)
        fields[name] = jnp.broadcast_to(jnp.asarray(value, old.dtype), old.shape)
    return SamplingRows(**{**{f: getattr(rows, f) for f in rows.__dataclass_fields__}, **fields})


def empty_counts(num_rows: int, vocab_size: int) -> TokenCounts:
    return TokenCounts(
        in_prompt=jnp.zeros((num_rows, vocab_size), jnp.bool_),
        output=jnp.zeros((num_rows, vocab_size), jnp.int32),
    )


def random_logits(seed: int, num_rows: int = 4) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(num_rows, VOCAB)).astype(np.float32) * 3


def draw(
    logits: np.ndarray,
    rows: SamplingRows,
    variant: str = FULL,
    position: int = 5,
    counts: TokenCounts | None = None,
) -> np.ndarray:
    n = logits.shape[0]
    counts = empty_counts(n, VOCAB) if counts is None else counts
    index = jnp.arange(n, dtype=jnp.int32)
    positions = jnp.full(n, position, jnp.int32)
    return np.asarray(sample(jnp.asarray(logits), index, positions, rows, counts, variant).tokens)


@pytest.mark.parametrize("k", [1, 2, 17, VOCAB])
def test_threshold_is_the_kth_largest_value(k: int) -> None:
    values = random_logits(k)
    values[0, :5] = [-np.inf, 0.0, -0.0, np.float32(1e-40), -np.float32(1e-40)]
    found = largest_threshold(
        jnp.asarray(values),
        lambda cut: (jnp.asarray(values) >= cut[:, None]).sum(axis=-1, dtype=jnp.int32) >= k,
    )
    expected = np.sort(values, axis=-1)[:, -k]
    np.testing.assert_array_equal(np.asarray(found), expected)


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999])
def test_top_p_keeps_the_smallest_set_that_holds_the_mass(top_p: float) -> None:
    logits = random_logits(int(top_p * 1000))
    kept = np.isfinite(np.asarray(_filter(jnp.asarray(logits), make_rows(top_p=top_p))))
    exact = np.exp(logits.astype(np.float64))
    exact /= exact.sum(axis=-1, keepdims=True)
    for row in range(4):
        order = np.argsort(-exact[row])
        size = int(np.searchsorted(np.cumsum(exact[row][order]), top_p - 1e-6)) + 1
        assert set(np.flatnonzero(kept[row])) == set(order[:size])


def test_min_p_keeps_what_is_within_a_factor_of_the_best() -> None:
    logits = random_logits(1)
    kept = np.isfinite(np.asarray(_filter(jnp.asarray(logits), make_rows(min_p=0.2))))
    expected = logits - logits.max(axis=-1, keepdims=True) >= np.log(0.2)
    np.testing.assert_array_equal(kept, expected)


def test_top_k_of_one_is_greedy() -> None:
    logits = random_logits(2)
    np.testing.assert_array_equal(draw(logits, make_rows(top_k=1)), logits.argmax(axis=-1))


@pytest.mark.parametrize("variant", [GREEDY, FULL, LOGPROBS])
def test_temperature_zero_is_greedy_in_every_variant(variant: str) -> None:
    logits = random_logits(3)
    tokens = draw(logits, make_rows(temperature=0.0), variant)
    np.testing.assert_array_equal(tokens, logits.argmax(axis=-1))


def test_a_tiny_temperature_is_greedy() -> None:
    logits = random_logits(4)
    np.testing.assert_array_equal(draw(logits, make_rows(temperature=1e-6)), logits.argmax(axis=-1))


def test_the_same_seed_and_position_draw_the_same_token_in_any_batch() -> None:
    logits = random_logits(5, num_rows=1)
    alone = draw(logits, make_rows(1, seed=7))
    crowd = np.concatenate([random_logits(6, num_rows=2), logits, random_logits(8, num_rows=1)])
    together = draw(crowd, make_rows(4, seed=[1, 2, 7, 4]))
    assert together[2] == alone[0]


def test_draws_follow_the_softmax() -> None:
    logits = np.full((1, VOCAB), -np.inf, np.float32)
    logits[0, :3] = np.log([0.6, 0.3, 0.1])
    rows = make_rows(1, seed=11)
    one = jax.jit(
        lambda position: sample(
            jnp.asarray(logits), jnp.zeros(1, jnp.int32), position, rows,
            empty_counts(1, VOCAB), FULL,
        ).tokens[0]
    )  # fmt: skip
    tokens = [int(one(jnp.full(1, p, jnp.int32))) for p in range(2000)]
    share = np.bincount(tokens, minlength=3)[:3] / len(tokens)
    np.testing.assert_allclose(share, [0.6, 0.3, 0.1], atol=4 * np.sqrt(0.25 / 2000))


def test_penalties_follow_their_definitions() -> None:
    counts = TokenCounts(
        in_prompt=jnp.zeros((1, VOCAB), jnp.bool_).at[0, 3].set(True),
        output=jnp.zeros((1, VOCAB), jnp.int32).at[0, 4].set(2),
    )
    for token in (3, 4):  # each leads by a margin smaller than its penalty
        crafted = np.full((1, VOCAB), -10, np.float32)
        crafted[0, [token, 10]] = [5.0, 4.6]
        rows = make_rows(1, temperature=0.0, repetition=1.5, frequency=0.25, presence=0.5)
        assert draw(crafted, rows, counts=counts)[0] == 10
    neutral = make_rows(1, temperature=0.0)
    assert draw(crafted, neutral, counts=counts)[0] == 4


def test_bias_moves_the_choice_until_its_limit() -> None:
    logits = np.zeros((1, VOCAB), np.float32)
    logits[0, 5] = 1.0
    rows = make_rows(1, temperature=0.0, prompt_len=10)
    ids = rows.bias_ids.at[0, 0].set(5)
    values = rows.bias_values.at[0, 0].set(-jnp.inf)
    until = rows.bias_until.at[0, 0].set(3)
    fields = {f: getattr(rows, f) for f in rows.__dataclass_fields__}
    rows = SamplingRows(**(fields | {"bias_ids": ids, "bias_values": values, "bias_until": until}))
    assert draw(logits, rows, position=12)[0] != 5  # third output token: held down
    assert draw(logits, rows, position=13)[0] == 5


def test_non_finite_logits_are_flagged_by_row() -> None:
    logits = random_logits(10)
    logits[1, 7] = np.nan
    logits[3, 0] = np.inf
    index = jnp.arange(4, dtype=jnp.int32)
    drawn = sample(jnp.asarray(logits), index, index, make_rows(), empty_counts(4, VOCAB), GREEDY)
    np.testing.assert_array_equal(np.asarray(drawn.is_finite), [True, False, True, False])


def test_logprobs_are_of_the_unmodified_logits() -> None:
    logits = random_logits(12, num_rows=1)
    index = jnp.zeros(1, jnp.int32)
    drawn = sample(
        jnp.asarray(logits), index, index, make_rows(1, temperature=0.0, min_p=0.5),
        empty_counts(1, VOCAB), LOGPROBS,
    )  # fmt: skip
    exact = logits[0] - np.log(np.exp(logits[0].astype(np.float64)).sum())
    best = np.argsort(-exact)[:20]
    assert drawn.top_ids is not None and drawn.top_logprobs is not None
    assert drawn.logprob is not None
    np.testing.assert_array_equal(np.asarray(drawn.top_ids)[0], best)
    np.testing.assert_allclose(np.asarray(drawn.top_logprobs)[0], exact[best], rtol=1e-5)
    np.testing.assert_allclose(np.asarray(drawn.logprob)[0], exact.max(), rtol=1e-5)


def test_counts_tell_prompt_from_output() -> None:
    counts = empty_counts(2, VOCAB)
    rows = jnp.asarray([0, 0, 0, 1], jnp.int32)
    tokens = jnp.asarray([5, 5, 6, 7], jnp.int32)
    counts = count_known(counts, rows, tokens, jnp.asarray([0, 0, 1, 1], jnp.int32))
    counts = count_sampled(counts, jnp.asarray([0], jnp.int32), jnp.asarray([6], jnp.int32))
    assert np.flatnonzero(np.asarray(counts.in_prompt)[0]).tolist() == [5]
    assert np.asarray(counts.output)[0, [5, 6]].tolist() == [0, 2]
    assert np.asarray(counts.output)[1, 7] == 1
