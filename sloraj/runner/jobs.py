"""Every program of an engine with the shapes it is compiled for. Calls must match them exactly.

Needs no device array, so the programs of a GPU can be compiled, and looked at, on a machine without
one.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from sloraj.model.llama import Model
from sloraj.model.weights import abstract_parameters, unflatten
from sloraj.runner import programs
from sloraj.runner.buckets import Buckets
from sloraj.runner.compiles import CompileJob, ints
from sloraj.runner.packing import step_packing
from sloraj.runner.rows import RESET_PACKING
from sloraj.runner.state import STAGING_SPEC, RunnerConfig, abstract_logits, abstract_state
from sloraj.sampler import VARIANTS

INSTALL_PAGES = (8, 4, 2, 1)  # pages an install program copies; large first


def make_jobs(model: Model, mesh: Mesh, buckets: Buckets, config: RunnerConfig) -> list[CompileJob]:
    """All programs: forward passes first, for they take longest."""
    model_config = model.spec.config
    state = abstract_state(config, mesh, model_config.vocab_size)
    flat: Any = abstract_parameters(
        model_config, mesh, jnp.dtype(config.layout.dtype), model.spec.quantization
    )
    ends, layers = unflatten(flat, model_config.num_layers)
    forwards = [
        CompileJob(
            ("forward", bucket.name, variant),
            programs.forward_program(model, mesh, bucket, variant),
            (ends, layers, state.forward, state.sample.last_token, state.rows, state.table,
             ints(step_packing(bucket).size)),
        )
        for bucket in (*reversed(buckets.mixed), *buckets.decode)
        for variant in buckets.lora_variants
    ]  # fmt: skip
    samples = [
        CompileJob(
            ("sample", variant, num_logits),
            programs.sample_program(mesh, variant),
            (state.sample, abstract_logits(mesh, num_logits, model_config.vocab_size), state.rows),
        )
        for num_logits in buckets.sample
        for variant in VARIANTS
    ]
    return [*forwards, *samples, *_state_jobs(mesh, state, config)]


def _state_jobs(mesh: Mesh, state: Any, config: RunnerConfig) -> list[CompileJob]:
    """The small programs: rows and adapters."""
    layout = config.layout
    staging = NamedSharding(mesh, STAGING_SPEC)
    page = (layout.num_layers, layout.tp * layout.page_elems)
    dtype = jnp.dtype(layout.dtype)
    installs = [
        CompileJob(
            ("install", size),
            programs.install_program(mesh),
            (
                state.forward.pools,
                jax.ShapeDtypeStruct((size, *page), dtype, sharding=staging),
                ints(size),
            ),
        )
        for size in INSTALL_PAGES
    ]
    counts = state.sample.counts
    return [
        *installs,
        CompileJob(
            ("bind",),
            programs.bind_program(mesh),
            (state.table, state.forward.owners, ints(programs.bind_packing(state.table).size)),
        ),
        CompileJob(
            ("reset",),
            programs.reset_program(mesh),
            (state.rows, counts, ints(RESET_PACKING.size)),
        ),
        CompileJob(
            ("count",), programs.count_program(mesh), (counts, ints(3, programs.COUNT_TOKENS))
        ),
    ]
