"""The tuner of the LoRA kernels looks for what steps look up, and tries what can be launched."""

from __future__ import annotations

from typing import Any

import pytest

from bench.kernels_lora import MAX_RANK, make_world
from bench.tune_lora import (
    ONE_KERNEL,
    OPS,
    TWO_KERNELS,
    candidates,
    keep,
    searches,
    single_rows,
)
from pallas_kernels.shapes import MODELS
from tests.pallas_kernels.test_legality import TRITON, adapters, bf16, lowered


@pytest.mark.parametrize(
    ("rows", "beside", "block_rows"), [([4], [], 1), ([], [256], 64), ([300], [], 64)]
)
def test_searches_are_for_the_keys_of_their_steps(
    rows: list[int], beside: list[int], block_rows: int
) -> None:
    (tokens,) = rows + beside
    found = list(searches(["demo"], rows, beside, ["attention"]))
    ops = OPS if block_rows == 1 else OPS[:2]
    assert {(search.op, search.modules) for search in found} == {
        (op, modules) for op in ops for modules in ((0, 1, 2), (3,))
    }
    for search in found:
        key = search.key(make_world(search.case))
        assert f"num_tokens={tokens}," in key
        assert search.op == ONE_KERNEL or f"block_rows={block_rows}," in key


def test_candidates_differ_and_divide_the_ranks() -> None:
    for rows, beside in (([64], []), ([], [256]), ([2048], [])):
        for search in searches(["llama-7b"], rows, beside, ["attention"]):
            tried = list(candidates(search))
            assert len(tried) == len(set(tried)) > 10
            assert (TWO_KERNELS in tried) == (search.op == ONE_KERNEL)
            if search.op == "lora_shrink":
                assert all(1 <= config.num_shares <= MAX_RANK for config in tried)


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")
def test_one_kernel_and_two_lower_for_the_same_rows() -> None:
    (search,) = (
        search
        for search in searches(["llama-7b"], [64], [], ["attention"])
        if search.op == ONE_KERNEL and len(search.modules) == 3
    )
    for config, num_kernels in zip(list(candidates(search))[:2], (2, 1), strict=True):

        def run(x: Any, *place: Any, config: Any = config) -> Any:
            return single_rows(x, place, search.modules, (4096, 4096, 4096), config)

        program = lowered(run, bf16(64, 4096), *adapters(MODELS["llama-7b"], 64, 1))
        assert program.count(TRITON) == num_kernels


def test_one_kernel_stays_in_the_table_only_where_it_beats_two() -> None:
    entries = {"a": 1, "b": 2}
    keep(entries, "a", None)
    keep(entries, "b", {"config": {}})
    keep(entries, "c", None)
    assert entries == {"b": {"config": {}}}
