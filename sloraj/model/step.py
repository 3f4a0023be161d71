"""What a step's programs are compiled for, and what a step sends them."""

from __future__ import annotations

import dataclasses

import jax

from checkpoints.model_config import TARGET_MODULES, ModelConfig
from pallas_kernels.dispatch import KernelChoice
from pallas_kernels.tiles import LoraTiles, QueryTiles


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StepSpec:
    """What is fixed when a program is compiled."""

    config: ModelConfig
    tp: int
    page_size: int
    max_rank: int  # padded rank of the shrink outputs; a multiple of tp
    kernels: KernelChoice
    quantization: str | None = None  # of the layers' linear weights: "int8", "fp8"
    lora_modules: tuple[int, ...] = tuple(range(len(TARGET_MODULES)))  # others have no kernels


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StepInputs:
    """Per-step device arrays, i32, shared by all layers. Padding tokens have page 0."""

    token_ids: jax.Array  # [T]
    positions: jax.Array  # [T]
    rows: jax.Array  # [T] row-state index
    pages: jax.Array  # [T] page that the token's key and value go to
    offsets: jax.Array  # [T] place in that page
    lengths: jax.Array  # [T] visible positions of a single-token row, which come first; else 0
    page_table: jax.Array  # [rows, pages_per_row]
    slot_pages: jax.Array  # [slots, max_adapter_pages]
    single_tiles: LoraTiles  # a row each, of single-token rows; of as many tokens as may be such
    lora_tiles: LoraTiles | None  # of all other rows; None: there are none (decode)
    query_tiles: QueryTiles | None  # of all other rows; None: there are none (decode)
