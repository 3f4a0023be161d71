"""The sharding table: together, the devices' pieces are the checkpoint, each row and column
once.
"""

from __future__ import annotations

import numpy as np
import pytest

from checkpoints.hf_weights import expected_tensors
from sloraj.errors import ConfigError
from sloraj.model.weights import flat_rules
from sloraj.parallel.mesh import check_divisible
from tests.checkpoints.fixtures import tiny_config

CONFIGS = {
    "llama": tiny_config(),
    "mha": tiny_config(num_kv_heads=4),
    "qwen2": tiny_config(architecture="Qwen2ForCausalLM", qkv_bias=True),
    "qwen3": tiny_config(architecture="Qwen3ForCausalLM", qk_norm=True),
    "biased": tiny_config(qkv_bias=True, o_bias=True, mlp_bias=True, vocab_size=101),
}


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("name", CONFIGS)
def test_pieces_cover_every_checkpoint_element(name: str, tp: int) -> None:
    config = CONFIGS[name]
    covered = {t: np.zeros(shape, int) for t, shape in expected_tensors(config).items()}
    for rule in flat_rules(config, tp).values():
        for device in range(tp):
            rows = 0
            for piece in rule.pieces(device):
                part = covered[piece.tensor]
                part = part if piece.rows is None else part[piece.rows]
                part = part if piece.columns is None else part[:, piece.columns]
                part += 1
                rows += part.shape[0] + piece.pad_rows
            assert rows == rule.shape[0]
    for tensor, count in covered.items():
        is_split = any(k in tensor for k in ("q_proj", "gate", "up_proj", "embed", "lm_head"))
        is_split |= tensor.endswith(("o_proj.weight", "down_proj.weight"))
        if "k_proj" in tensor or "v_proj" in tensor:
            assert (count == max(1, tp // config.num_kv_heads)).all(), tensor
        else:
            assert (count == (1 if is_split else tp)).all(), tensor


@pytest.mark.parametrize(
    ("changes", "tp"),
    [
        ({"num_heads": 6, "num_kv_heads": 2, "head_dim": 16}, 4),
        ({"intermediate_size": 90}, 4),
        ({"num_heads": 12, "num_kv_heads": 3}, 2),
    ],
)
def test_a_model_that_does_not_divide_is_refused(changes: dict[str, int], tp: int) -> None:
    with pytest.raises(ConfigError, match="tensor_parallel_size"):
        check_divisible(tiny_config(**changes), tp)
