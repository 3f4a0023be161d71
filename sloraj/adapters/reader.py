"""Adapter directories to packed pages: in processes beside the engine, or in its threads."""

from __future__ import annotations

from typing import Any

import numpy as np

from checkpoints.model_config import ModelConfig
from checkpoints.peft_adapter import read_adapter
from sloraj.adapters.layout import Allocate, pack_adapter
from sloraj.adapters.load_processes import LoaderProcesses
from sloraj.adapters.load_worker import LoadSpec
from sloraj.adapters.loader import LoadFunction, short_turns
from sloraj.batch import PackedAdapter
from sloraj.config import PoolLayout


def adapter_loader(
    model: ModelConfig,
    layout: PoolLayout,
    max_rank: int,
    allocate: Allocate = np.empty,
    num_processes: int = 0,
) -> LoadFunction:
    """Reads a PEFT directory and packs it for the pool, into arrays that `allocate` makes: in
    `num_processes` processes, or in the caller's thread.
    """
    if num_processes:
        spec = LoadSpec(model=model, layout=layout, max_rank=max_rank)
        return LoaderProcesses(spec, allocate, num_processes)

    def load(path: str) -> tuple[PackedAdapter, dict[str, Any]]:
        with short_turns:
            weights = read_adapter(path, model, max_rank=max_rank)
            packed = pack_adapter(weights, layout, model, allocate)
        return packed, {"rank": weights.max_rank, "path": path}

    return load
