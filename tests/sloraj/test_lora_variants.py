"""The least program that serves a step's adapters is chosen, and never a lesser one."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from sloraj.runner.lora_variants import MODULES, SlotVariants

ALL_VARIANTS = tuple(MODULES)


def segments(*modules: int) -> np.ndarray:
    """Segments of an adapter that has `modules` in the second of three layers alone."""
    table = np.zeros((3, 7, 4), np.int32)
    table[1, list(modules)] = (1, 0, 0, 8)
    return table


def slots(compiled: tuple[str, ...] = ALL_VARIANTS) -> SlotVariants:
    variants = SlotVariants(compiled)
    variants.bind(1, segments(0, 2))
    variants.bind(2, segments(3))
    variants.bind(3, segments(0, 6))
    variants.bind(4, segments())
    return variants


@pytest.mark.parametrize(
    ("rows", "variant"),
    [
        ([], "base"),
        ([0, 0], "base"),
        ([4], "base"),
        ([1], "attention"),
        ([0, 2, 1], "attention"),
        ([3], "all"),
        ([0, 1, 3, 2], "all"),
    ],
)
def test_a_step_pays_for_the_modules_of_its_rows(rows: list[int], variant: str) -> None:
    assert slots().of(rows) == variant


def test_a_slot_means_what_it_was_bound_to_last() -> None:
    variants = slots()
    variants.bind(3, segments(1))
    assert variants.of([3]) == "attention"
    variants.bind(1, segments(5))
    assert variants.of([1]) == "all"


def test_a_slot_has_the_largest_rank_it_was_bound_to_last() -> None:
    variants = slots()
    table = segments(0, 2)
    table[1, 2, 3] = 64
    variants.bind(1, table)
    assert [variants.rank_of(slot) for slot in (0, 1, 2, 4, 9)] == [0, 64, 8, 0, 0]


def test_a_variant_that_was_not_compiled_gives_way_to_a_greater_one() -> None:
    assert slots(("all",)).of([0]) == "all"
    assert slots(("base", "all")).of([1]) == "all"
    assert slots(("base", "all")).of([0]) == "base"


def test_every_variant_holds_the_one_before() -> None:
    sets = [set(modules) for modules in MODULES.values()]
    assert all(smaller < larger for smaller, larger in itertools.pairwise(sets))
    assert sets[-1] == set(range(7))
