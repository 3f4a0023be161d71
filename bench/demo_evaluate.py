"""Exact-match accuracy of greedy decoding on held-out texts, without decoding.

Greedy decoding gives the right answer and stops if and only if every token of the answer, <eos>
included, is the most likely one after the prompt and the right tokens before it. So one forward
pass over the right answers measures it exactly.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.demo_adapters import PLANS
from bench.demo_data import BOS_TOKEN_ID, Rows, pack, tag_token, task_samples
from bench.demo_model import DEMO_CONFIG, Params, forward
from checkpoints.demo.tasks import BASE_TASK

_ROW_LENGTH = 128
_MAX_SEGMENTS = 32  # samples in a row of _ROW_LENGTH; the shortest sample has 6 tokens


def accuracies(
    params: Params,
    num_texts: int,
    *,
    tasks: Sequence[str] = (BASE_TASK.id, *PLANS),
    tagged: bool = False,
    lora: Params | None = None,
    scales: Params | None = None,
    dtype: Any = jnp.float32,
) -> dict[str, float]:
    """Share of `num_texts` held-out texts answered exactly, for each of `tasks`.

    Each task is asked for by its adapter in the stack `lora`, or, if `tagged`, by its tag and no
    adapter. Matrix products in float32 are true ones (no TF32).
    """

    result = {}
    with jax.default_matmul_precision("highest"):
        for task_id in tasks:
            rows = held_out_rows(task_id, num_texts, tag_token(task_id) if tagged else BOS_TOKEN_ID)
            adapter: tuple[Params | None, Params | None] = (None, None)
            if not tagged and task_id != BASE_TASK.id:
                index = list(PLANS).index(task_id)
                adapter = jax.tree.map(lambda x, i=index: x[i], (lora, scales))
            right = _is_right(params, *adapter, rows.tokens, rows.segments, dtype=dtype)
            result[task_id] = _share_of_right_samples(rows, np.asarray(right), num_texts)
    return result


@functools.partial(jax.jit, static_argnames="dtype")
def _is_right(
    params: Params,
    lora: Params | None,
    scales: Params | None,
    tokens: jax.Array,
    segments: jax.Array,
    *,
    dtype: Any,
) -> jax.Array:
    logits = forward(
        params, tokens[:, :-1], segments, config=DEMO_CONFIG, dtype=dtype, lora=lora, scales=scales
    )
    return jnp.argmax(logits, axis=-1) == tokens[:, 1:]


@functools.cache
def held_out_rows(task_id: str, num_texts: int, first_token: int) -> Rows:
    """The first `num_texts` held-out samples of a task; about 3.5 of them share a row."""
    samples = task_samples(random.Random(f"held out:{task_id}"), task_id, held_out=True)
    numbered = ((first_token, *next(samples)[1:]) for _ in range(num_texts))
    return pack(numbered, num_rows=num_texts // 2, row_length=_ROW_LENGTH)


def _share_of_right_samples(rows: Rows, right: np.ndarray, num_texts: int) -> float:
    sample = np.arange(len(right))[:, None] * _MAX_SEGMENTS + rows.segments
    present = np.unique(sample[rows.in_answer])
    wrong = np.unique(sample[rows.in_answer & ~right])
    if len(present) != num_texts:
        raise RuntimeError(f"{len(present)} samples in the rows, {num_texts} wanted")
    return 1.0 - len(wrong) / num_texts
