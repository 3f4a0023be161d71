"""Trains the embedded demo: one small Llama and its LoRA adapters, in minutes on one GPU.

    python -m bench.train_demo --out checkpoints/demo    # writes model/, adapters/, accuracy.json

1. The base learns every task under the task's tag (a first token that exists only in training), and
   to repeat the text when there is no tag.
2. It is rounded to bfloat16, the stored dtype, and frozen.
3. All adapters are trained at once, each on its own task without a tag: it has only to select what
   the base can do.
4. All are rounded, and accuracy is measured on held-out texts in float32 (and again with bfloat16
   compute).

Seeded; the data comes from worker processes, always fresh. `--time-limit` bounds the training: the
learning rate then falls to zero earlier, and what there is gets exported. `--reuse-base` starts at
step 3.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from safetensors.numpy import load_file

from bench.demo_adapters import PLANS
from bench.demo_data import Generator, Rows, pack_mixed, pack_task
from bench.demo_evaluate import accuracies
from bench.demo_export import Arrays, adapter_tensors, to_bfloat16, write_adapter, write_model
from bench.demo_model import DEMO_CONFIG, Params, forward, init_adapters, init_params
from checkpoints.demo.tasks import BASE_TASK

_PARTS_PER_CHUNK = 16  # a chunk of training rows is made by this many worker calls


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """Length and step size of one training phase."""

    steps: int
    chunk: int  # steps in one compiled call
    rows: int  # rows a step (of each adapter, when adapters are trained)
    row_length: int
    learning_rate: float
    warm_up_steps: int
    deadline: float  # time.monotonic() by which the phase must end

    def learning_rates(self, step: int, started: float) -> np.ndarray:
        """Linear warm-up, then cosine to zero over the steps, or over the time if it ends first.

        Returns f32 [chunk], for steps `step` onwards of the phase that `started` then.
        """
        elapsed = (time.monotonic() - started) / max(self.deadline - started, 1e-6)
        progress = np.maximum((step + np.arange(self.chunk)) / self.steps, elapsed)
        warm_up = np.minimum(1.0, (step + np.arange(self.chunk) + 1) / self.warm_up_steps)
        cosine = 0.5 * (1 + np.cos(np.pi * np.minimum(progress, 1.0)))
        return (self.learning_rate * warm_up * np.maximum(cosine, 0.01)).astype(np.float32)


def loss_of(logits: jax.Array, tokens: jax.Array, in_answer: jax.Array) -> jax.Array:
    """Mean cross-entropy in nats over the answers' tokens."""
    losses = optax.softmax_cross_entropy_with_integer_labels(
        logits, tokens[:, 1:].astype(jnp.int32)
    )
    return jnp.sum(losses * in_answer) / jnp.maximum(jnp.sum(in_answer), 1)


def base_loss(params: Params, tokens: jax.Array, segments: jax.Array, in_answer: jax.Array) -> Any:
    """Loss of the base on rows [B, S]; bfloat16 compute."""
    logits = forward(params, tokens[:, :-1], segments, config=DEMO_CONFIG, dtype=jnp.bfloat16)
    return loss_of(logits, tokens, in_answer)


def adapters_loss(
    lora: Params,
    tokens: jax.Array,
    segments: jax.Array,
    in_answer: jax.Array,
    *,
    base: Params,
    scales: Params,
) -> Any:
    """Sum over adapters of each one's loss on its own rows [N, B, S].

    No adapter's gradient depends on another's.
    """

    def one(lora: Params, scales: Params, *rows: jax.Array) -> jax.Array:
        logits = forward(
            base,
            rows[0][:, :-1],
            rows[1],
            config=DEMO_CONFIG,
            dtype=jnp.bfloat16,
            lora=lora,
            scales=scales,
        )
        return loss_of(logits, rows[0], rows[2])

    return jnp.sum(jax.vmap(one)(lora, scales, tokens, segments, in_answer))


