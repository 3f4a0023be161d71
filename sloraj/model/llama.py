"""Llama-family decoder in Flax NNX, written in the per-device view.

Every array here is one device's part; the whole step runs inside one `jax.shard_map`. Axis letters:
T tokens, D hidden, N query heads, K kv heads, H head_dim, F intermediate, V vocabulary (all per
device). Weights keep the checkpoint's `[out, in]` layout: `y = x @ W.T` is `"td,nd->tn"`.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from checkpoints.model_config import TARGET_MODULES
from pallas_kernels.add_norm import add_lora, add_rms_norm, rms_norm
from pallas_kernels.linear import linear
from pallas_kernels.paged_attention import paged_decode_attention, paged_ragged_attention
from pallas_kernels.rope_write import HeadNorms, HeadShape, rope_write
from sloraj.model.lora import LoraDelta, Output
from sloraj.model.rope import rope_frequencies, rotation
from sloraj.model.step import StepInputs, StepSpec
from sloraj.parallel.collectives import (
    device_index,
    gather_vocab,
    sum_partial,
)
from sloraj.parallel.mesh import local_kv_heads
from sloraj.parallel.sharding import ParamRule, layer_rules, top_rules

UNLIMITED = 2**31 - 1  # window of full attention
Q_PROJ, K_PROJ, V_PROJ, O_PROJ, GATE_PROJ, UP_PROJ, DOWN_PROJ = range(len(TARGET_MODULES))


class _Parameters(nnx.Module):
    """Holds the parameters that a table of rules names, as attributes."""

    def __init__(self, rules: dict[str, ParamRule], dtype: jnp.dtype) -> None:
        for name, rule in rules.items():
            setattr(self, name, nnx.Param(jnp.zeros(rule.shape, jnp.dtype(rule.dtype or dtype))))

    def param(self, name: str) -> jax.Array | None:
        holder = getattr(self, name, None)
        return None if holder is None else holder[...]

    def linear(self, name: str, x: jax.Array, spec: StepSpec) -> jax.Array:
        """x `[T, in]` -> `[T, out]` in x's dtype, through the weight `name` without its bias."""
        weight = self.param(name)
        assert weight is not None
        return linear(x, weight, self.param(f"{name}_scale"), implementation=spec.kernels.linear)

    def linear_with_bias(self, name: str, x: jax.Array, spec: StepSpec) -> jax.Array:
        y, bias = self.linear(name, x, spec), self.param(f"{name}_bias")
        return y if bias is None else y + bias[None, :]


