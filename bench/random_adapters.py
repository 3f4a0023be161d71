"""Adapters without files: random weights of given ranks on q, k, v, o, as the paper's dummy
adapters.

Weights are uniform in [-1e-3, 1e-3] (S-LoRA's dummy loader). One adapter of each rank is drawn and
packed; the others are copies of it in memory of their own, so that each is really sent and really
read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from checkpoints.model_config import ModelConfig
from sloraj.adapters.layout import Allocate, pack_adapter
from sloraj.batch import PackedAdapter
from sloraj.build import adapter_loader
from sloraj.config import EngineConfig, PoolLayout, resolve

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclasses.dataclass(frozen=True)
class _Module:
    a: np.ndarray
    b: np.ndarray
    scaling: float
    rank: int


@dataclasses.dataclass(frozen=True)
class _Weights:
    version: str
    modules: dict[tuple[int, str], _Module]
    max_rank: int


def _draw(rank: int, config: ModelConfig, seed: int) -> _Weights:
    rng = np.random.default_rng(seed)
    modules = {}
    for layer in range(config.num_layers):
        for name in MODULES:
            size_in, size_out = config.module_shape(name)
            a = rng.random((rank, size_in), np.float32) * 2e-3 - 1e-3
            b = rng.random((size_out, rank), np.float32) * 2e-3 - 1e-3
            modules[layer, name] = _Module(a, b, 16 / rank, rank)
    return _Weights(f"random-{rank}", modules, rank)


def random_adapter_loader(
    config: ModelConfig, layout: PoolLayout, max_rank: int, allocate: Allocate = np.empty
) -> Callable[[str], tuple[PackedAdapter, dict[str, Any]]]:
    """A `load_adapter` for build_core: the path "random:RANK:NUMBER" is a new adapter of that
    rank.
    """
    drawn: dict[int, PackedAdapter] = {}

    def load(path: str) -> tuple[PackedAdapter, dict[str, Any]]:
        _, rank_text, _ = path.split(":")
        rank = int(rank_text)
        assert rank <= max_rank
        if rank not in drawn:
            drawn[rank] = pack_adapter(_draw(rank, config, rank), layout, config)
        pages = allocate(drawn[rank].pages.shape, drawn[rank].pages.dtype)
        np.copyto(pages, drawn[rank].pages)
        packed = dataclasses.replace(drawn[rank], version_id=path, pages=pages)
        return packed, {"rank": rank, "path": path}

    return load


def random_or_read_loader(
    config: ModelConfig, layout: PoolLayout, max_rank: int, allocate: Allocate = np.empty
) -> Callable[[str], tuple[PackedAdapter, dict[str, Any]]]:
    """As `random_adapter_loader`; other paths are adapter directories, read as the engine does."""
    draw = random_adapter_loader(config, layout, max_rank, allocate)
    num_processes = resolve(EngineConfig(model=""), jax.default_backend()).loader_processes or 0
    read = adapter_loader(config, layout, max_rank, allocate, num_processes)

    def load(path: str) -> tuple[PackedAdapter, dict[str, Any]]:
        return (draw if path.startswith("random:") else read)(path)

    return load
