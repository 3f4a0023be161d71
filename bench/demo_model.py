"""The demo model in plain JAX: a Llama forward pass for training, with or without a LoRA adapter.

Parameters are one flat dict under their Hugging Face names, in that library's orientation
([out, in]), so that exporting them is naming them. Adapters are trained as one stack under `vmap`:
every A and B is padded to the largest rank, and a scale of zero masks out what is not the adapter's
own rank, module or layer.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.demo_data import BOS_TOKEN_ID, EOS_TOKEN_ID, NUM_TRAINING_TOKENS, VOCAB_SIZE
from checkpoints.model_config import TARGET_MODULES, ModelConfig

Params = dict[str, jax.Array]

DEMO_CONFIG = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=VOCAB_SIZE,
    hidden_size=192,
    intermediate_size=512,
    num_layers=4,
    num_heads=8,
    num_kv_heads=2,
    head_dim=32,
    max_position_embeddings=512,
    bos_token_id=BOS_TOKEN_ID,
    eos_token_ids=(EOS_TOKEN_ID,),
)


def module_name(layer: int, module: str) -> str:
    """Hugging Face name of a target module, e.g. `model.layers.0.self_attn.q_proj`."""
    parent = "self_attn" if module in TARGET_MODULES[:4] else "mlp"
    return f"model.layers.{layer}.{parent}.{module}"


def init_params(key: jax.Array, config: ModelConfig) -> Params:
    """Random f32 parameters; the embedding has a row more for each task's tag."""
    params: Params = {}
    depth_scale = (2 * config.num_layers) ** -0.5
    for layer in range(config.num_layers):
        for module in TARGET_MODULES:
            key, subkey = jax.random.split(key)
            size_in, size_out = config.module_shape(module)
            scale = size_in**-0.5 * (depth_scale if module in ("o_proj", "down_proj") else 1.0)
            weight = scale * jax.random.normal(subkey, (size_out, size_in))
            params[module_name(layer, module) + ".weight"] = weight
        for norm in ("input_layernorm", "post_attention_layernorm"):
            params[f"model.layers.{layer}.{norm}.weight"] = jnp.ones(config.hidden_size)
    params["model.norm.weight"] = jnp.ones(config.hidden_size)
    embed_key, head_key = jax.random.split(key)
    width = config.hidden_size
    embedding = 0.3 * jax.random.normal(embed_key, (NUM_TRAINING_TOKENS, width))
    params["model.embed_tokens.weight"] = embedding
    params["lm_head.weight"] = width**-0.5 * jax.random.normal(head_key, (VOCAB_SIZE, width))
    return params


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AdapterShape:
    """What one adapter changes, in PEFT's terms. `rank_pattern` maps a module to its own rank."""

    rank: int
    alpha: float
    modules: tuple[str, ...]
    layers: tuple[int, ...] | None = None  # None = all
    use_rslora: bool = False
    rank_pattern: dict[str, int] = dataclasses.field(default_factory=dict)

    def module_rank(self, layer: int, module: str) -> int:
        """Rank at one place; 0 where the adapter changes nothing."""
        if module not in self.modules or (self.layers is not None and layer not in self.layers):
            return 0
        return self.rank_pattern.get(module, self.rank)

    def scaling(self, rank: int) -> float:
        """Factor of B A x at a module of `rank`."""
        return self.alpha / (rank**0.5 if self.use_rslora else rank)


def init_adapters(
    key: jax.Array, config: ModelConfig, shapes: list[AdapterShape]
) -> tuple[Params, Params]:
    """A stack of N adapters: trainable A [N, R, in] and B [N, out, R], and constant scales [N, R].

    R is the largest rank; a scale of 0 masks a rank out. B starts at zero, A at random, as in PEFT.
    """
    max_rank = max(max([s.rank, *s.rank_pattern.values()]) for s in shapes)
    params: Params = {}
    scales: Params = {}
    for layer in range(config.num_layers):
        for module in TARGET_MODULES:
            name = module_name(layer, module)
            size_in, size_out = config.module_shape(module)
            key, subkey = jax.random.split(key)
            a = size_in**-0.5 * jax.random.normal(subkey, (len(shapes), max_rank, size_in))
            params[name + ".lora_A.weight"] = a
            params[name + ".lora_B.weight"] = jnp.zeros((len(shapes), size_out, max_rank))
            scale = np.zeros((len(shapes), max_rank), np.float32)
            for row, shape in zip(scale, shapes, strict=True):
                if rank := shape.module_rank(layer, module):
                    row[:rank] = shape.scaling(rank)
            scales[name] = jnp.asarray(scale)
    return params, scales


