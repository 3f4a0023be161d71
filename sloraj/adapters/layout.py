"""Adapter weights in pool layout: per layer one run of chunks, cut into pages (docs/design.md).

Letters: L layers, N pages of the version, D devices (tp), E elements a page and device, R rank.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from checkpoints.model_config import TARGET_MODULES, ModelConfig
from sloraj.batch import PackedAdapter
from sloraj.config import CHUNK, PoolLayout, div_ceil
from sloraj.errors import AdapterLoadError

KIND_ABSENT = 0
KIND_LORA = 1
SEGMENT_FIELDS = 4  # kind, a_chunk, b_chunk, rank
COLUMN_MODULES = frozenset({"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"})
KV_MODULES = frozenset({"k_proj", "v_proj"})

Array = np.ndarray[Any, np.dtype[Any]]
Allocate = Callable[[tuple[int, ...], np.dtype[Any]], Array]


class LoraModuleLike(Protocol):
    """One target module's pair of matrices: `checkpoints.peft_adapter.LoraModule`."""

    @property
    def a(self) -> Array: ...  # [rank, in]

    @property
    def b(self) -> Array: ...  # [out, rank]

    @property
    def scaling(self) -> float: ...

    @property
    def rank(self) -> int: ...


class AdapterWeightsLike(Protocol):
    """One adapter as read from disk: `checkpoints.peft_adapter.AdapterWeights`."""

    @property
    def version(self) -> str: ...  # content hash

    @property
    def modules(self) -> Mapping[tuple[int, str], LoraModuleLike]: ...

    @property
    def max_rank(self) -> int: ...


@dataclasses.dataclass(frozen=True, slots=True)
class _Split:
    """How one module's A and B are cut for the devices. All sizes are per device."""

    is_column: bool
    in_size: int
    out_size: int

    def num_a_rows(self, rank: int, tp: int) -> int:
        return div_ceil(rank, tp) if self.is_column else rank

    def num_a_chunks(self, rank: int, tp: int) -> int:
        return self.num_a_rows(rank, tp) * div_ceil(self.in_size, CHUNK)

    def num_b_chunks(self, rank: int) -> int:
        return rank * div_ceil(self.out_size, CHUNK)


def pool_dtype(layout: PoolLayout) -> np.dtype[Any]:
    """The numpy dtype of a layout's name; bfloat16 comes from ml_dtypes."""
    return np.dtype(ml_dtypes.bfloat16 if layout.dtype == "bfloat16" else layout.dtype)