class DecoderLayer(_Parameters):
    """One block: attention and MLP, each with the adapters' deltas."""

    def __call__(
        self,
        x: jax.Array,
        added: Output,
        pool: jax.Array,
        layer: jax.Array,
        window: jax.Array,
        cos: jax.Array,
        sin: jax.Array,
        inputs: StepInputs,
        spec: StepSpec,
    ) -> tuple[jax.Array, Output, jax.Array]:
        """The residual stream and what this block adds to it, each `[T, D]`, and the pool.

        x, added: the same of the block before; they are added where the sum is normed anyway.
        pool: `[pages, page_elems]`; keys and values of the step are written to it.
        """
        eps, kernel = spec.config.rms_norm_eps, spec.kernels.add_rms_norm
        with jax.named_scope("attention"):
            norm = self.input_norm[...]
            x, h = add_rms_norm(x, added.base, norm, eps, added.lora, implementation=kernel)
            added, pool = self._attention(h, pool, layer, window, cos, sin, inputs, spec)
        with jax.named_scope("mlp"):
            norm = self.post_norm[...]
            x, h = add_rms_norm(x, added.base, norm, eps, added.lora, implementation=kernel)
            return x, self._mlp(h, pool, layer, inputs, spec), pool

    def _attention(
        self,
        h: jax.Array,
        pool: jax.Array,
        layer: jax.Array,
        window: jax.Array,
        cos: jax.Array,
        sin: jax.Array,
        inputs: StepInputs,
        spec: StepSpec,
    ) -> tuple[Output, jax.Array]:
        config = spec.config
        num_heads = config.num_heads // spec.tp
        num_kv_heads = local_kv_heads(config, spec.tp)
        q_size, kv_size = num_heads * config.head_dim, num_kv_heads * config.head_dim
        delta = LoraDelta(pool, layer, inputs, spec)
        base = self.linear_with_bias("qkv", h, spec)
        qkv = delta.column(base, h, (Q_PROJ, K_PROJ, V_PROJ), (q_size, kv_size, kv_size))
        norms = HeadNorms(self.q_norm[...], self.k_norm[...]) if config.qk_norm else None
        q, pool = rope_write(
            qkv.base, pool, cos, sin, inputs.pages, inputs.offsets, norms, qkv.lora,
            shape=HeadShape(
                num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=config.head_dim,
                page_size=spec.page_size,
            ),
            eps=config.rms_norm_eps,
            implementation=spec.kernels.rope_write,
        )  # fmt: skip
        attended = _attend(q, pool, window, num_kv_heads, inputs, spec)
        attended = attended.reshape(-1, q_size)
        return self._row_parallel("o", attended, O_PROJ, pool, layer, inputs, spec), pool

    def _row_parallel(
        self, name: str, x: jax.Array, module: int, pool: jax.Array, layer: jax.Array,
        inputs: StepInputs, spec: StepSpec,
    ) -> Output:  # fmt: skip
        """Through the weight `name`, of which each device has some input columns."""
        partial, lora = LoraDelta(pool, layer, inputs, spec).row(
            self.linear(name, x, spec), x, module
        )
        out, bias = sum_partial(partial, spec.tp), self.param(f"{name}_bias")
        return Output(out if bias is None else out + bias[None, :], lora)

    def _mlp(
        self, h: jax.Array, pool: jax.Array, layer: jax.Array, inputs: StepInputs, spec: StepSpec
    ) -> Output:
        f = spec.config.intermediate_size // spec.tp
        delta = LoraDelta(pool, layer, inputs, spec)
        base = self.linear_with_bias("gate_up", h, spec)
        gate_up = add_lora(*delta.column(base, h, (GATE_PROJ, UP_PROJ), (f, f)))
        gate, up = jnp.split(gate_up, 2, axis=1)
        h = jax.nn.silu(gate) * up
        return self._row_parallel("down", h, DOWN_PROJ, pool, layer, inputs, spec)


def _attend(
    q: jax.Array,
    pool: jax.Array,
    window: jax.Array,
    num_kv_heads: int,
    inputs: StepInputs,
    spec: StepSpec,
) -> jax.Array:
    """Single-token rows through the decode kernel, the others through the ragged one."""
    scale = spec.config.head_dim**-0.5
    num_singles = len(inputs.single_tiles.row_order)
    out = paged_decode_attention(
        q, pool, inputs.page_table, inputs.rows[:num_singles], inputs.lengths[:num_singles],
        window, num_kv_heads=num_kv_heads, page_size=spec.page_size, scale=scale,
        implementation=spec.kernels.decode_attention,
    )  # fmt: skip
    if inputs.query_tiles is None:
        return out
    return paged_ragged_attention(
        q, pool, inputs.page_table, inputs.query_tiles, window, out,
        num_kv_heads=num_kv_heads, page_size=spec.page_size, scale=scale,
        implementation=spec.kernels.ragged_attention,
    )  # fmt: skip


