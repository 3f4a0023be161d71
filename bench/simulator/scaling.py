"""A fitted model carried over to another base model and to several GPUs. An assumption, not a fit.

What is assumed, besides that the fitted device is the one at hand:

- A step's program takes its floor (bytes over bandwidth, operations over rate, product by product)
  times the fitted program's own excess, plus a launch share that grows with the layers alone. On N
  GPUs the floor is divided by N and the launch share is not.
- Reading contexts and attending prompts follow layers, heads a device and head size; LoRA kernels
  follow the adapters' weights on a device; what a LoRA variant adds follows the layers.
- A collective takes a latency and the bytes a device sends on a ring over the link's bandwidth, as
  counted in docs/design.md, "Tensor parallelism". Nothing overlaps with it. The embedding's is in.
- The host takes as long a step as it did, and each GPU has a bus of its own.
"""

from __future__ import annotations

import dataclasses

from bench.simulator.cost import BUCKET, CONTEXT, Cost
from bench.simulator.device_model import DeviceModel
from bench.simulator.engine import EngineDescription
from checkpoints.model_config import ModelConfig
from sloraj.config import div_ceil
from sloraj.runner.buckets import Bucket

READ_BYTES_PER_S, FLOPS_PER_S = 4.03e12, 790e12  # as in `bench.floors`, which needs JAX
ITEM_BYTES, DELTA_BYTES = 2, 4  # activations in bfloat16; shrunk rows in float32


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """Between the GPUs of one host: NVLink 4 as NCCL uses it, an assumption."""

    all_reduce_s: float = 12e-6  # before the first byte
    all_gather_s: float = 8e-6
    bytes_per_s: float = 350e9  # a direction


def program_floor_s(model: ModelConfig, tokens: int, rows: int, tp: int) -> float:
    """Of the base's products of one step, on each of `tp` devices."""
    hidden, mlp = model.hidden_size, model.intermediate_size
    shapes = [
        (hidden, model.q_size + 2 * model.kv_size), (model.q_size, hidden), (hidden, 2 * mlp),
        (mlp, hidden),
    ]  # fmt: skip

    def product_s(a: int, b: int, num: int) -> float:
        return max(a * b * ITEM_BYTES / READ_BYTES_PER_S, 2 * num * a * b / FLOPS_PER_S) / tp

    layer_s = sum(product_s(a, b, tokens) for a, b in shapes)
    return model.num_layers * layer_s + product_s(hidden, model.vocab_size, rows)


def scaled(
    model: DeviceModel,
    source: ModelConfig,
    target: EngineDescription,
    link: Link,
    *,
    has_lora_collectives: bool = True,
) -> DeviceModel:
    """The model for `target`, fitted on the base `source` on one GPU.

    Raises ValueError if the model knows no decode program.
    """
    to, tp = target.model, target.layout.tp
    layers = to.num_layers / source.num_layers
    fitted = model.device.coefficients
    known = [int(name.rpartition("-")[2]) for name in fitted if name.startswith(BUCKET + "decode-")]
    if not known:
        raise ValueError("model: fitted on no decode step, allowed: at least one")
    smallest = min(known)
    launch_s = max(
        fitted[f"{BUCKET}decode-{smallest}"] - program_floor_s(source, smallest, smallest, 1), 0.0
    )
    factors = _factors(source, target)
    coefficients = {
        name: value * factors.get(name.rpartition(":")[2], layers)
        for name, value in fitted.items()
        if not name.startswith(BUCKET)
    }
    for bucket in (*target.buckets.decode, *target.buckets.mixed):
        tokens, rows = bucket.num_tokens, bucket.num_logits
        own_s = max(model.device.bucket_s(bucket.name) - launch_s, 0.0)
        excess = own_s / program_floor_s(source, tokens, rows, 1)
        floor_s = program_floor_s(to, tokens, rows, tp)
        coefficients[BUCKET + bucket.name] = (
            excess * floor_s + launch_s * layers + base_collectives_s(target, bucket, link)
        )
        if has_lora_collectives:
            lora_s = lora_collectives_s(target, bucket, link)
            coefficients[f"{BUCKET}{bucket.name}:attention"] = lora_s
    return dataclasses.replace(
        model, device=Cost(coefficients), bus_bytes_per_s=model.bus_bytes_per_s * tp
    )


def _factors(source: ModelConfig, target: EngineDescription) -> dict[str, float]:
    """By which work a device does more or less of than `source`'s, by column; others by layers."""
    to, layout = target.model, target.layout
    layers = to.num_layers / source.num_layers
    kv = layout.num_kv_heads * layout.head_dim / source.kv_size
    heads = to.q_size / layout.tp / source.q_size
    each = 1 / layout.tp
    return {
        CONTEXT: layers * kv, "prompt_pairs": layers * heads, "adapter_elements": each,
        "adapter_products": each, "largest_elements": each, "install_bytes": each,
        "num_resets": 1.0, "num_installs": 1.0,
    }  # fmt: skip


def base_collectives_s(engine: EngineDescription, bucket: Bucket, link: Link) -> float:
    """Two all-reduces a layer, one of the embedding, and the gathering of the logits."""
    model, n = engine.model, engine.layout.tp
    if n == 1:
        return 0.0
    activations = bucket.num_tokens * model.hidden_size * ITEM_BYTES
    reduce_s = link.all_reduce_s + 2 * (n - 1) / n * activations / link.bytes_per_s
    logits = (n - 1) / n * bucket.num_logits * model.vocab_size * ITEM_BYTES
    return (2 * model.num_layers + 1) * reduce_s + link.all_gather_s + logits / link.bytes_per_s


def lora_collectives_s(engine: EngineDescription, bucket: Bucket, link: Link) -> float:
    """Of adapters on q, k, v and o: a gathering of three shrunk rows, a reduction of one, a layer;
    rows of `max_rank`, whatever the ranks in the batch.
    """
    n = engine.layout.tp
    if n == 1:
        return 0.0
    rank = div_ceil(engine.scheduler.max_rank, n) * n
    rows = bucket.num_tokens * rank * DELTA_BYTES * (n - 1) / n / link.bytes_per_s
    return engine.model.num_layers * (link.all_gather_s + link.all_reduce_s + (3 + 2) * rows)