def _split(module: str, layout: PoolLayout, config: ModelConfig) -> _Split:
    in_size, out_size = config.module_shape(module)
    if module in KV_MODULES:
        return _Split(True, in_size, layout.num_kv_heads * layout.head_dim)
    if module in COLUMN_MODULES:
        return _Split(True, in_size, out_size // layout.tp)
    return _Split(False, in_size // layout.tp, out_size // layout.tp)


def _num_pages(chunks_by_layer: Mapping[int, int], layout: PoolLayout) -> int:
    return div_ceil(max(chunks_by_layer.values(), default=0), layout.chunks_per_page)


def num_adapter_pages(
    ranks: Mapping[tuple[int, str], int], layout: PoolLayout, config: ModelConfig
) -> int:
    """Pages of a version with module ranks `ranks[layer, module]`: its largest layer decides."""
    splits = {module: _split(module, layout, config) for module in TARGET_MODULES}
    chunks: dict[int, int] = {}
    for (layer, module), rank in ranks.items():
        rank, split = layout.padded_rank or rank, splits[module]
        needed = split.num_a_chunks(rank, layout.tp) + split.num_b_chunks(rank)
        chunks[layer] = chunks.get(layer, 0) + needed
    return _num_pages(chunks, layout)


def max_adapter_pages(layout: PoolLayout, config: ModelConfig, max_rank: int) -> int:
    """Pages of the largest version possible: `max_rank` on every target module."""
    return num_adapter_pages({(0, m): max_rank for m in TARGET_MODULES}, layout, config)


def pack_adapter(
    weights: AdapterWeightsLike,
    layout: PoolLayout,
    config: ModelConfig,
    allocate: Allocate = np.empty,
) -> PackedAdapter:
    """Lay an adapter out for the pool: pages `[N, L, D * E]` in the pool dtype, and its segments.

    `scaling` is multiplied into B in float32 before the one cast to the pool dtype; B is stored
    rank-major. Modules and layers that the adapter lacks have segments of kind 0. `allocate(shape,
    dtype)` makes the array of pages, which is written once. Of a layout with `padded_rank`, every A
    and B has zero rows up to it.

    Raises AdapterLoadError if values overflow that dtype.
    """
    ranks = {key: module.rank for key, module in weights.modules.items()}
    num_pages = num_adapter_pages(ranks, layout, config)
    tp, size, dtype = layout.tp, layout.page_elems, pool_dtype(layout)
    pages = allocate((num_pages, layout.num_layers, tp * size), dtype)
    segments = np.zeros((layout.num_layers, len(TARGET_MODULES), SEGMENT_FIELDS), np.int32)
    runs = np.empty((tp, num_pages * size), dtype)  # of one layer: it stays in the caches
    for layer in range(layout.num_layers):
        runs.fill(0)
        next_chunk = 0
        for index, name in enumerate(TARGET_MODULES):
            module = weights.modules.get((layer, name))
            if module is None:
                continue
            split, rank = _split(name, layout, config), layout.padded_rank or module.rank
            a_chunk, b_chunk = next_chunk, next_chunk + split.num_a_chunks(rank, tp)
            next_chunk = b_chunk + split.num_b_chunks(rank)
            segments[layer, index] = (KIND_LORA, a_chunk, b_chunk, rank)
            b_rows = _scaled_rows(module)
            with np.errstate(over="ignore"):  # seen below
                for device in range(tp):
                    run = runs[device]
                    _put_rows(run, a_chunk, _a_rows(module.a, split, device, tp))
                    _put_rows(run, b_chunk, _b_rows(b_rows, name, split, device, layout, config))
            if not _is_finite(runs[:, a_chunk * CHUNK : next_chunk * CHUNK]):
                raise AdapterLoadError(
                    f"layer {layer}, {name}: A, or B times its scaling {module.scaling}, exceeds "
                    f"the range of {layout.dtype}, in which the server keeps adapters",
                    param="lora_path",
                )
        # Page-major, so that any run of pages is one contiguous block to send.
        by_page = pages[:, layer].reshape(num_pages, tp, size)
        by_page[...] = runs.reshape(tp, num_pages, size).transpose(1, 0, 2)
    return PackedAdapter(weights.version, pages, segments, weights.max_rank)


def _scaled_rows(module: LoraModuleLike) -> Array:
    """B times its scaling, rank-major, f32 `[R, out]`."""
    # Turned as integers first: numpy casts a strided bfloat16 array many times slower.
    turned = np.ascontiguousarray(module.b.view(f"u{module.b.itemsize}").T).view(module.b.dtype)
    scaled = turned.astype(np.float32)
    with np.errstate(over="ignore"):  # seen by `_is_finite`
        scaled *= np.float32(module.scaling)
    return scaled


def _is_finite(values: Array) -> bool:
    """Without its sign a float orders as an unsigned integer, infinity and NaN on top."""
    unsigned = np.dtype(f"u{values.itemsize}")
    infinity = np.array(np.inf, values.dtype).view(unsigned)
    magnitude = values.view(unsigned) & unsigned.type(2 ** (8 * values.itemsize - 1) - 1)
    return bool(magnitude.max(initial=0) < infinity)


def _a_rows(a: Array, split: _Split, device: int, tp: int) -> Array:
    """Device `device`'s rows of A: dealt round-robin (column), or its input columns (row)."""
    if split.is_column:
        return a[device::tp]  # may be one row short of ceil(R / tp): the run is zero there
    return a[:, device * split.in_size : (device + 1) * split.in_size]


def _b_rows(
    b_rows: Array, name: str, split: _Split, device: int, layout: PoolLayout, config: ModelConfig
) -> Array:
    """Device `device`'s output columns of B `[R, out]`."""
    if name in KV_MODULES:  # fewer kv heads than devices are repeated, as in the base
        first = device * config.num_kv_heads // layout.tp * layout.head_dim
    else:
        first = device * split.out_size
    return b_rows[:, first : first + split.out_size]


def _put_rows(run: Array, chunk: int, rows: Array) -> None:
    """Write rows `[r, size]` from `chunk` on, each padded with zeros to whole chunks."""
    num_rows, size = rows.shape
    width = div_ceil(size, CHUNK) * CHUNK
    place = run[chunk * CHUNK : chunk * CHUNK + num_rows * width]
    place.reshape(num_rows, width)[:, :size] = rows
