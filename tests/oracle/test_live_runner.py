"""The engine's runner beside transformers and PEFT, live, on models and adapters made up for it.

Nothing recorded is involved: a mixed batch of the base and five adapters goes through the runner,
in uneven chunks, and every row's logits are compared with those of PEFT for that adapter alone.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoints.model_config import TARGET_MODULES
from tests.checkpoints.fixtures import tiny_config, write_adapter, write_hf_model
from tests.e2e.driver import Driver
from tests.e2e.test_oracle import check_rows
from tests.oracle.test_live_oracle import FAMILIES, load_live, run_live

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("default")]


def random_adapter(rng: random.Random) -> dict[str, Any]:
    """Arguments of `write_adapter`: a rank and an alpha for each of some modules."""
    targets = rng.sample(TARGET_MODULES, rng.randint(1, len(TARGET_MODULES)))
    return {
        "targets": targets,
        "ranks": {module: rng.choice([1, 4, 7, 8, 16, 33, 64]) for module in targets},
        "alpha": {module: rng.choice([1, 8, 16, 32]) for module in targets},
        "rslora": rng.random() < 0.5,
        "layers": rng.choice([None, None, [0], [1]]),
        "dtype": rng.choice(["float32", "bfloat16"]),
        "magnitude": 0.5,
    }


@pytest.mark.row(32)
@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixed_batch_of_the_runner_agrees_with_peft(family: str, tp: int, tmp_path: Path) -> None:
    rng = random.Random(f"{family} {tp}")
    config = tiny_config(**{"num_kv_heads": rng.choice([1, 2, 4])} | FAMILIES[family])
    base = str(tmp_path / "base")
    write_hf_model(base, config, seed=rng.randrange(1000))
    paths = [str(tmp_path / f"adapter-{i}") for i in range(5)]
    for seed, path in enumerate(paths):
        write_adapter(path, config, seed=seed, **random_adapter(rng))
    driver = Driver(base, paths, tp=tp)
    rows = []
    for slot, path in enumerate([None, *paths]):
        tokens = [rng.randrange(config.vocab_size) for _ in range(rng.randint(10, 40))]
        wanted = run_live(load_live(base, path), np.array(tokens, np.int32))
        rows.append((tokens, slot, wanted))
    check_rows(driver, rows, rng)
