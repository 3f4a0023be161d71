"""Where a device's memory goes, decided and printed before the pool is made."""

from __future__ import annotations

import dataclasses

from checkpoints.model_config import ModelConfig
from sloraj.config import EngineConfig, PoolLayout
from sloraj.errors import ConfigError

GIB = 1 << 30
MARGIN_BYTES = GIB  # matmul workspaces, graphs, the allocator's own losses
CPU_POOL_BYTES = GIB // 4
INSTALL_BYTES_PER_STEP = 256 << 20  # a few ms of the bus; one adapter may be larger
ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Bytes per device."""

    limit_bytes: int | None  # None: unknown (CPU)
    weight_bytes: int
    workspace_bytes: int
    pool_bytes: int
    num_pages: int
    page_bytes: int  # over all layers

    def __str__(self) -> str:
        def gib(n: int) -> str:
            return f"{n / GIB:.2f} GiB"

        limit = "unknown" if self.limit_bytes is None else gib(self.limit_bytes)
        return (
            f"memory per device: limit {limit}, weights {gib(self.weight_bytes)}, workspace "
            f"{gib(self.workspace_bytes)}, pool {gib(self.pool_bytes)} = {self.num_pages} pages of "
            f"{self.page_bytes / 1024:.0f} KiB"
        )


def plan_memory(
    layout: PoolLayout,
    *,
    limit_bytes: int | None,
    in_use_bytes: int,
    workspace_bytes: int,
    pool_bytes: int | None,
    min_pages: int,
) -> MemoryPlan:
    """Size the pool. Raises ConfigError when it could not hold one sequence and one adapter."""
    page_bytes = layout.num_layers * layout.page_elems * ITEMSIZE[layout.dtype]
    if pool_bytes is None:
        if limit_bytes is None:
            pool_bytes = max(CPU_POOL_BYTES, min_pages * page_bytes)
        else:
            pool_bytes = limit_bytes - in_use_bytes - workspace_bytes
    num_pages = pool_bytes // page_bytes
    if num_pages < min_pages:
        raise ConfigError(
            f"pool_bytes: got {pool_bytes} bytes ({num_pages} pages of {page_bytes} bytes), "
            f"allowed: at least {min_pages * page_bytes}, which holds one sequence of "
            f"max_model_len and one adapter of max_rank; lower max_model_len or max_rank, or give "
            f"the pool more",
            param="pool_bytes",
        )
    return MemoryPlan(
        limit_bytes=limit_bytes,
        weight_bytes=in_use_bytes,
        workspace_bytes=workspace_bytes,
        pool_bytes=num_pages * page_bytes,
        num_pages=num_pages,
        page_bytes=page_bytes,
    )


def workspace_bytes(
    config: EngineConfig, model: ModelConfig, layout: PoolLayout, adapter_pages: int
) -> int:
    """What the largest programs hold at once: activations, f32 logits and their filtered copies.

    Beside them lie the adapter pages of two steps: those being installed, and those on their way.
    Of quantised weights one at a time is widened, for steps of many rows.
    """
    rows, tokens = config.max_num_seqs, config.max_num_batched_tokens
    assert rows is not None and tokens is not None
    activations = tokens * (8 * model.hidden_size + 4 * model.intermediate_size // layout.tp)
    logits = rows * model.vocab_size
    counts = (rows + 1) * model.vocab_size
    page_bytes = layout.num_layers * layout.page_elems * ITEMSIZE[layout.dtype]
    staging = 2 * max(INSTALL_BYTES_PER_STEP, adapter_pages * page_bytes)
    widened = 2 * model.hidden_size * model.intermediate_size // layout.tp * ITEMSIZE[layout.dtype]
    widened = widened if config.quantization else 0
    return activations * 4 + logits * 4 * 6 + counts * 5 + staging + widened + MARGIN_BYTES
