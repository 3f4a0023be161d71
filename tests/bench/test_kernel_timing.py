import jax.numpy as jnp
import pytest

from bench.floors import LAUNCH_S, SMALL_S, Peaks, limit_s
from bench.kernel_timing import compile_calls, time_calls, time_chain


def test_every_input_is_used_once() -> None:
    inputs = [(jnp.full((4,), i),) for i in range(3)]
    program = compile_calls(lambda x: x + 1, inputs, num_calls=3)
    assert [int(out[0]) for out in program(inputs, ())] == [1, 2, 3]


def test_more_calls_than_inputs_are_refused() -> None:
    with pytest.raises(ValueError, match="num_calls: got 2, allowed: at most 1"):
        compile_calls(lambda x: x, [(jnp.zeros(2),)], num_calls=2)


def test_times_are_of_one_call() -> None:
    inputs = [(jnp.full((256, 256), float(i)),) for i in range(4)]
    assert 0 < time_calls(lambda x: x @ x, inputs) < 1
    assert 0 < time_chain(lambda c, x: c * 0.5 + x, jnp.zeros((256, 256)), inputs) < 1


def test_floor_is_the_dearer_of_bytes_and_operations() -> None:
    peaks = Peaks(read_bytes_per_s=1e12, flops_per_s=1e14)
    assert peaks.floor_s(1e9, 1e9) == 1e9 / 1e12
    assert peaks.floor_s(1e3, 1e12) == 1e12 / 1e14


def test_small_floors_are_judged_by_launch_and_large_ones_by_share() -> None:
    assert limit_s(SMALL_S / 2, 0.5) == SMALL_S / 2 + LAUNCH_S
    assert limit_s(2 * SMALL_S, 0.5) == 4 * SMALL_S