def forward(
    params: Params,
    tokens: jax.Array,
    segments: jax.Array,
    *,
    config: ModelConfig,
    dtype: Any = jnp.float32,
    lora: Params | None = None,
    scales: Params | None = None,
) -> jax.Array:
    """Logits f32 [B, S, V] of tokens [B, S]; a position sees its segment up to itself.

    `lora` and `scales` are one adapter's (no stack axis); `dtype` is that of the matrix products.
    """

    def linear(x: jax.Array, name: str) -> jax.Array:
        y = jnp.einsum("bsi,oi->bso", x, params[name + ".weight"].astype(dtype))
        if lora is None or scales is None:
            return y
        v = jnp.einsum("bsi,ri->bsr", x, lora[name + ".lora_A.weight"].astype(dtype))
        v = v * scales[name].astype(dtype)
        return y + jnp.einsum("bsr,or->bso", v, lora[name + ".lora_B.weight"].astype(dtype))

    def norm(x: jax.Array, name: str) -> jax.Array:
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(x32**2, -1, keepdims=True) + config.rms_norm_eps)
        return (x32 * params[name + ".weight"]).astype(dtype)

    length = tokens.shape[1]
    mask = segments[:, :, None] == segments[:, None, :]
    mask = mask & jnp.tril(jnp.ones((length, length), bool))
    cos, sin = _rope_tables(length, config)
    x = jnp.take(params["model.embed_tokens.weight"], tokens, axis=0).astype(dtype)
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}."
        h = norm(x, prefix + "input_layernorm")
        q, k, v = (linear(h, prefix + f"self_attn.{m}_proj") for m in "qkv")
        h = _attention(_rotate(q, cos, sin, config), _rotate(k, cos, sin, config), v, mask, config)
        x = x + linear(h, prefix + "self_attn.o_proj")
        h = norm(x, prefix + "post_attention_layernorm")
        gate = linear(h, prefix + "mlp.gate_proj")
        h = jax.nn.silu(gate) * linear(h, prefix + "mlp.up_proj")
        x = x + linear(h, prefix + "mlp.down_proj")
    x = norm(x, "model.norm")
    head = params["lm_head.weight"].astype(dtype)
    return jnp.einsum("bsd,vd->bsv", x, head, preferred_element_type=jnp.float32)


def _rope_tables(length: int, config: ModelConfig) -> tuple[jax.Array, jax.Array]:
    half = config.head_dim // 2
    frequencies = config.rope.theta ** (-np.arange(half) / half)
    angles = np.arange(length)[:, None] * frequencies  # [S, H / 2]
    return jnp.asarray(np.cos(angles), jnp.float32), jnp.asarray(np.sin(angles), jnp.float32)


def _rotate(x: jax.Array, cos: jax.Array, sin: jax.Array, config: ModelConfig) -> jax.Array:
    """Rotary embedding, Llama's layout: the halves of a head are the pairs. x [B, S, heads * H]."""
    heads = x.reshape(*x.shape[:2], -1, config.head_dim).astype(jnp.float32)
    first, second = jnp.split(heads, 2, axis=-1)
    cos, sin = cos[None, :, None, :], sin[None, :, None, :]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


def _attention(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, config: ModelConfig
) -> jax.Array:
    """Grouped-query attention: q [B, S, N, H], k [B, S, K, H], v [B, S, K * H] -> [B, S, N * H]."""
    batch, length = q.shape[:2]
    q = q.reshape(batch, length, config.num_kv_heads, -1, config.head_dim)
    v = v.reshape(batch, length, config.num_kv_heads, config.head_dim)
    scores = jnp.einsum("bqkgh,bskh->bkgqs", q, k, preferred_element_type=jnp.float32)
    scores = jnp.where(mask[:, None, None], scores * config.head_dim**-0.5, -1e30)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bkgqs,bskh->bqkgh", weights, v).reshape(batch, length, -1)
