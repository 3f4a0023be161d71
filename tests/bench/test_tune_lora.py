"""The tuner of the LoRA kernels looks for what steps look up, and tries what can be launched."""

from __future__ import annotations

import pytest

from bench.kernels_lora import MAX_RANK, make_world
from bench.tune_lora import candidates, searches


@pytest.mark.parametrize(
    ("rows", "beside", "block_rows"), [([4], [], 1), ([], [256], 64), ([300], [], 64)]
)
def test_searches_are_for_the_keys_of_their_steps(
    rows: list[int], beside: list[int], block_rows: int
) -> None:
    (tokens,) = rows + beside
    found = list(searches(["demo"], rows, beside, ["attention"]))
    assert {(search.op, search.modules) for search in found} == {
        (op, modules) for op in ("lora_shrink", "lora_expand") for modules in ((0, 1, 2), (3,))
    }
    for search in found:
        key = search.key(make_world(search.case))
        assert f"block_rows={block_rows}," in key and f"num_tokens={tokens}," in key


def test_candidates_differ_and_divide_the_ranks() -> None:
    for rows, beside in (([64], []), ([], [256]), ([2048], [])):
        for search in searches(["llama-7b"], rows, beside, ["attention"]):
            tried = list(candidates(search))
            assert len(tried) == len(set(tried)) > 10
            if search.op == "lora_shrink":
                assert all(1 <= config.num_shares <= MAX_RANK for config in tried)
