"""Adapters without files: random weights of given ranks, as the paper's dummy adapters.

Weights are uniform in [-1e-3, 1e-3] (S-LoRA's dummy loader). One adapter of each rank and choice of
modules is drawn and packed; every other one has memory of its own with the same magnitudes under
signs of its own, which are as uniform, differ from every other's throughout, and cost one pass over
the bytes. So no two adapters have equal contents, and each is really sent and really read.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from bench.settings import MODULES
from checkpoints.model_config import ModelConfig
from sloraj.adapters.layout import Allocate, pack_adapter
from sloraj.adapters.reader import adapter_loader
from sloraj.batch import PackedAdapter
from sloraj.config import EngineConfig, PoolLayout, resolve

WORDS = 32  # of 64 bits, whose signs are drawn; they repeat along a page, not from page to page
SIGNS = {2: 0x8000800080008000, 4: 0x8000000080000000}  # bits of a word, by bytes an element

Loaded = tuple[PackedAdapter, dict[str, Any]]


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


def random_path(rank: int, number: int, modules: tuple[str, ...] = MODULES) -> str:
    """What a loader below takes for adapter `number`: the same adapter for the same path."""
    return f"random:{rank}:{number}:{'+'.join(modules)}"


def _draw(rank: int, config: ModelConfig, modules: tuple[str, ...]) -> _Weights:
    rng = np.random.default_rng(rank)
    drawn = {}
    for layer in range(config.num_layers):
        for name in modules:
            size_in, size_out = config.module_shape(name)
            a = rng.random((rank, size_in), np.float32) * 2e-3 - 1e-3
            b = rng.random((size_out, rank), np.float32) * 2e-3 - 1e-3
            drawn[layer, name] = _Module(a, b, 16 / rank, rank)
    return _Weights(f"random-{rank}", drawn, rank)


def random_adapter_loader(
    config: ModelConfig, layout: PoolLayout, max_rank: int, allocate: Allocate = np.empty
) -> Callable[[str], Loaded]:
    """A `load_adapter` for build_core, of the paths that `random_path` makes."""
    drawn: dict[tuple[int, str], PackedAdapter] = {}
    lock = threading.Lock()  # loads run in several threads; each kind is drawn once

    def load(path: str) -> Loaded:
        _, rank_text, number, *rest = path.split(":")
        rank, names = int(rank_text), rest[0] if rest else "+".join(MODULES)
        assert rank <= max_rank
        with lock:
            if (rank, names) not in drawn:
                weights = _draw(rank, config, tuple(names.split("+")))
                drawn[rank, names] = pack_adapter(weights, layout, config)
        first = drawn[rank, names]
        pages = allocate(first.pages.shape, first.pages.dtype)
        _flip_signs(first.pages, pages, seed=int(number))
        packed = dataclasses.replace(first, version_id=path, pages=pages)
        return packed, {"rank": rank, "path": path}

    return load


def _flip_signs(source: np.ndarray, out: np.ndarray, seed: int) -> None:
    """Write `source [pages, layers, elements]` to `out`, with signs drawn by the seed."""
    num_pages, num_layers, _ = source.shape
    words = np.random.default_rng(seed).integers(
        0, 2**64, (num_pages, num_layers, 1, WORDS), np.uint64
    ) & np.uint64(SIGNS[source.itemsize])
    shape = (num_pages, num_layers, -1, WORDS)
    np.bitwise_xor(
        source.view(np.uint64).reshape(shape), words, out=out.view(np.uint64).reshape(shape)
    )


def random_or_read_loader(
    config: ModelConfig, layout: PoolLayout, max_rank: int, allocate: Allocate = np.empty
) -> Callable[[str], Loaded]:
    """As `random_adapter_loader`; other paths are adapter directories, read as the engine does."""
    draw = random_adapter_loader(config, layout, max_rank, allocate)
    num_processes = resolve(EngineConfig(model=""), jax.default_backend()).loader_processes or 0
    read = adapter_loader(config, layout, max_rank, allocate, num_processes)

    def load(path: str) -> Loaded:
        return (draw if path.startswith("random:") else read)(path)

    return load