def train(
    loss: Any, params: Params, optimizer: Any, phase: Phase, chunks: Iterator[Rows], *, name: str
) -> Params:
    """Minimise `loss(params, tokens, segments, in_answer)`.

    `chunks` yield arrays with a leading axis of phase.chunk steps.
    """

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def run_chunk(params: Params, state: Any, rows: Any, learning_rates: jax.Array) -> Any:
        def step(carry: Any, inputs: Any) -> Any:
            params, state = carry
            *rows, learning_rate = inputs
            value, gradients = jax.value_and_grad(loss)(params, *rows)
            updates, state = optimizer.update(gradients, state, params)
            updates = jax.tree.map(lambda update: -learning_rate * update, updates)
            return (optax.apply_updates(params, updates), state), value

        return jax.lax.scan(step, (params, state), (*rows, learning_rates))

    state = jax.jit(optimizer.init)(params)
    started, step, value = time.monotonic(), 0, None
    for rows in chunks:
        if time.monotonic() >= phase.deadline:
            print(f"{name}: time limit at step {step} of {phase.steps}", flush=True)
            break
        rates = phase.learning_rates(step, started)
        arrays = (rows.tokens, rows.segments, rows.in_answer)
        if value is not None:
            value.block_until_ready()  # at most one chunk ahead of the device
        (params, state), value = run_chunk(params, state, arrays, rates)
        step += phase.chunk
        if (step // phase.chunk) % 10 == 0 or step >= phase.steps or step == phase.chunk:
            seconds = time.monotonic() - started
            mean = float(jnp.mean(value))
            print(f"{name}: step {step} loss {mean:.4f} ({seconds:.0f} s)", flush=True)
    return params


def train_base(arguments: argparse.Namespace, generator: Generator, deadline: float) -> Arrays:
    """Train the base from random weights; returns it in bfloat16, tags' embeddings included."""
    phase = Phase(
        steps=arguments.base_steps,
        chunk=arguments.chunk,
        rows=arguments.base_rows,
        row_length=arguments.row_length,
        learning_rate=arguments.base_learning_rate,
        warm_up_steps=500,
        deadline=deadline,
    )
    rows_per_part = -(-phase.chunk * phase.rows // _PARTS_PER_CHUNK)

    def parts(index: int) -> list[tuple[object, ...]]:
        return [
            (pack_mixed, f"{arguments.seed}:base:{index}:{part}", rows_per_part, phase.row_length)
            for part in range(_PARTS_PER_CHUNK)
        ]

    wanted = phase.chunk * phase.rows
    chunks = (
        rows.map(lambda x: x[:wanted].reshape(phase.chunk, phase.rows, -1))
        for rows in generator.chunks(parts, -(-phase.steps // phase.chunk))
    )
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(b1=0.9, b2=0.98),
        optax.add_decayed_weights(0.01),
    )
    params = init_params(jax.random.key(arguments.seed), DEMO_CONFIG)
    return to_bfloat16(train(base_loss, params, optimizer, phase, chunks, name="base"))


def train_adapters(
    arguments: argparse.Namespace, generator: Generator, base: Params, deadline: float
) -> tuple[Params, Params]:
    """Train the adapters of PLANS on the frozen base; returns their stack: f32 A and B, scales."""
    phase = Phase(
        steps=arguments.adapter_steps,
        chunk=arguments.chunk,
        rows=arguments.adapter_rows,
        row_length=arguments.row_length,
        learning_rate=arguments.adapter_learning_rate,
        warm_up_steps=100,
        deadline=deadline,
    )
    wanted = phase.chunk * phase.rows

    def parts(index: int) -> list[tuple[object, ...]]:
        return [
            (pack_task, f"{arguments.seed}:{task}:{index}", task, wanted, phase.row_length)
            for task in PLANS
        ]

    chunks = (
        rows.map(lambda x: x.reshape(len(PLANS), phase.chunk, phase.rows, -1).swapaxes(0, 1))
        for rows in generator.chunks(parts, -(-phase.steps // phase.chunk))
    )
    lora, scales = init_adapters(
        jax.random.key(arguments.seed + 1), DEMO_CONFIG, [plan.shape for plan in PLANS.values()]
    )
    loss = functools.partial(adapters_loss, base=base, scales=scales)
    return train(loss, lora, optax.scale_by_adam(), phase, chunks, name="adapters"), scales


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Command line; the defaults are the settings of the committed checkpoint."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="directory to write to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--row-length", type=int, default=128, help="tokens in a packed row")
    parser.add_argument("--chunk", type=int, default=50, help="steps in one compiled call")
    parser.add_argument("--base-steps", type=int, default=10_000)
    parser.add_argument("--base-rows", type=int, default=512, help="rows a step")
    parser.add_argument("--base-learning-rate", type=float, default=2e-3)
    parser.add_argument("--adapter-steps", type=int, default=4_000)
    parser.add_argument("--adapter-rows", type=int, default=8, help="rows a step of each adapter")
    parser.add_argument("--adapter-learning-rate", type=float, default=2e-3)
    parser.add_argument("--held-out", type=int, default=2_000, help="held-out texts a task")
    parser.add_argument("--reuse-base", action="store_true", help="take the base from OUT/model")
    parser.add_argument("--workers", type=int, default=14, help="data processes")
    parser.add_argument("--time-limit", type=float, default=3_600.0, help="seconds in all")
    parser.add_argument("--base-share", type=float, default=0.65, help="of the time limit, at most")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    """Train, export, measure."""
    arguments = parse_arguments(argv)
    started = time.monotonic()
    device = jax.devices()[0].device_kind
    generator = Generator(arguments.workers)
    print(f"{device}, JAX {jax.__version__}, {len(PLANS)} adapters", flush=True)

    if arguments.reuse_base:
        base = load_file(arguments.out / "model" / "model.safetensors")
    else:
        base_deadline = started + arguments.base_share * arguments.time_limit
        base = train_base(arguments, generator, base_deadline)
        write_model(arguments.out / "model", base, DEMO_CONFIG)
    params = {name: jnp.asarray(array, jnp.float32) for name, array in base.items()}
    if not arguments.reuse_base:  # the tags' embeddings are not exported
        tagged = accuracies(params, arguments.held_out, tagged=True)
        print(f"base with tags: worst {min(tagged.values())}", flush=True)

    deadline = started + arguments.time_limit
    lora, scales = train_adapters(arguments, generator, params, deadline)
    generator.close()
    for index, (adapter_id, plan) in enumerate(PLANS.items()):
        tensors = adapter_tensors(lora, index, plan, DEMO_CONFIG.num_layers)
        write_adapter(arguments.out / "adapters" / adapter_id, tensors, plan)
    lora = {name: jnp.asarray(array, jnp.float32) for name, array in to_bfloat16(lora).items()}

    measure = functools.partial(accuracies, params, arguments.held_out, lora=lora, scales=scales)
    float32, bfloat16 = measure(), measure(dtype=jnp.bfloat16)
    report: dict[str, Any] = {
        "device": device,
        "jax": jax.__version__,
        "command": " ".join(["python -m bench.train_demo", *argv]),
        "seconds": round(time.monotonic() - started, 1),
        "held_out_texts": arguments.held_out,
        "exact_match_float32": float32,
        "exact_match_bfloat16": bfloat16,
    }
    (arguments.out / "accuracy.json").write_text(json.dumps(report, indent=2) + "\n")
    for name in (BASE_TASK.id, *PLANS):
        print(f"{name:14} f32 {float32[name]:.4f} bf16 {bfloat16[name]:.4f}")
    print(f"worst {min(float32.values())}, {report['seconds']} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
