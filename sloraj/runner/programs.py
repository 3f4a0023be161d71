"""The compiled programs: pure functions of device arrays, which the runner keeps and donates.

forward   tokens -> logits; writes keys and values into the pool    one a token bucket and variant
sample    logits -> tokens; updates last tokens and penalty counts    one a row bucket and variant
reset     gives rows to new sequences
count     counts prompt tokens for penalties
install   copies adapter pages into the donated pool                        one a chunk size
bind      points a slot at an installed version
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels.tiles import LoraTiles, QueryTiles
from sloraj.model.llama import Model, forward
from sloraj.model.step import StepInputs
from sloraj.parallel.mesh import replicated
from sloraj.parallel.sharding import ParamRule
from sloraj.runner.buckets import SINGLE_BLOCK_ROWS, Bucket
from sloraj.runner.lora_variants import MODULES
from sloraj.runner.packing import Packing, step_packing
from sloraj.runner.rows import RowState, reset_rows
from sloraj.runner.state import (
    POOL_SPEC,
    AdapterTable,
    ForwardState,
    SampleState,
    StepLogits,
)
from sloraj.sampler import GREEDY, LOGPROBS, TokenCounts, count_known, count_sampled, sample

BUFFER_ARGUMENT = 6  # a step's host data, among the arguments of a forward program
COUNT_TOKENS = 512  # tokens one count program takes
WHOLE = PartitionSpec()
# The graph runs what does not depend on each other at once: a shrink beside the base product.
GPU_OPTIONS = {"xla_gpu_command_buffer_scheduling_mode": "CONCURRENT"}


def forward_program(model: Model, mesh: Mesh, bucket: Bucket, variant: str) -> Any:
    """(ends, layers, state, last_token, rows, table, buffer) -> (state, StepLogits)."""
    spec = dataclasses.replace(model.spec, lora_modules=MODULES[variant])
    model = dataclasses.replace(model, spec=spec)
    packing = step_packing(bucket)

    def step(
        ends: dict[str, jax.Array],
        layers: list[dict[str, jax.Array]],
        state: ForwardState,
        last_token: jax.Array,
        rows: RowState,
        table: AdapterTable,
        buffer: jax.Array,
    ) -> tuple[ForwardState, StepLogits]:
        fields = packing.split(buffer)
        append_rows, index, pages = fields["appends"].T
        page_table = state.page_table.at[append_rows, index].set(pages)
        owners = state.owners
        violations = jnp.zeros((), jnp.int32)
        if owners is not None:
            owners = owners.at[pages].set(rows.tag[append_rows])
            violations = _count_violations(owners, page_table, rows, table, fields)
        inputs = _inputs(fields, page_table, last_token, rows, table, bucket, model.spec.page_size)
        pools, logits = forward(model, ends, layers, state.pools, inputs, fields["logit_indices"])
        state = ForwardState(pools=pools, page_table=page_table, owners=owners)
        return state, StepLogits(
            logits=logits,
            rows=fields["logit_rows"],
            positions=fields["logit_positions"],
            violations=violations,
        )

    pool_spec: Any = POOL_SPEC  # specs stand where the arrays will
    whole: Any = WHOLE
    state_spec = ForwardState(
        pools=[pool_spec] * len(model.layer_rules), page_table=whole, owners=whole
    )
    sharded = jax.shard_map(
        step,
        mesh=mesh,
        in_specs=(
            _specs(model.end_rules),
            [_specs(rules) for rules in model.layer_rules],
            state_spec,
            WHOLE,
            WHOLE,
            WHOLE,
            WHOLE,
        ),
        out_specs=(state_spec, WHOLE),
        check_vma=False,  # Pallas calls carry no varying-axes types
    )
    is_gpu = mesh.devices.flat[0].platform != "cpu"
    # With weights that XLA widens (one byte, many rows) the mode holds all layers' widened weights
    # at once, 13 GB of a Llama-7B, where one layer's would do.
    is_small = bucket.is_decode or model.spec.quantization is None
    options = GPU_OPTIONS if is_gpu and is_small else None
    return jax.jit(sharded, donate_argnums=2, compiler_options=options)


def _specs(rules: dict[str, ParamRule]) -> dict[str, PartitionSpec]:
    return {name: rule.spec for name, rule in rules.items()}


def _inputs(
    fields: dict[str, jax.Array],
    page_table: jax.Array,
    last_token: jax.Array,
    rows: RowState,
    table: AdapterTable,
    bucket: Bucket,
    page_size: int,
) -> StepInputs:
    token_rows, positions = fields["rows"], fields["positions"]
    token = jnp.arange(bucket.num_tokens, dtype=jnp.int32)
    is_token = token < fields["num_tokens"]
    pages = page_table[token_rows, positions // page_size]
    query_tiles, lora_tiles, num_singles = None, None, fields["num_tokens"]
    if not bucket.is_decode:
        lora_tiles = _lora_tiles(fields, "lora_tile", table, bucket.block_rows)
        num_singles = fields["num_singles"]
        row, q_start, q_len, position = fields["query_tiles"]
        query_tiles = QueryTiles(
            row=row, q_start=q_start, q_len=q_len, position=position,
            num_tiles=fields["num_query_tiles"], block_q=bucket.block_q,
        )  # fmt: skip
    ids = fields["token_ids"]
    return StepInputs(
        token_ids=jnp.where(ids < 0, last_token[token_rows], ids),
        positions=positions,
        rows=token_rows,
        pages=jnp.where(is_token, pages, 0),
        offsets=positions % page_size,
        lengths=jnp.where(token < num_singles, positions + 1, 0),
        page_table=page_table,
        slot_pages=table.slot_pages,
        single_tiles=_lora_tiles(fields, "single_tile", table, SINGLE_BLOCK_ROWS),
        lora_tiles=lora_tiles,
        query_tiles=query_tiles,
    )


def _lora_tiles(
    fields: dict[str, jax.Array], prefix: str, table: AdapterTable, block_rows: int
) -> LoraTiles:
    slots = fields[f"{prefix}_slots"]
    return LoraTiles(
        row_order=fields[f"{prefix}_order"],
        starts=fields[f"{prefix}_starts"],
        slots=slots,
        segments=table.segments[:, slots],
        num_tiles=fields[f"num_{prefix}s"],
        block_rows=block_rows,
    )


def _count_violations(
    owners: jax.Array,
    page_table: jax.Array,
    rows: RowState,
    table: AdapterTable,
    fields: dict[str, jax.Array],
) -> jax.Array:
    """Rows of this step that would read a page which is not theirs, or an adapter not leased."""
    batch_rows = fields["batch_rows"]
    null_row = page_table.shape[0] - 1
    index = jnp.arange(page_table.shape[1], dtype=jnp.int32)[None, :]
    is_read = index < fields["num_read_pages"][:, None]
    is_own = owners[page_table[batch_rows]] == rows.tag[batch_rows][:, None]
    slots = rows.slot[batch_rows]
    index = jnp.arange(table.slot_pages.shape[1], dtype=jnp.int32)[None, :]
    is_held = index < table.num_pages[slots][:, None]
    is_leased = owners[table.slot_pages[slots]] == rows.adapter_tag[batch_rows][:, None]
    is_wrong = (is_read & ~is_own).any(axis=1) | (is_held & ~is_leased).any(axis=1)
    return (is_wrong & (batch_rows != null_row)).sum(dtype=jnp.int32)


def sample_program(mesh: Mesh, variant: str) -> Any:
    """(state, step_logits, rows) -> (state, ints, floats).

    ints i32 `[B, 2]`: token, is_finite; with log-probabilities `[B, 2 + MAX_LOGPROBS]`. floats:
    None, or f32 `[B, 1 + MAX_LOGPROBS]`: of the drawn token, then of the most probable ones.
    """

    def step(
        state: SampleState, step_logits: StepLogits, rows: RowState
    ) -> tuple[SampleState, jax.Array, jax.Array | None]:
        logit_rows = step_logits.rows
        drawn = sample(
            step_logits.logits,
            logit_rows,
            step_logits.positions,
            rows.sampling,
            state.counts,
            variant,
        )
        counts = state.counts
        if variant != GREEDY:
            counts = count_sampled(counts, logit_rows, drawn.tokens)
        state = SampleState(
            last_token=state.last_token.at[logit_rows].set(drawn.tokens), counts=counts
        )
        ints = jnp.stack([drawn.tokens, drawn.is_finite.astype(jnp.int32)], axis=1)
        if variant != LOGPROBS:
            return state, ints, None
        assert drawn.logprob is not None and drawn.top_ids is not None
        assert drawn.top_logprobs is not None
        floats = jnp.concatenate([drawn.logprob[:, None], drawn.top_logprobs], axis=1)
        return state, jnp.concatenate([ints, drawn.top_ids], axis=1), floats

    return jax.jit(step, donate_argnums=0, out_shardings=replicated(mesh))


def reset_program(mesh: Mesh) -> Any:
    """(rows, counts, buffer) -> (rows, counts)."""
    return jax.jit(reset_rows, donate_argnums=(0, 1), out_shardings=replicated(mesh))


def count_program(mesh: Mesh) -> Any:
    """(counts, buffer i32 [3, COUNT_TOKENS]: row, token, is_output) -> counts."""

    def step(counts: TokenCounts, buffer: jax.Array) -> TokenCounts:
        rows, tokens, is_output = buffer
        return count_known(counts, rows, tokens, is_output)

    return jax.jit(step, donate_argnums=0, out_shardings=replicated(mesh))


def install_program(mesh: Mesh) -> Any:
    """(pools, staging [pages, layers, elems], page ids [pages]) -> pools. Padding goes to page
    0.
    """

    def step(pools: list[jax.Array], staging: jax.Array, pages: jax.Array) -> list[jax.Array]:
        if len(pages) == 1:  # XLA makes of a scatter of one page two kernels a layer, in a row
            return [
                jax.lax.dynamic_update_slice_in_dim(pool, staging[:, layer], pages[0], axis=0)
                for layer, pool in enumerate(pools)
            ]
        return [pool.at[pages].set(staging[:, layer]) for layer, pool in enumerate(pools)]

    return jax.jit(step, donate_argnums=0, out_shardings=NamedSharding(mesh, POOL_SPEC))


def bind_packing(table: AdapterTable) -> Packing:
    """A bind program's host data; also of a table that is described by shape alone."""
    (_, max_pages), (num_layers, _, *of_module) = table.slot_pages.shape, table.segments.shape
    return Packing(
        (
            ("slot", ()),
            ("num_pages", ()),
            ("tag", ()),
            ("pages", (max_pages,)),
            ("segments", (num_layers, *of_module)),
        )
    )


def bind_program(mesh: Mesh) -> Any:
    """(table, owners, buffer of `bind_packing`) -> (table, owners)."""

    def step(
        table: AdapterTable, owners: jax.Array | None, buffer: jax.Array
    ) -> tuple[AdapterTable, jax.Array | None]:
        fields = bind_packing(table).split(buffer)
        slot, pages = fields["slot"], fields["pages"]
        if owners is not None:
            owners = owners.at[pages].set(fields["tag"])
        table = AdapterTable(
            slot_pages=table.slot_pages.at[slot].set(pages),
            num_pages=table.num_pages.at[slot].set(fields["num_pages"]),
            segments=table.segments.at[:, slot].set(fields["segments"]),
        )
        return table, owners

    return jax.jit(step, donate_argnums=(0, 1), out_shardings=replicated(mesh))
