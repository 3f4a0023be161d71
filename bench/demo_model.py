"""The demo model in Flax NNX: a Llama for training, with or without a LoRA adapter.

Attributes are named as in Hugging Face's and PEFT's checkpoints, and weights are [out, in] as
there, so the path of a parameter in the module is its name in a file. Training, measuring and
export hold the parameters apart from the module, as one flat dict from those names to arrays;
`forward` merges the two. Adapters are trained as one stack under `vmap`: every A and B is padded to
the largest rank, and a scale of zero masks out what is not the adapter's own rank, module or layer.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

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


class Linear(nnx.Module):
    """`W x` in x's dtype, without a bias."""

    def __init__(self, weight: jax.Array) -> None:
        self.weight = nnx.Param(weight)  # f32 [out, in]

    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.einsum("bsi,oi->bso", x, self.weight.astype(x.dtype))


class LoraLinear(Linear):
    """`W x + B (scale * A x)`: a linear layer with one adapter, at first one that adds nothing."""

    def __init__(self, weight: jax.Array, rank: int) -> None:
        super().__init__(weight)
        size_out, size_in = weight.shape
        self.lora_A = Linear(jnp.zeros((rank, size_in)))
        self.lora_B = Linear(jnp.zeros((size_out, rank)))
        self.lora_scale = nnx.Variable(jnp.zeros(rank))  # not trained

    def __call__(self, x: jax.Array) -> jax.Array:
        y = super().__call__(x)
        v = self.lora_A(x) * self.lora_scale.astype(x.dtype)
        return y + self.lora_B(v)


class Embedding(nnx.Module):
    """Rows of a table."""

    def __init__(self, weight: jax.Array) -> None:
        self.weight = nnx.Param(weight)  # f32 [tokens, D]

    def __call__(self, tokens: jax.Array, dtype: Any) -> jax.Array:
        return jnp.take(self.weight[...], tokens, axis=0).astype(dtype)


class RmsNorm(nnx.Module):
    """Scales a vector to a mean square of 1, in f32, and then each feature by its weight."""

    def __init__(self, config: ModelConfig) -> None:
        self.eps = config.rms_norm_eps
        self.weight = nnx.Param(jnp.ones(config.hidden_size))

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(x32**2, -1, keepdims=True) + self.eps)
        normed: jax.Array = (x32 * self.weight[...]).astype(x.dtype)
        return normed


class Attention(nnx.Module):
    """Grouped-query self-attention with rotary positions."""

    def __init__(self, config: ModelConfig, q: Linear, k: Linear, v: Linear, o: Linear) -> None:
        self.config = config
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = q, k, v, o

    def __call__(self, x: jax.Array, mask: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        q, k = (_rotate(y, cos, sin, self.config) for y in (q, k))
        return self.o_proj(_attention(q, k, v, mask, self.config))


class Mlp(nnx.Module):
    """Llama's gated feed-forward layer."""

    def __init__(self, gate: Linear, up: Linear, down: Linear) -> None:
        self.gate_proj, self.up_proj, self.down_proj = gate, up, down

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nnx.Module):
    """One block: attention, then MLP, each on the normalised `x` and added to it."""

    def __init__(self, config: ModelConfig, linears: list[Linear]) -> None:
        """`linears` come in the order of TARGET_MODULES."""
        self.input_layernorm = RmsNorm(config)
        self.self_attn = Attention(config, *linears[:4])
        self.post_attention_layernorm = RmsNorm(config)
        self.mlp = Mlp(*linears[4:])

    def __call__(self, x: jax.Array, mask: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
        x = x + self.self_attn(self.input_layernorm(x), mask, cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nnx.Module):
    """The whole model, its weights random; the embedding has a row more for each task's tag.

    With a `lora_rank`, every target module has an adapter of that rank.
    """

    def __init__(self, config: ModelConfig, key: jax.Array, *, lora_rank: int = 0) -> None:
        self.config = config
        depth_scale = (2 * config.num_layers) ** -0.5
        layers = {}
        for layer in range(config.num_layers):
            linears: list[Linear] = []
            for module in TARGET_MODULES:
                key, subkey = jax.random.split(key)
                size_in, size_out = config.module_shape(module)
                scale = size_in**-0.5 * (depth_scale if module in ("o_proj", "down_proj") else 1.0)
                weight = scale * jax.random.normal(subkey, (size_out, size_in))
                linears.append(LoraLinear(weight, lora_rank) if lora_rank else Linear(weight))
            layers[str(layer)] = Layer(config, linears)
        embed_key, head_key = jax.random.split(key)
        width = config.hidden_size
        embedding = 0.3 * jax.random.normal(embed_key, (NUM_TRAINING_TOKENS, width))
        self.model = nnx.Dict(
            embed_tokens=Embedding(embedding), layers=nnx.Dict(layers), norm=RmsNorm(config)
        )
        self.lm_head = Linear(width**-0.5 * jax.random.normal(head_key, (VOCAB_SIZE, width)))

    def __call__(self, tokens: jax.Array, segments: jax.Array, dtype: Any) -> jax.Array:
        """Logits f32 [B, S, V] of tokens [B, S]; matrix products are in `dtype`."""
        length = tokens.shape[1]
        mask = segments[:, :, None] == segments[:, None, :]
        mask = mask & jnp.tril(jnp.ones((length, length), bool))
        cos, sin = _rope_tables(length, self.config)
        x = self.model.embed_tokens(tokens, dtype)
        for layer in range(self.config.num_layers):
            x = self.model.layers[str(layer)](x, mask, cos, sin)
        x = self.model.norm(x)
        head = self.lm_head.weight.astype(dtype)
        return jnp.einsum("bsd,vd->bsv", x, head, preferred_element_type=jnp.float32)


def init_params(key: jax.Array, config: ModelConfig) -> Params:
    """The f32 parameters of a new `Llama`."""
    _, state = nnx.split(Llama(config, key))
    params: Params = flatten_dict(nnx.to_pure_dict(state), sep=".")
    return params


def module_name(layer: int, module: str) -> str:
    """Hugging Face name of a target module, e.g. `model.layers.0.self_attn.q_proj`."""
    parent = "self_attn" if module in TARGET_MODULES[:4] else "mlp"
    return f"model.layers.{layer}.{parent}.{module}"


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
            scales[name + ".lora_scale"] = jnp.asarray(scale)
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
    arrays = {**params, **(lora or {}), **(scales or {})}
    graphdef = _graphdef(config, with_lora=lora is not None)
    model: Llama = nnx.merge(graphdef, unflatten_dict(arrays, sep="."))
    return model(tokens, segments, dtype)


@functools.cache
def _graphdef(config: ModelConfig, *, with_lora: bool) -> Any:
    """The module without its arrays, for `nnx.merge`. It holds no shapes, so any rank will do."""
    model = nnx.eval_shape(lambda: Llama(config, jax.random.key(0), lora_rank=int(with_lora)))
    graphdef, _ = nnx.split(model)
    return graphdef


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
