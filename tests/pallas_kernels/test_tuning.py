"""The committed tuning tables: every LoRA entry is a configuration of the kernel as it is."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from pallas_kernels import lora_expand_triton, lora_rows_triton, lora_shrink_triton, tuning_table

CONFIGS: dict[str, Any] = {
    "lora_shrink": lora_shrink_triton.Config,
    "lora_expand": lora_expand_triton.Config,
    "lora_rows": lora_rows_triton.Config,
}
TABLES = sorted((Path(tuning_table.__file__).parent / "tuning").glob("*.json"))


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_lora_entries_are_configurations_with_what_was_measured(path: Path) -> None:
    table = json.loads(path.read_text())
    for op, config_class in CONFIGS.items():
        for key, entry in table.get(op, {}).items():
            found = tuning_table.tuned(op, key, config_class, device=path.stem)
            assert dataclasses.asdict(found) == entry["config"]
            assert all(us > 0 for us in entry["us"].values())


def test_small_batches_get_as_many_programs_as_large_ones() -> None:
    shrink, expand = lora_shrink_triton.Config.heuristic, lora_expand_triton.Config.heuristic
    for rows in (1, 8, 64, 256):
        sizes = {
            "num_tokens": rows,
            "num_modules": 3,
            "block_rows": 1,
            "num_rows": 64,
            "width": 4096,
        }
        programs = shrink(**sizes).num_shares * rows * 3
        assert programs >= min(48 * rows, 768)
        blocks = 96 // expand(num_tokens=rows, block_rows=1, width=12288).block_chunks
        assert blocks * rows >= min(96 * rows, 768)
    tiles = shrink(num_tokens=2048, num_modules=3, block_rows=64, num_rows=64, width=4096)
    assert (tiles.num_shares, tiles.tile_ranks) == (1, 64)  # 96 programs without dividing
    narrow = shrink(num_tokens=2048, num_modules=1, block_rows=64, num_rows=64, width=4096)
    assert (narrow.num_shares, narrow.tile_ranks) == (4, 16)
