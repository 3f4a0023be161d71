"""On a GPU: the whole step with the Triton kernels against transformers and PEFT."""

from __future__ import annotations

import random

import jax
import pytest

from tests.e2e.driver import Driver
from tests.e2e.test_oracle import check_rows
from tests.oracle.golden_files import MODELS

# float32 with full-precision matmuls; what is left are the kernels' own tensor-core products
TOLERANCE = 2e-3
MODEL = {model.name: model for model in MODELS}


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")
@pytest.mark.parametrize("name", ["llama_gqa", "llama_mha", "mistral", "qwen3"])
def test_a_mixed_batch_agrees_with_transformers_and_peft(name: str) -> None:
    model = MODEL[name]
    golden = model.arrays()
    names = ("base", *model.adapters)
    with jax.default_matmul_precision("highest"):
        driver = Driver(
            model.base, [model.adapter(a) for a in model.adapters],
            max_num_seqs=max(8, len(names)), max_num_tokens=128, kernels="triton",
        )  # fmt: skip
    for prompt in ("short", "long"):
        tokens = golden[f"tokens.{prompt}"].tolist()
        rows = [
            (tokens, slot, golden[f"logits.{name}.{prompt}"]) for slot, name in enumerate(names)
        ]
        check_rows(driver, rows, random.Random(0), tolerance=TOLERANCE)
