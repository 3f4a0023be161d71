"""Gate (b): every kernel lowers for CUDA at real shapes, on a machine that has no GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType

from pallas_kernels.add_norm import add_rms_norm
from pallas_kernels.lora_expand import lora_expand
from pallas_kernels.lora_rows import lora_rows
from pallas_kernels.lora_rows_triton import Config
from pallas_kernels.lora_shrink import lora_shrink
from pallas_kernels.paged_attention import paged_decode_attention, paged_ragged_attention
from pallas_kernels.rope_write import HeadNorms, HeadShape, rope_write
from pallas_kernels.shapes import MODELS, ModelShape
from pallas_kernels.tiles import LoraTiles, QueryTiles

# JAX 0.11 says at lowering that Pallas-Triton will go one day
pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")
TRITON, MOSAIC = "__gpu$xla.gpu.triton", "mosaic_gpu"
needs_mosaic = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="the Mosaic GPU kernels are written for JAX 0.11 and up"
)
ODD_HEADS = {  # head sizes that are no powers of two, and groups of three
    f"head-{head_dim}": ModelShape(
        hidden_size=960, num_heads=12, num_kv_heads=4, head_dim=head_dim, intermediate_size=1000
    )
    for head_dim in (80, 96)
}
NUM_PAGES = 40_000  # at 7B more than 2 ** 32 elements: no index may be flat


def lowered(op: Callable[..., Any], *shapes: Any, donate: tuple[int, ...] = ()) -> str:
    """The program of `op` for CUDA, with its Triton kernels inside."""
    target: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if jax.__version_info__ >= (0, 11):  # earlier versions assume compute capability 9.0
        device = jax.sharding.AbstractDevice("NVIDIA H200", 132, platform="gpu")
        mesh = AbstractMesh((1,), ("tp",), axis_types=(AxisType.Auto,), abstract_device=device)
        target = jax.sharding.use_abstract_mesh(mesh)
    with target:
        traced = jax.jit(op, donate_argnums=donate).trace(*shapes)
        return traced.lower(lowering_platforms=("cuda",)).as_text()


def array(*shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def bf16(*shape: int) -> jax.ShapeDtypeStruct:
    return array(*shape, dtype=jnp.bfloat16)


def lora_tiles(num_tokens: int, block_rows: int) -> LoraTiles:
    capacity = num_tokens // block_rows + 64
    return LoraTiles(
        row_order=array(num_tokens),
        starts=array(capacity + 1),
        slots=array(capacity),
        segments=array(32, capacity, 7, 4),
        num_tiles=array(1),
        block_rows=block_rows,
    )


def adapters(model: ModelShape, num_tokens: int, block_rows: int) -> tuple[Any, ...]:
    pool = bf16(NUM_PAGES, model.page_elems)
    return pool, array(65, 80), array(), lora_tiles(num_tokens, block_rows)


@pytest.mark.parametrize("model", [*MODELS.values()], ids=[*MODELS])
@pytest.mark.parametrize(("num_tokens", "block_rows", "max_rank"), [(64, 1, 64), (2048, 64, 256)])
@pytest.mark.parametrize("modules", [(0, 1, 2), (6,)])
def test_lora_kernels_lower(
    model: ModelShape, num_tokens: int, block_rows: int, max_rank: int, modules: tuple[int, ...]
) -> None:
    in_size = model.module_sizes(modules[0])[0]
    out_sizes = tuple(model.module_sizes(module)[1] for module in modules)
    arrays = adapters(model, num_tokens, block_rows)

    def shrink(*args: Any) -> Any:
        return lora_shrink(
            *args, modules=modules, num_rows=max_rank, rank_split=1, implementation="triton"
        )

    def expand(*args: Any) -> Any:
        return lora_expand(*args, modules=modules, out_sizes=out_sizes, implementation="triton")

    assert TRITON in lowered(shrink, bf16(num_tokens, in_size), *arrays)
    base, v = bf16(num_tokens, sum(out_sizes)), (num_tokens, len(modules), max_rank)
    program = lowered(expand, base, array(*v, dtype=jnp.float32), *arrays, array(), donate=(0,))
    assert "output_operand_alias" in program
    if block_rows == 1:
        program = lowered(expand, None, array(*v, dtype=jnp.float32), *arrays, array())
        assert TRITON in program and "output_operand_alias" not in program


@pytest.mark.parametrize("model", [*MODELS.values()], ids=[*MODELS])
@pytest.mark.parametrize("modules", [(0, 1, 2), (3,), (6,)])
@pytest.mark.parametrize("block_chunks", [8, 32])
def test_the_kernel_of_single_rows_lowers(
    model: ModelShape, modules: tuple[int, ...], block_chunks: int
) -> None:
    out_sizes = tuple(model.module_sizes(module)[1] for module in modules)

    def rows(*args: Any) -> Any:
        return lora_rows(
            *args, modules=modules, out_sizes=out_sizes, max_rank=64, implementation="triton",
            config=Config(block_chunks=block_chunks, row_ranks=4, num_warps=8),
        )  # fmt: skip

    x = bf16(300, model.module_sizes(modules[0])[0])  # the first 64 of a longer step's tokens
    assert lowered(rows, x, *adapters(model, 64, 1)).count(TRITON) == 1


@pytest.mark.parametrize(
    "model", [*MODELS.values(), *ODD_HEADS.values()], ids=[*MODELS, *ODD_HEADS]
)
def test_attention_and_kv_kernels_lower(model: ModelShape) -> None:
    heads, kv_heads, head_dim = model.num_heads, model.num_kv_heads, model.head_dim
    pool = bf16(NUM_PAGES, model.page_elems)
    tiles = QueryTiles(
        row=array(40),
        q_start=array(40),
        q_len=array(40),
        position=array(40),
        num_tiles=array(1),
        block_q=32,
    )
    keywords: dict[str, Any] = {
        "num_kv_heads": kv_heads,
        "page_size": model.page_size,
        "scale": 1.0,
        "implementation": "triton",
    }

    def q_of(num_tokens: int) -> jax.ShapeDtypeStruct:
        return bf16(num_tokens, heads, head_dim)

    def decode(*args: Any) -> Any:
        return paged_decode_attention(*args, **keywords)

    def prefill(*args: Any) -> Any:
        return paged_ragged_attention(*args, **keywords)

    table, q = array(257, 512), q_of(300)
    for num_rows, num_tokens, width, num_kernels in (
        (256, 256, 8, 1),  # rows are too short to be cut
        (64, 64, 512, 2),  # rows are cut and joined
        (256, 300, 512, 2),  # and the rows are the first tokens of a longer step
    ):
        arrays = (q_of(num_tokens), pool, array(257, width), array(num_rows), array(num_rows))
        assert lowered(decode, *arrays, array()).count(TRITON) == num_kernels
    program = lowered(prefill, q, pool, table, tiles, array(), q, donate=(6,))
    assert TRITON in program and "output_operand_alias" in program


@pytest.mark.parametrize(
    "model", [*MODELS.values(), *ODD_HEADS.values()], ids=[*MODELS, *ODD_HEADS]
)
@pytest.mark.parametrize(("has_norms", "has_lora"), [(False, False), (True, False), (True, True)])
def test_elementwise_kernels_lower(model: ModelShape, has_norms: bool, has_lora: bool) -> None:
    shape = HeadShape(
        num_heads=model.num_heads,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        page_size=model.page_size,
    )
    pool, weight = bf16(NUM_PAGES, model.page_elems), bf16(model.head_dim)
    norms = HeadNorms(weight, weight) if has_norms else None
    angle = array(64, model.head_dim // 2, dtype=jnp.float32)

    def write(*args: Any) -> Any:
        return rope_write(*args, shape=shape, eps=1e-6, implementation="triton")

    lora = array(64, shape.width, dtype=jnp.float32) if has_lora else None
    places = (array(64), array(64))
    program = lowered(
        write, bf16(64, shape.width), pool, angle, angle, *places, norms, lora, donate=(1,)
    )
    assert TRITON in program
    assert "output_operand_alias" in program

    def add_norm(x: Any, delta: Any, weight: Any, lora: Any) -> Any:
        return add_rms_norm(x, delta, weight, 1e-6, lora, implementation="triton")

    x = bf16(64, model.hidden_size)
    lora = array(*x.shape, dtype=jnp.float32) if has_lora else None
    assert TRITON in lowered(add_norm, x, x, bf16(model.hidden_size), lora)


@needs_mosaic
@pytest.mark.parametrize("model", ["llama-7b", "llama-3.1-8b", "qwen2-0.5b", "qwen2-7b"])
@pytest.mark.parametrize("modules", [(0, 1, 2), (6,)])
def test_mosaic_lora_kernels_lower(model: str, modules: tuple[int, ...]) -> None:
    shape = MODELS[model]
    in_size = shape.module_sizes(modules[0])[0]
    out_sizes = tuple(shape.module_sizes(module)[1] for module in modules)
    arrays = adapters(shape, 64, 8)

    def shrink(*args: Any) -> Any:
        return lora_shrink(
            *args, modules=modules, num_rows=64, rank_split=1, implementation="mosaic"
        )

    def expand(*args: Any) -> Any:
        return lora_expand(*args, modules=modules, out_sizes=out_sizes, implementation="mosaic")

    assert MOSAIC in lowered(shrink, bf16(64, in_size), *arrays)
    base, v = bf16(64, sum(out_sizes)), array(64, len(modules), 64, dtype=jnp.float32)
    program = lowered(expand, base, v, *arrays, array(), donate=(0,))
    assert MOSAIC in program
    assert "output_operand_alias" in program


@needs_mosaic
@pytest.mark.parametrize("model", ["llama-7b", "llama-3.1-8b", "qwen2-0.5b", "qwen2-7b"])
def test_mosaic_attention_lowers(model: str) -> None:
    shape = MODELS[model]
    tiles = QueryTiles(
        row=array(40), q_start=array(40), q_len=array(40), position=array(40), num_tiles=array(1),
        block_q=128,
    )  # fmt: skip

    def prefill(*args: Any) -> Any:
        return paged_ragged_attention(
            *args, num_kv_heads=shape.num_kv_heads, page_size=shape.page_size, scale=1.0,
            implementation="mosaic",
        )  # fmt: skip

    q, pool = bf16(2048, shape.num_heads, shape.head_dim), bf16(NUM_PAGES, shape.page_elems)
    assert MOSAIC in lowered(prefill, q, pool, array(256, 512), tiles, array())
