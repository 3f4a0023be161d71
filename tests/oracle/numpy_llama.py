"""The model in plain float64 numpy: the oracle that shares no code with the engine.

One sequence at a time, every position at once, no cache, no batching. An adapter is merged into the
weights: W + scaling * B @ A. Llama, Mistral, Qwen2 and Qwen3, all rope types of `RopeConfig`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from checkpoints.model_config import ModelConfig, RopeConfig

Float = NDArray[np.float64]
Deltas = Mapping[tuple[int, str], Float]  # (layer, module) -> scaling * b @ a, [out, in]


def logits(
    config: ModelConfig,
    weights: Mapping[str, NDArray[Any]],
    token_ids: Sequence[int],
    merged: Deltas | None = None,
) -> Float:
    """Logits [T, V] after each of the T tokens.

    Args: weights: under their Hugging Face names. merged: added to the linear weights.
    """
    embedding = _double(weights["model.embed_tokens.weight"])
    x = embedding[np.asarray(token_ids)]  # [T, D]
    cos, sin = rope_tables(config, len(token_ids))
    mask = _mask(len(token_ids), config.sliding_window)
    for layer in range(config.num_layers):
        x = x + _attention(config, weights, merged or {}, layer, x, cos, sin, mask)
        x = x + _mlp(config, weights, merged or {}, layer, x)
    x = _rms_norm(x, weights["model.norm.weight"], config.rms_norm_eps)
    head = embedding if config.tie_word_embeddings else _double(weights["lm_head.weight"])
    return x @ head.T


def merge(modules: Mapping[tuple[int, str], Any]) -> dict[tuple[int, str], Float]:
    """Deltas from anything with `a` [rank, in], `b` [out, rank] and `scaling` per module."""
    return {key: m.scaling * (_double(m.b) @ _double(m.a)) for key, m in modules.items()}


def greedy(
    config: ModelConfig,
    weights: Mapping[str, NDArray[Any]],
    token_ids: Sequence[int],
    num_tokens: int,
    merged: Deltas | None = None,
) -> list[int]:
    """The next `num_tokens` tokens of greedy decoding, recomputed from the start for each."""
    tokens = list(token_ids)
    for _ in range(num_tokens):
        tokens.append(int(np.argmax(logits(config, weights, tokens, merged)[-1])))
    return tokens[len(token_ids) :]


def _attention(
    config: ModelConfig,
    weights: Mapping[str, NDArray[Any]],
    merged: Deltas,
    layer: int,
    x: Float,
    cos: Float,
    sin: Float,
    mask: NDArray[np.bool_],
) -> Float:
    prefix = f"model.layers.{layer}."
    x = _rms_norm(x, weights[prefix + "input_layernorm.weight"], config.rms_norm_eps)
    num_tokens, size = len(x), config.head_dim
    q = _linear(weights, merged, layer, "q_proj", x).reshape(num_tokens, config.num_heads, size)
    k = _linear(weights, merged, layer, "k_proj", x).reshape(num_tokens, config.num_kv_heads, size)
    v = _linear(weights, merged, layer, "v_proj", x).reshape(num_tokens, config.num_kv_heads, size)
    if config.qk_norm:
        q = _rms_norm(q, weights[prefix + "self_attn.q_norm.weight"], config.rms_norm_eps)
        k = _rms_norm(k, weights[prefix + "self_attn.k_norm.weight"], config.rms_norm_eps)
    q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
    group = config.num_heads // config.num_kv_heads
    heads = np.empty((num_tokens, config.num_heads, size))
    for head in range(config.num_heads):
        scores = q[:, head] @ k[:, head // group].T / math.sqrt(size)  # [T, T]
        scores = np.where(mask, scores, -np.inf)
        shares = np.exp(scores - scores.max(axis=1, keepdims=True))
        heads[:, head] = shares / shares.sum(axis=1, keepdims=True) @ v[:, head // group]
    return _linear(weights, merged, layer, "o_proj", heads.reshape(num_tokens, -1))


def _mlp(
    config: ModelConfig, weights: Mapping[str, NDArray[Any]], merged: Deltas, layer: int, x: Float
) -> Float:
    norm = weights[f"model.layers.{layer}.post_attention_layernorm.weight"]
    x = _rms_norm(x, norm, config.rms_norm_eps)
    gate = _linear(weights, merged, layer, "gate_proj", x)
    up = _linear(weights, merged, layer, "up_proj", x)
    return _linear(weights, merged, layer, "down_proj", gate / (1.0 + np.exp(-gate)) * up)


def _linear(
    weights: Mapping[str, NDArray[Any]], merged: Deltas, layer: int, module: str, x: Float
) -> Float:
    parent = "self_attn" if module in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
    path = f"model.layers.{layer}.{parent}.{module}"
    weight = _double(weights[path + ".weight"])
    if (layer, module) in merged:
        weight = weight + merged[layer, module]
    y = x @ weight.T
    return y + _double(weights[path + ".bias"]) if path + ".bias" in weights else y


def _rms_norm(x: Float, weight: NDArray[Any], eps: float) -> Float:
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * _double(weight)


def _mask(num_tokens: int, sliding_window: int | None) -> NDArray[np.bool_]:
    """[query, key]: causal, and within the window, which counts the token itself."""
    distance = np.arange(num_tokens)[:, None] - np.arange(num_tokens)[None, :]
    window = num_tokens if sliding_window is None else sliding_window
    return (distance >= 0) & (distance < window)


def _rotate(x: Float, cos: Float, sin: Float) -> Float:
    """x [T, heads, H]: the first half of a head pairs with the second."""
    half = x.shape[-1] // 2
    turned = np.concatenate([-x[..., half:], x[..., :half]], axis=-1)
    return x * cos[:, None, :] + turned * sin[:, None, :]


def rope_tables(config: ModelConfig, num_tokens: int) -> tuple[Float, Float]:
    """(cos, sin), each [T, H], for a sequence of `num_tokens`."""
    frequencies, factor = rope_frequencies(config, num_tokens)
    angles = np.arange(num_tokens)[:, None] * frequencies[None, :]
    angles = np.concatenate([angles, angles], axis=1)
    return np.cos(angles) * factor, np.sin(angles) * factor


def rope_frequencies(config: ModelConfig, num_tokens: int) -> tuple[Float, float]:
    """Radians per position [H / 2], and the factor on cos and sin.

    `num_tokens` counts for the dynamic type only.
    """
    rope, size = config.rope, config.head_dim
    exponents = np.arange(0, size, 2) / size
    plain = rope.theta**-exponents
    if rope.rope_type == "default":
        return plain, 1.0
    if rope.rope_type == "linear":
        return plain / rope.factor, 1.0
    if rope.rope_type == "dynamic":
        length = max(num_tokens, config.max_position_embeddings)
        stretch = rope.factor * length / config.max_position_embeddings - (rope.factor - 1)
        theta = rope.theta * stretch ** (size / (size - 2))
        return theta**-exponents, 1.0
    if rope.rope_type == "llama3":
        return _llama3(rope, plain), 1.0
    assert rope.rope_type == "yarn"
    return _yarn(rope, plain, size), _yarn_factor(rope)


def _llama3(rope: RopeConfig, plain: Float) -> Float:
    """Slow long waves down, keep short ones, blend between. Source: Llama 3.1 reference code."""
    assert rope.original_max_position_embeddings is not None
    original = rope.original_max_position_embeddings
    found = []
    for frequency in plain:
        turns = original * frequency / (2 * math.pi)  # over the original context
        if turns < rope.low_freq_factor:
            found.append(frequency / rope.factor)
        elif turns > rope.high_freq_factor:
            found.append(frequency)
        else:
            blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
            found.append((1 - blend) * frequency / rope.factor + blend * frequency)
    return np.array(found)


def _yarn(rope: RopeConfig, plain: Float, size: int) -> Float:
    """A ramp over dimensions between two numbers of turns. Source: YaRN (arXiv:2309.00071)."""
    assert rope.original_max_position_embeddings is not None
    original = rope.original_max_position_embeddings

    def dimension(turns: float) -> float:
        return size * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    if low == high:
        high += 0.001
    ramp = np.clip((np.arange(size // 2) - low) / (high - low), 0, 1)
    return plain / rope.factor * ramp + plain * (1 - ramp)


def _yarn_factor(rope: RopeConfig) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor

    def scale(mscale: float) -> float:
        return 0.1 * mscale * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0

    if rope.mscale and rope.mscale_all_dim:
        return scale(rope.mscale) / scale(rope.mscale_all_dim)
    return scale(1.0)


def _double(array: NDArray[Any]) -> Float:
    return array.astype(np.float64)
