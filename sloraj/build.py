"""From an EngineConfig to a running engine core: the one place where all parts meet.

Everything "auto" is resolved here, once, and reported: kernels, dtype, context length, rank,
memory.
"""

from __future__ import annotations

import dataclasses
import gc
import logging
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from checkpoints.hf_config import read_generation_defaults, read_model_config
from checkpoints.hf_weights import open_weights
from checkpoints.model_config import ModelConfig
from checkpoints.orbax_store import is_converted
from checkpoints.peft_adapter import read_adapter
from pallas_kernels.dispatch import KernelShape, resolve_kernels
from sloraj import convert
from sloraj.adapters.layout import Allocate, max_adapter_pages
from sloraj.adapters.load_processes import LoaderProcesses
from sloraj.adapters.loader import NUM_THREADS, LoadFunction, loader_threads
from sloraj.adapters.reader import adapter_loader
from sloraj.adapters.sources import DEFAULT_MAX_RANK, MAX_RANK, find_adapters, largest_rank
from sloraj.config import EngineConfig, PoolLayout, SchedulerConfig, div_ceil, resolve
from sloraj.core import EngineCore
from sloraj.environment import prepare_jax
from sloraj.errors import ConfigError
from sloraj.model.llama import abstract_model
from sloraj.model.merge import check_mergeable, merge_adapter
from sloraj.model.quantize import quantize_layer
from sloraj.model.rope import max_context
from sloraj.model.step import StepSpec
from sloraj.model.weights import Leaves, Progress, load_parameters, random_parameters
from sloraj.parallel.mesh import check_divisible, local_kv_heads, make_mesh
from sloraj.policies.cost import base_bytes
from sloraj.runner import DeviceRunner
from sloraj.runner.buckets import Buckets, make_buckets
from sloraj.runner.compiles import Key
from sloraj.runner.lora_variants import MODULES
from sloraj.runner.memory import (
    INSTALL_BYTES_PER_STEP,
    ITEMSIZE,
    MemoryPlan,
    plan_memory,
    workspace_bytes,
)
from sloraj.runner.state import RunnerConfig

MakeLoader = Callable[[ModelConfig, PoolLayout, int, Allocate], LoadFunction]
log = logging.getLogger("sloraj")

BLOCK_Q = {"xla": 16, "triton": 128, "mosaic": 128}
# On a CPU an empty kernel is nothing beside the step; three times the programs do not pay.
LORA_VARIANTS = {"cpu": ("all",), "gpu": tuple(MODULES), "cuda": tuple(MODULES)}
GPU_WARM_UP_REPEATS = 3  # a program's first runs are not captured in a CUDA graph


def build_core(
    config: EngineConfig, on_progress: Progress, *, make_loader: MakeLoader | None = None
) -> tuple[EngineCore, dict[str, Any]]:
    """Load the model, compile every program, load the adapters named in the configuration.

    Returns the core and what ModelInfo is made of. `make_loader` replaces the reader of adapter
    directories (benchmarks make theirs up).

    Raises: ConfigError: settings that cannot work together. CheckpointError: unusable model files.
    AdapterLoadError: an unusable adapter.
    """
    started = time.monotonic()
    prepare_jax(config.compilation_cache_dir)
    model_config = read_model_config(config.model)
    check_divisible(model_config, config.tensor_parallel_size)
    mesh = make_mesh(config.tensor_parallel_size)
    config = resolve(config, jax.default_backend())
    adapters = find_adapters(config)
    if config.merged_adapter is not None:
        check_mergeable(mesh.size, config.quantization)
    ends, layers = _load(config, model_config, mesh, on_progress)
    if config.merged_adapter is not None:
        weights = read_adapter(config.merged_adapter, model_config, max_rank=MAX_RANK)
        layers = merge_adapter(layers, weights, model_config)
    loaded_s = time.monotonic() - started
    runner, scheduler_config, layout, info = build_runner(
        dataclasses.replace(config, max_rank=config.max_rank or largest_rank(adapters)),
        model_config, mesh, ends, layers, on_progress,
    )  # fmt: skip
    of_model = (model_config, layout, scheduler_config.max_rank, runner.host_arena.allocate)
    num_processes = config.loader_processes or 0
    load = make_loader(*of_model) if make_loader else adapter_loader(*of_model, num_processes)
    core = EngineCore(
        scheduler_config,
        runner,
        load,
        loader_executor=loader_threads(num_processes or NUM_THREADS),
        close_load=load.close if isinstance(load, LoaderProcesses) else None,
    )
    core.preload(adapters, lambda done: on_progress("adapters", done, len(adapters)))
    info |= {
        "model_id": config.served_model_name or Path(config.model).resolve().name,
        "model_path": str(config.model),
        "generation_defaults": read_generation_defaults(config.model),
        "startup_s": time.monotonic() - started,
    }
    gc.collect()  # now, and not in a step: walking what tracing leaves takes tens of milliseconds
    log.info("ready in %.1f s, of which %.1f s for the weights", info["startup_s"], loaded_s)
    return core, info


