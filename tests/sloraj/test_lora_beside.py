"""What a step's LoRA kernels wait for, read from the traced programs of a GPU: nothing is run."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import pytest

from checkpoints.model_config import ModelConfig
from pallas_kernels.dispatch import KernelChoice
from pallas_kernels.lora_rows_triton import Config
from sloraj.config import PoolLayout
from sloraj.model import lora
from sloraj.model.llama import abstract_model
from sloraj.model.step import StepSpec
from sloraj.parallel.mesh import make_mesh
from sloraj.runner.buckets import make_buckets
from sloraj.runner.jobs import make_jobs
from sloraj.runner.state import RunnerConfig
from tests.checkpoints.fixtures import tiny_config

PRODUCTS_A_LAYER = 4  # qkv, o, gate and up, down
Products = frozenset[int]


def trace(config: ModelConfig, bucket: str) -> Any:
    """The jaxpr of a forward program, with the kernels that a GPU runs."""
    layout = PoolLayout(
        num_layers=config.num_layers, num_kv_heads=config.num_kv_heads, head_dim=config.head_dim,
        page_size=4, tp=1, dtype="float32",
    )  # fmt: skip
    spec = StepSpec(
        config=config, tp=1, page_size=4, max_rank=8, kernels=KernelChoice.uniform("triton")
    )
    runner = RunnerConfig(
        layout=layout, num_pages=16, max_num_seqs=4, max_model_len=32, max_adapter_slots=2,
        max_adapter_pages=4,
    )  # fmt: skip
    model = abstract_model(spec, jnp.dtype("float32"))
    jobs = make_jobs(model, make_mesh(1), make_buckets(4, 16, 4, 16), runner)
    job = next(job for job in jobs if job.key[:2] == ("forward", bucket))
    return job.program.trace(*job.arguments).jaxpr


class Ancestry:
    """The products that come before each LoRA kernel of a program, in the kernels' order."""

    def __init__(self) -> None:
        self.kernels: list[tuple[str, Products]] = []
        self._products = itertools.count()

    def walk(self, jaxpr: Any, inputs: list[Products]) -> list[Products]:
        """Of each output of `jaxpr`, the products that come before it."""
        known: dict[Any, Products] = dict(zip(jaxpr.invars, inputs, strict=True))

        def before(atom: Any) -> Products:
            return frozenset() if hasattr(atom, "val") else known.get(atom, frozenset())

        for equation in jaxpr.eqns:
            name, operands = equation.primitive.name, [before(atom) for atom in equation.invars]
            every = frozenset().union(*operands)
            inner = next(inner_jaxprs(equation), None)
            if name == "pallas_call":
                self.kernels.append((str(equation.params["name"]), every))
                results = [every] * len(equation.outvars)
            elif inner is not None and len(inner.invars) == len(operands):
                results = self.walk(inner, operands)
            else:
                assert inner is None or "dot_general" not in str(inner), name
                if name == "dot_general":
                    every |= {next(self._products)}
                results = [every] * len(equation.outvars)
            known |= dict(zip(equation.outvars, results, strict=True))
        return [before(atom) for atom in jaxpr.outvars]


def inner_jaxprs(equation: Any) -> Iterator[Any]:
    for value in equation.params.values():
        if hasattr(value, "eqns"):
            yield value
        elif hasattr(value, "jaxpr"):
            yield value.jaxpr


@pytest.mark.parametrize("bucket", ["decode-4", "mixed-16"])
def test_for_single_rows_no_lora_kernel_waits_for_the_product_beside_it(bucket: str) -> None:
    """Of longer rows, whose kernels come second, expand does: it adds to the product in place."""
    config = tiny_config(num_layers=2)
    jaxpr = trace(config, bucket).jaxpr
    ancestry = Ancestry()
    ancestry.walk(jaxpr, [frozenset()] * len(jaxpr.invars))
    num_products = config.num_layers * PRODUCTS_A_LAYER
    is_mixed = bucket.startswith("mixed")
    for kernel, own in (("lora_shrink", 0), ("lora_expand", 1)):
        waits = [len(products) for name, products in ancestry.kernels if name == kernel]
        kinds = 2 if is_mixed else 1
        assert waits[::kinds] == [*range(num_products)]
        assert not is_mixed or waits[1::2] == [place + own for place in range(num_products)]


@pytest.mark.parametrize("bucket", ["decode-4", "mixed-16"])
def test_where_the_table_says_so_one_kernel_serves_single_rows_and_waits_for_as_little(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = Config(block_chunks=1, row_ranks=4, num_warps=4)
    monkeypatch.setattr(lora, "chosen_config", lambda num_tokens, width, out_sizes: one)
    config = tiny_config(num_layers=2)
    jaxpr = trace(config, bucket).jaxpr
    ancestry = Ancestry()
    ancestry.walk(jaxpr, [frozenset()] * len(jaxpr.invars))
    num_products = config.num_layers * PRODUCTS_A_LAYER
    waits = [len(products) for name, products in ancestry.kernels if name == "lora_rows"]
    assert waits == [*range(num_products)]
    names = [name for name, _ in ancestry.kernels]
    num_longer = num_products if bucket.startswith("mixed") else 0
    assert names.count("lora_shrink") == names.count("lora_expand") == num_longer
