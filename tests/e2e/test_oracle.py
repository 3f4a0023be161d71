"""The runner's logits against transformers + PEFT, and against merged weights in float64.

Every batch mixes base rows with adapters of all ranks and module subsets, prefilled in uneven
chunks and decoded token by token beside each other.
"""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from checkpoints.model_config import TARGET_MODULES
from sloraj.model.rope import max_context
from tests.checkpoints.fixtures import tiny_config, write_adapter, write_hf_model
from tests.e2e.driver import Driver
from tests.oracle import numpy_llama
from tests.oracle.golden_files import MODELS, PROMPTS, GoldenModel, relative_error

TOLERANCE = 1e-4  # relative, float32


def chunks(length: int, rng: random.Random) -> list[int]:
    """Sizes that add up to `length`; runs of single tokens are common."""
    sizes: list[int] = []
    while sum(sizes) < length:
        left = length - sum(sizes)
        sizes.append(min(left, rng.choice([1, 1, 1, 2, 5, 7])))
    return sizes


def check_rows(
    driver: Driver,
    rows: list[tuple[list[int], int, np.ndarray]],
    rng: random.Random,
    *,
    tolerance: float = TOLERANCE,
) -> None:
    """Drive (tokens, slot, expected logits [T, V]) rows together; compare after every chunk."""
    live = []
    for row, (tokens, slot, expected) in enumerate(rows):
        live.append((driver.open(tokens, slot, row), chunks(len(tokens), rng), expected))
    compared = 0
    while live:
        work = [(sequence, sizes.pop(0)) for sequence, sizes, _ in live]
        for (sequence, _, expected), (logits, _) in zip(live, driver.step(work), strict=True):
            wanted = expected[sequence.num_computed_tokens - 1]
            error = relative_error(logits[None], wanted[None])
            assert error < tolerance, (sequence.slot, sequence.num_computed_tokens, error)
            compared += 1
        live = [item for item in live if item[1]]
    assert compared > len(rows)


@pytest.mark.row(32)
@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_a_mixed_batch_agrees_with_transformers_and_peft(model: GoldenModel) -> None:
    golden = model.arrays()
    names = ("base", *model.adapters)
    driver = Driver(
        model.base, [model.adapter(a) for a in model.adapters], max_num_seqs=max(8, len(names)),
        max_num_tokens=128,
    )  # fmt: skip
    rng = random.Random(0)
    prompts = [golden[f"tokens.{prompt}"].tolist() for prompt in PROMPTS]
    # Dynamic scaling changes all keys at once past the original context, which is where we stop.
    fitting = [i for i, tokens in enumerate(prompts) if len(tokens) <= max_context(driver.config)]
    assert fitting
    for prompt, tokens in ((PROMPTS[i], prompts[i]) for i in fitting):
        rows = [
            (tokens, slot, golden[f"logits.{name}.{prompt}"]) for slot, name in enumerate(names)
        ]
        check_rows(driver, rows, rng)


@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
def test_a_mixed_batch_agrees_with_merged_weights(num_kv_heads: int, tmp_path: Path) -> None:
    config = tiny_config(num_kv_heads=num_kv_heads, head_dim=32 if num_kv_heads == 1 else 16)
    weights = write_hf_model(tmp_path / "base", config, seed=3)
    rng = random.Random(num_kv_heads)
    merged, paths = [{}], []
    for index, rank in enumerate((4, 64, 12, 8, 33, 16)):
        targets = rng.sample(TARGET_MODULES, rng.randint(1, 7)) if index else TARGET_MODULES
        path = tmp_path / f"adapter{index}"
        modules = write_adapter(
            path, config, seed=index, ranks={m: rng.choice([rank, 4]) for m in targets},
            targets=targets, layers=[1] if index == 3 else None, rslora=index % 2 == 1,
        )  # fmt: skip
        merged.append(numpy_llama.merge(modules))
        paths.append(str(path))
    driver = Driver(str(tmp_path / "base"), paths)
    rows = []
    for slot, deltas in enumerate(merged):
        tokens = [rng.randrange(config.vocab_size) for _ in range(rng.randint(20, 40))]
        rows.append((tokens, slot, numpy_llama.logits(config, weights, tokens, deltas)))
    check_rows(driver, rows, rng)