class Ends(_Parameters):
    """What stands before and after the layers: embedding, final norm, output projection."""

    def embed_tokens(self, token_ids: jax.Array, spec: StepSpec) -> jax.Array:
        """Vocabulary-sharded lookup, `[T]` -> `[T, D]`: one all-reduce under tensor parallelism."""
        table: jax.Array = self.embed[...]
        if spec.tp == 1:
            return table[token_ids]
        local = token_ids - device_index(spec.tp) * table.shape[0]
        is_mine = (local >= 0) & (local < table.shape[0])
        rows = table[jnp.where(is_mine, local, 0)]
        return sum_partial(jnp.where(is_mine[:, None], rows, jnp.zeros_like(rows)), spec.tp)

    def logits(self, x: jax.Array, spec: StepSpec) -> jax.Array:
        """x `[B, D]` -> f32 `[B, V]`, the whole vocabulary on every device."""
        x = rms_norm(x, self.norm[...], spec.config.rms_norm_eps)
        table = self.param("lm_head")
        table = self.embed[...] if table is None else table
        local = linear(x, table, out_dtype=jnp.float32, implementation=spec.kernels.linear)
        return gather_vocab(local, spec.tp)[:, : spec.config.vocab_size]


@dataclasses.dataclass(frozen=True)
class Model:
    """Graph definitions and leaf orders, so that programs take flat tuples of arrays.

    Merging NNX state inside a traced function costs nothing at run time, while passing modules
    through `nnx.jit` costs tens of milliseconds a call.
    """

    spec: StepSpec
    layer_rules: tuple[dict[str, ParamRule], ...]
    end_rules: dict[str, ParamRule]
    layer_graph: nnx.GraphDef[DecoderLayer]
    ends_graph: nnx.GraphDef[Ends]

    def layer(self, leaves: dict[str, jax.Array]) -> DecoderLayer:
        layer: DecoderLayer = nnx.merge(self.layer_graph, _state(leaves))
        return layer

    def ends(self, leaves: dict[str, jax.Array]) -> Ends:
        ends: Ends = nnx.merge(self.ends_graph, _state(leaves))
        return ends


def _state(leaves: dict[str, jax.Array]) -> nnx.State:
    return nnx.State({name: nnx.Param(value) for name, value in leaves.items()})


def abstract_model(spec: StepSpec, dtype: jnp.dtype) -> Model:
    """The model without its arrays."""
    config, tp = spec.config, spec.tp
    rules = tuple(
        layer_rules(config, tp, index, spec.quantization) for index in range(config.num_layers)
    )
    end_rules = top_rules(config, tp)
    layer = nnx.eval_shape(lambda: DecoderLayer(rules[0], dtype))
    ends = nnx.eval_shape(lambda: Ends(end_rules, dtype))
    return Model(spec, rules, end_rules, nnx.split(layer)[0], nnx.split(ends)[0])


def forward(
    model: Model,
    ends_leaves: dict[str, jax.Array],
    layer_leaves: list[dict[str, jax.Array]],
    pools: list[jax.Array],
    inputs: StepInputs,
    logit_indices: jax.Array,
) -> tuple[list[jax.Array], jax.Array]:
    """One step, per-device view: writes keys and values, returns f32 logits `[B, V]`.

    The layer is an inner `jax.jit`, traced once for all layers: inlined layers cost seconds of
    tracing a program, which no compilation cache saves.
    """
    spec = model.spec
    ends = model.ends(ends_leaves)
    inverse, factor = rope_frequencies(spec.config)
    cos, sin = rotation(inputs.positions, inverse, factor)
    window = jnp.int32(spec.config.sliding_window or UNLIMITED)

    @jax.jit
    def run_layer(
        leaves: dict[str, jax.Array],
        x: jax.Array,
        added: Output,
        pool: jax.Array,
        layer: jax.Array,
    ) -> tuple[jax.Array, Output, jax.Array]:
        return model.layer(leaves)(x, added, pool, layer, window, cos, sin, inputs, spec)

    x = ends.embed_tokens(inputs.token_ids, spec)
    added = Output(jnp.zeros_like(x))
    pools = list(pools)
    for index, leaves in enumerate(layer_leaves):
        x, added, pools[index] = run_layer(leaves, x, added, pools[index], jnp.int32(index))
    lora = added.lora
    if lora is not None:  # of the first tokens
        lora = lora.at[logit_indices].get(mode="fill", fill_value=0)
    last = add_lora(added.base[logit_indices], lora)
    return pools, ends.logits(x[logit_indices] + last, spec)
