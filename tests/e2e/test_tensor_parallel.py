"""Tensor parallelism on forced CPU devices: the same tokens, and no collective but the paper's."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest

from checkpoints.model_config import TARGET_MODULES, ModelConfig
from tests.checkpoints.fixtures import tiny_config, write_adapter, write_hf_model
from tests.e2e.driver import Driver

RANKS = (4, 64, 6, 17, 33, 8)  # 6, 17 and 33 are not divisible by 4
MAX_RANK = 64
COLLECTIVE = re.compile(
    r"= (\w+)\[([\d,]*)\]\S* "
    r"(all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast)"
    r"(?:-start)?\("
)


def write_all(directory: Path, config: ModelConfig) -> list[str]:
    write_hf_model(directory / "base", config, seed=5)
    rng = random.Random(1)
    paths = []
    for index, rank in enumerate(RANKS):
        targets = TARGET_MODULES if index < 2 else rng.sample(TARGET_MODULES, rng.randint(1, 6))
        path = directory / f"adapter{index}"
        write_adapter(path, config, seed=index, ranks=rank, targets=targets)
        paths.append(str(path))
    return paths


@pytest.mark.parametrize("num_kv_heads", [4, 2, 1], ids=["mha", "gqa", "one-kv-head"])
def test_every_mesh_size_gives_the_same_tokens(num_kv_heads: int, tmp_path: Path) -> None:
    config = tiny_config(num_kv_heads=num_kv_heads, head_dim=32, vocab_size=101)
    paths = write_all(tmp_path, config)
    rng = random.Random(2)
    prompts = [
        ([rng.randrange(config.vocab_size) for _ in range(rng.randint(2, 7))], slot)
        for slot in (0, 1, 2, 3, 4, 5, 6, 2)
    ]
    tokens = {
        tp: Driver(str(tmp_path / "base"), paths, tp=tp, max_rank=MAX_RANK).greedy(prompts, 12)
        for tp in (1, 2, 4)
    }
    assert tokens[2] == tokens[1]
    assert tokens[4] == tokens[1]
    assert len({tuple(t) for t in tokens[1]}) > 4  # the adapters do act


def expected_collectives(
    config: ModelConfig, tp: int, num_tokens: int, num_logits: int
) -> list[tuple[str, int]]:
    """(kind, bytes of the result a device holds), from the formulas of S-LoRA section 6.2."""
    d, r, t = config.hidden_size, MAX_RANK, num_tokens
    layer = [
        ("all-gather", 3 * t * r * 4),  # q, k, v: rank rows of all devices
        ("all-reduce", t * r * 4),  # o: partial shrink
        ("all-reduce", t * d * 4),  # base o, with the adapters' deltas in it
        ("all-gather", 2 * t * r * 4),  # gate, up
        ("all-reduce", t * r * 4),  # down
        ("all-reduce", t * d * 4),  # base down
    ]
    vocab = -(-config.vocab_size // tp) * tp
    ends = [("all-reduce", t * d * 4), ("all-gather", num_logits * vocab * 4)]
    return sorted(layer * config.num_layers + ends)


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_the_compiled_step_has_exactly_the_papers_collectives(tp: int, tmp_path: Path) -> None:
    config = tiny_config(vocab_size=101)
    write_hf_model(tmp_path / "base", config, seed=5)
    driver = Driver(str(tmp_path / "base"), tp=tp, max_rank=MAX_RANK)
    for key, num_tokens in ((driver.mixed, 64), (driver.decode, 8)):
        found = []
        for dtype, shape, kind in COLLECTIVE.findall(driver.runner.program_text(key)):
            assert dtype == "f32"
            size = 4
            for n in filter(None, shape.split(",")):
                size *= int(n)
            found.append((kind, size))
        expected = [] if tp == 1 else expected_collectives(config, tp, num_tokens, 8)
        assert sorted(found) == expected
