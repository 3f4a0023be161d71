"""Laws of the host arena: live arrays never overlap, and what nobody refers to is used again."""

from __future__ import annotations

import gc
import random
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest

from sloraj.runner.arena import ALIGNMENT, HostArena

SLAB = 16 * ALIGNMENT
U8 = np.dtype(np.uint8)


def test_an_array_has_the_shape_and_dtype_asked_for_and_is_writable() -> None:
    array = HostArena(None, SLAB).allocate((3, 5), np.dtype(ml_dtypes.bfloat16))
    array[...] = 1.5
    assert array.shape == (3, 5) and array.dtype == ml_dtypes.bfloat16
    assert array.flags.c_contiguous and array.ctypes.data % 16 == 0
    assert (array == 1.5).all()


def test_memory_comes_back_with_the_last_view() -> None:
    arena = HostArena(None, SLAB)
    array = arena.allocate((2, ALIGNMENT), U8)
    view = array[1:].reshape(-1, 2)
    del array
    gc.collect()
    assert arena.num_used_bytes == 2 * ALIGNMENT
    del view
    gc.collect()
    assert arena.num_used_bytes == 0


def test_more_than_a_slab_gets_a_slab_of_its_own_and_only_one_free_slab_is_kept() -> None:
    arena = HostArena(None, SLAB)
    large = arena.allocate((3 * SLAB,), U8)
    small = [arena.allocate((SLAB,), U8) for _ in range(3)]
    assert arena.num_bytes == 6 * SLAB
    del large, small
    gc.collect()
    assert arena.num_used_bytes == 0
    assert arena.num_bytes == 3 * SLAB


@pytest.mark.parametrize("seed", range(4))
def test_random_allocations_never_overlap_and_all_is_free_in_the_end(seed: int) -> None:
    choices = random.Random(seed)
    arena = HostArena(None, SLAB)
    live: list[tuple[int, np.ndarray]] = []
    for number in range(600):
        if live and choices.random() < 0.5:
            live.pop(choices.randrange(len(live)))
        else:
            array = arena.allocate((choices.randint(0, 6 * ALIGNMENT),), U8)
            array.fill(number % 256)
            live.append((number % 256, array))
        arena.check_integrity()
        assert all((array == value).all() for value, array in live)
    assert arena.num_bytes <= 40 * SLAB
    live.clear()
    del array
    gc.collect()
    assert arena.num_used_bytes == 0
    arena.check_integrity()


def test_threads_get_memory_of_their_own() -> None:
    arena = HostArena(None, SLAB)

    def work(value: int) -> bool:
        for _ in range(100):
            array = arena.allocate((3 * ALIGNMENT,), U8)
            array.fill(value)
            if not (array == value).all():
                return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))
    arena.check_integrity()
