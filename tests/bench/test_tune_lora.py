"""The tuner of the LoRA kernels looks for what steps look up, and tries what can be launched."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import jax
import pytest

from bench import tune_lora
from bench.kernels_lora import MAX_RANK, make_world, step_tiles
from bench.lora_searches import OPS, TWO_KERNELS, RowsSearch, searches
from bench.tune_lora import keep, layers, search_one
from pallas_kernels.shapes import MODELS
from tests.pallas_kernels.test_legality import TRITON, adapters, lowered


@pytest.mark.parametrize(
    ("rows", "beside", "block_rows"), [([4], [], 1), ([], [256], 64), ([300], [], 64)]
)
def test_searches_are_for_the_keys_of_their_steps(
    rows: list[int], beside: list[int], block_rows: int
) -> None:
    (tokens,) = rows + beside
    found = list(searches(["demo"], rows, beside, ["attention"]))
    ops = [op for op in OPS if block_rows == 1 or op != "lora_rows"]
    assert {(search.op, search.modules) for search in found} == {
        (op, modules) for op in ops for modules in ((0, 1, 2), (3,))
    }
    for search in found:
        key = search.key(step_tiles(search.case, make_world(search.case)))
        assert f"num_tokens={tokens}," in key
        assert isinstance(search, RowsSearch) or f"block_rows={block_rows}," in key


def test_candidates_differ_and_divide_the_ranks() -> None:
    for rows, beside in (([64], []), ([], [256]), ([2048], [])):
        for search in searches(["llama-7b"], rows, beside, ["attention"]):
            tried = list(search.candidates())
            assert len(tried) == len(set(tried)) > 10
            assert (TWO_KERNELS in tried) == isinstance(search, RowsSearch)
            if search.op == "lora_shrink":
                assert all(1 <= config.num_shares <= MAX_RANK for config in tried)


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")
@pytest.mark.parametrize("op", OPS)
def test_what_is_timed_lowers_to_the_kernels_of_a_layer(op: str) -> None:
    wanted = {"lora_shrink": (2, 2), "lora_expand": (1, 1), "lora_rows": (2, 1)}  # two or one
    for search in searches(["llama-7b"], [64], [], ["attention"]):
        if search.op != op:
            continue
        search = dataclasses.replace(search, case=dataclasses.replace(search.case, num_layers=1))
        pool, slot_pages, _, tiles = adapters(MODELS["llama-7b"], 64, 1)
        rows = jax.eval_shape(search.rows)
        for config, num_kernels in zip(list(search.candidates())[:2], wanted[op], strict=True):
            program = lowered(layers(search, config), *rows, pool, slot_pages, tiles)
            assert program.count(TRITON) == num_kernels


@pytest.mark.parametrize(("best", "us"), [(0, [1.0, 9.0]), (2, [4.0, 2.0])])
def test_the_least_product_of_times_wins_and_two_kernels_need_no_entry(
    best: int, us: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    (search, _) = (s for s in searches(["demo"], [4], [], ["attention"]) if s.op == "lora_rows")
    tried = list(search.candidates())
    taken = {place: us if place == best else [3.0, 5.0] for place in range(len(tried))}
    times = [time for place in range(len(tried)) for time in taken[place]]
    monkeypatch.setattr(tune_lora, "layers", lambda search, config: lambda y, *more: y)
    monkeypatch.setattr(tune_lora, "time_compiled_chain", lambda *more: times.pop(0) * 1e-6)
    with ThreadPoolExecutor(2) as compilers:
        _, entry = search_one(search, compilers)
    assert not times  # each candidate at each rank
    if tried[best] is TWO_KERNELS:
        assert entry is None
    else:
        config = dataclasses.asdict(cast(Any, tried[best]))
        assert entry == {"config": config, "us": {"8": us[0], "64": us[1]}}


def test_one_kernel_stays_in_the_table_only_where_it_beats_two() -> None:
    entries = {"a": 1, "b": 2}
    keep(entries, "a", None)
    keep(entries, "b", {"config": {}})
    keep(entries, "c", None)
    assert entries == {"b": {"config": {}}}
