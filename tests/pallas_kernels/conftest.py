"""Kernel tests run under strict promotion; those marked gpu are skipped where there is none."""

import os
from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(autouse=True)
def strict_promotion() -> Iterator[None]:
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    needs_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if needs_gpu and not _has_gpu():
        for item in needs_gpu:
            item.add_marker(pytest.mark.skip(reason="no GPU (JAX_PLATFORMS=cuda selects one)"))


def _has_gpu() -> bool:
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        return False
    return jax.default_backend() == "gpu"