def _load(
    config: EngineConfig, model: ModelConfig, mesh: Mesh, on_progress: Progress
) -> tuple[Leaves, list[Leaves]]:
    assert config.dtype is not None
    jnp_dtype = jnp.dtype(config.dtype)
    if config.random_weights:
        return random_parameters(model, mesh, jnp_dtype, config.seed, config.quantization)
    if is_converted(config.model):
        ends, layers = convert.restore(config.model, model, mesh, jnp_dtype)
        if config.quantization is not None:
            layers = [quantize_layer(layer, config.quantization) for layer in layers]
        on_progress("weights", 1, 1)
        return ends, layers
    with open_weights(config.model, model) as weights:
        return load_parameters(weights, model, mesh, jnp_dtype, on_progress, config.quantization)


def build_runner(
    config: EngineConfig,
    model_config: ModelConfig,
    mesh: Mesh,
    ends: Leaves,
    layers: list[Leaves],
    on_progress: Progress,
    *,
    only: Collection[Key] | None = None,
) -> tuple[DeviceRunner, SchedulerConfig, PoolLayout, dict[str, Any]]:
    """The runner, warm, with the numbers that the host side runs on. `config` is resolved.

    `only` names the programs that a benchmark is content with: they are compiled and nothing is
    run.
    """
    dtype, max_num_seqs = config.dtype, config.max_num_seqs
    max_num_batched_tokens = config.max_num_batched_tokens
    assert dtype is not None and max_num_seqs is not None and max_num_batched_tokens is not None
    tp = mesh.size
    device = mesh.devices.flat[0]
    try:
        kernels = resolve_kernels(
            config.kernels,
            platform=device.platform,
            device_kind=device.device_kind,
            shape=KernelShape(
                head_dim=model_config.head_dim,
                page_size=config.page_size,
                dtype=dtype,
                lora_widths=lora_widths(model_config, tp),
            ),
        )
    except ValueError as error:
        raise ConfigError(f"kernels: {error}", param="kernels") from error
    max_rank = div_ceil(config.max_rank or DEFAULT_MAX_RANK, tp) * tp
    layout = PoolLayout(
        num_layers=model_config.num_layers,
        num_kv_heads=local_kv_heads(model_config, tp),
        head_dim=model_config.head_dim,
        page_size=config.page_size,
        tp=tp,
        dtype=dtype,
        padded_rank=max_rank if config.pad_ranks else None,
    )
    context = min(config.max_model_len or max_context(model_config), max_context(model_config))
    # A length that nobody asked for gives way to the memory there is; one asked for does not. On
    # CPU the pool is made large enough instead.
    is_bounded = config.max_model_len is None and (
        device.platform != "cpu" or config.pool_bytes is not None
    )
    adapter_pages = max_adapter_pages(layout, model_config, max_rank)
    weight_bytes = sum(
        leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves((ends, layers))
    )
    num_tokens = config.page_size if is_bounded else context
    min_pages = 1 + div_ceil(num_tokens, config.page_size) + adapter_pages
    plan = _plan(config, model_config, layout, device, weight_bytes, min_pages, adapter_pages)
    reserved_pages = _reserved_pages(config, plan, adapter_pages)
    kv_pages = plan.num_pages - 1 - (reserved_pages or adapter_pages)
    max_model_len = min(context, kv_pages * config.page_size)
    if max_model_len < num_tokens:
        raise ConfigError(
            f"adapter_pool_bytes: got {config.adapter_pool_bytes}, which leaves {max_model_len} "
            f"tokens of KV cache, allowed: one that leaves {num_tokens}",
            param="adapter_pool_bytes",
        )
    log.info("%s", plan)
    block_q = BLOCK_Q[kernels.ragged_attention]
    buckets = make_buckets(max_num_seqs, max_num_batched_tokens, config.page_size, block_q)
    buckets = dataclasses.replace(buckets, lora_variants=LORA_VARIANTS[device.platform])
    spec = StepSpec(
        config=model_config,
        tp=tp,
        page_size=config.page_size,
        max_rank=max_rank,
        kernels=kernels,
        quantization=config.quantization,
    )
    runner = DeviceRunner(
        abstract_model(spec, jnp.dtype(dtype)),
        ends,
        layers,
        mesh,
        buckets,
        RunnerConfig(
            layout=layout,
            num_pages=plan.num_pages,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            max_adapter_slots=config.max_adapter_slots,
            max_adapter_pages=adapter_pages,
            checked=config.checked,
        ),
    )
    if only is None:
        repeats = 1 if device.platform == "cpu" else GPU_WARM_UP_REPEATS
        runner.warm_up(on_progress, repeats=repeats)
    else:
        runner.compile(on_progress, only=only)
    log.info(
        "kernels %s, %d programs, %s; %d compilations came from the cache",
        kernels, runner.num_programs, _names(buckets), runner.num_cache_hits,
    )  # fmt: skip
    scheduler_config = SchedulerConfig(
        num_pages=plan.num_pages,
        page_size=config.page_size,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_adapter_slots=config.max_adapter_slots,
        max_num_waiting=config.max_num_waiting,
        max_rank=max_rank,
        vocab_size=model_config.vocab_size,
        eos_token_ids=model_config.eos_token_ids,
        host_adapter_bytes=config.host_adapter_bytes,
        token_buckets=tuple(bucket.num_tokens for bucket in buckets.mixed),
        num_adapter_pages=reserved_pages,
        install_pages_per_step=max(1, INSTALL_BYTES_PER_STEP // plan.page_bytes),
        retention=config.retention,
        prefetch=config.prefetch,
        first_token_slo_s=config.first_token_slo_s,
        early_abort=config.early_abort,
        queue=config.queue,
        base_bytes=base_bytes(
            num_parameters=tp * sum(map(_num_elements, jax.tree.leaves((ends, layers)))),
            weight_bytes=tp * weight_bytes,
            token_bytes=tp * plan.page_bytes // config.page_size,
            itemsize=ITEMSIZE[dtype],
            max_num_seqs=max_num_seqs,
        ),
    )
    info = {
        "max_model_len": max_model_len,
        "vocab_size": model_config.vocab_size,
        "eos_token_ids": model_config.eos_token_ids,
        "bos_token_id": model_config.bos_token_id,
        "max_rank": max_rank,
        "dtype": dtype,
        "kernels": str(kernels),
        "quantization": config.quantization,
        "device": device.device_kind,
        "num_pages": plan.num_pages,
        "page_size": config.page_size,
        "num_programs": runner.num_programs,
    }
    return runner, scheduler_config, layout, info


def _num_elements(leaf: jax.Array) -> int:
    """On one device."""
    return int(leaf.addressable_shards[0].data.size)


def lora_widths(model: ModelConfig, tp: int) -> tuple[int, ...]:
    """The widths of inputs and outputs of adapted modules, on one device."""
    return (
        model.hidden_size,
        model.hidden_size // tp,
        model.num_heads * model.head_dim // tp,
        local_kv_heads(model, tp) * model.head_dim,
        model.intermediate_size // tp,
    )


def _names(buckets: Buckets) -> str:
    return ", ".join(b.name for b in (*buckets.decode, *buckets.mixed))


def _plan(
    config: EngineConfig,
    model: ModelConfig,
    layout: PoolLayout,
    device: jax.Device,
    weight_bytes: int,
    min_pages: int,
    adapter_pages: int,
) -> MemoryPlan:
    memory = (device.memory_stats() or {}) if device.platform != "cpu" else {}
    return plan_memory(
        layout,
        limit_bytes=memory.get("bytes_limit"),
        in_use_bytes=memory.get("bytes_in_use", weight_bytes),
        workspace_bytes=workspace_bytes(config, model, layout, adapter_pages) if memory else 0,
        pool_bytes=config.pool_bytes,
        min_pages=min_pages,
    )


def _reserved_pages(config: EngineConfig, plan: MemoryPlan, adapter_pages: int) -> int | None:
    """Pages of `adapter_pool_bytes`; None where there is no split. One adapter must fit."""
    if config.adapter_pool_bytes is None:
        return None
    reserved = config.adapter_pool_bytes // plan.page_bytes
    if reserved < adapter_pages:
        raise ConfigError(
            f"adapter_pool_bytes: got {config.adapter_pool_bytes} bytes ({reserved} pages of "
            f"{plan.page_bytes} bytes), allowed: at least {adapter_pages * plan.page_bytes}, which "
            f"holds one adapter of max_rank",
            param="adapter_pool_bytes",
        )
    return reserved
