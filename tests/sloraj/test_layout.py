"""Laws of the adapter layout, against an unpacking written from docs/design.md alone."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from checkpoints.model_config import TARGET_MODULES, ModelConfig
from sloraj.adapters.layout import max_adapter_pages, num_adapter_pages, pack_adapter
from sloraj.batch import PackedAdapter
from sloraj.config import PoolLayout
from sloraj.errors import AdapterLoadError

COLUMN = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")


@dataclasses.dataclass
class Module:
    a: np.ndarray[Any, Any]
    b: np.ndarray[Any, Any]
    scaling: float
    rank: int


@dataclasses.dataclass
class Weights:
    version: str
    modules: dict[tuple[int, str], Module]
    max_rank: int


def model_config(**changes: Any) -> ModelConfig:
    sizes: dict[str, Any] = {
        "architecture": "LlamaForCausalLM",
        "vocab_size": 100,
        "hidden_size": 320,  # not whole chunks
        "intermediate_size": 896,
        "num_layers": 3,
        "num_heads": 8,
        "num_kv_heads": 2,
        "head_dim": 40,
        "max_position_embeddings": 128,
    }
    return ModelConfig(**(sizes | changes))


def pool_layout(config: ModelConfig, tp: int, dtype: str = "float32") -> PoolLayout:
    return PoolLayout(
        num_layers=config.num_layers,
        num_kv_heads=max(config.num_kv_heads // tp, 1),
        head_dim=config.head_dim,
        page_size=16,
        tp=tp,
        dtype=dtype,
    )


def random_weights(
    config: ModelConfig, ranks: dict[tuple[int, str], int], seed: int = 0
) -> Weights:
    random = np.random.default_rng(0)
    modules = {}
    for (layer, name), rank in ranks.items():
        num_in, num_out = config.module_shape(name)
        a = random.standard_normal((rank, num_in), np.float32)
        b = random.standard_normal((num_out, rank), np.float32)
        modules[layer, name] = Module(a, b, scaling=float(random.uniform(0.5, 3)), rank=rank)
    return Weights("some-hash", modules, max(ranks.values()))


def unpack(
    packed: PackedAdapter, layout: PoolLayout, config: ModelConfig
) -> dict[tuple[int, str], tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
    """(layer, module) -> A [rank, in] and scaled B [out, rank], element by element."""
    tp, found = layout.tp, {}

    def row(layer: int, device: int, chunk: int, size: int) -> np.ndarray[Any, Any]:
        values = []
        for i in range(size):
            c = chunk + i // 128
            page, place = c // layout.chunks_per_page, (c % layout.chunks_per_page) * 128 + i % 128
            values.append(packed.pages[page, layer, device * layout.page_elems + place])
        return np.asarray(values)

    for layer in range(config.num_layers):
        for index, name in enumerate(TARGET_MODULES):
            kind, a_chunk, b_chunk, rank = map(int, packed.segments[layer, index])
            if kind == 0:
                continue
            num_in, num_out = config.module_shape(name)
            a = np.full((rank, num_in), np.nan)
            b = np.full((num_out, rank), np.nan)
            in_size = num_in if name in COLUMN else num_in // tp
            is_kv = name in ("k_proj", "v_proj")
            out_size = layout.num_kv_heads * layout.head_dim if is_kv else num_out // tp
            for d in range(tp):
                kv_head = d * config.num_kv_heads // tp
                first = kv_head * layout.head_dim if is_kv else d * out_size
                a_stride, b_stride = -(-in_size // 128), -(-out_size // 128)
                for r in range(rank):
                    b_row = row(layer, d, b_chunk + r * b_stride, out_size)
                    b[first : first + out_size, r] = b_row
                    if name not in COLUMN:
                        part = row(layer, d, a_chunk + r * a_stride, in_size)
                        a[r, d * in_size : (d + 1) * in_size] = part
                    elif r % tp == d:
                        a[r] = row(layer, d, a_chunk + r // tp * a_stride, in_size)
            found[layer, name] = (a, b)
    return found


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_unpacking_gives_back_a_and_scaled_b(tp: int, dtype: str) -> None:
    config = model_config()
    layout = pool_layout(config, tp, dtype)
    ranks = {(0, name): 3 + i for i, name in enumerate(TARGET_MODULES)}  # not divisible by tp
    ranks |= {(2, "v_proj"): 1, (2, "down_proj"): 8}  # layer 1 has none
    weights = random_weights(config, ranks)
    packed = pack_adapter(weights, layout, config)
    numpy_dtype = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    assert packed.pages.dtype == numpy_dtype
    assert packed.pages.shape == (
        num_adapter_pages(ranks, layout, config),
        3,
        tp * layout.page_elems,
    )
    assert (packed.version_id, packed.max_rank) == ("some-hash", 9)
    found = unpack(packed, layout, config)
    assert found.keys() == weights.modules.keys()
    for key, module in weights.modules.items():
        b = module.b * np.float32(module.scaling)  # in float32, then one cast
        np.testing.assert_array_equal(found[key][0], module.a.astype(numpy_dtype).astype(float))
        np.testing.assert_array_equal(found[key][1], b.astype(numpy_dtype).astype(float))


@pytest.mark.parametrize("tp", [1, 2])
def test_padded_ranks_hold_the_same_weights_and_zeros(tp: int) -> None:
    config = model_config()
    layout = dataclasses.replace(pool_layout(config, tp), padded_rank=12)
    ranks = {(0, name): 3 + i for i, name in enumerate(TARGET_MODULES)}
    weights = random_weights(config, ranks)
    packed = pack_adapter(weights, layout, config)
    found = unpack(packed, layout, config)
    assert packed.num_pages == num_adapter_pages(dict.fromkeys(ranks, 12), layout, config)
    for key, module in weights.modules.items():
        a, b = found[key]
        np.testing.assert_array_equal(a[: module.rank], module.a)
        np.testing.assert_array_equal(b[:, : module.rank], module.b * np.float32(module.scaling))
        assert a.shape[0] == b.shape[1] == 12
        assert not a[module.rank :].any() and not b[:, module.rank :].any()


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_runs_have_no_overlap_and_everything_else_is_zero(tp: int) -> None:
    config = model_config()
    layout = pool_layout(config, tp)
    weights = random_weights(config, {(1, name): 5 for name in TARGET_MODULES})
    packed = pack_adapter(weights, layout, config)
    num_zero = int((packed.pages == 0).sum())
    num_values = 0
    for name in TARGET_MODULES:
        num_in, num_out = config.module_shape(name)
        kv_copies = max(tp // config.num_kv_heads, 1) if name in ("k_proj", "v_proj") else 1
        num_values += 5 * num_in + 5 * num_out * kv_copies
    assert packed.pages.size - num_zero == num_values


def test_kv_heads_fewer_than_devices_are_repeated() -> None:
    config = model_config()  # 2 kv heads
    layout = pool_layout(config, tp=4)
    packed = pack_adapter(random_weights(config, {(0, "k_proj"): 4}), layout, config)
    by_device = packed.pages.reshape(packed.num_pages, 3, 4, layout.page_elems)
    runs = by_device.transpose(1, 2, 0, 3).reshape(3, 4, -1)
    b_start = int(packed.segments[0, 1, 2]) * 128
    np.testing.assert_array_equal(runs[0, 0, b_start:], runs[0, 1, b_start:])
    np.testing.assert_array_equal(runs[0, 2, b_start:], runs[0, 3, b_start:])
    assert (runs[0, 0, b_start:] != runs[0, 2, b_start:]).any()


def test_absent_modules_and_layers_cost_nothing_but_their_pages() -> None:
    config = model_config()
    layout = pool_layout(config, tp=1)
    one = num_adapter_pages({(0, "q_proj"): 8}, layout, config)
    assert num_adapter_pages({(0, "q_proj"): 8, (2, "v_proj"): 1}, layout, config) == one
    assert num_adapter_pages({(0, "q_proj"): 8, (0, "v_proj"): 8}, layout, config) > one
    packed = pack_adapter(random_weights(config, {(0, "q_proj"): 8}), layout, config)
    assert (packed.segments[0, 1:] == 0).all() and (packed.segments[1:] == 0).all()
    assert packed.segments[0, 0].tolist() == [1, 0, 8 * 3, 8]


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("rank", [1, 3, 64])
def test_no_adapter_takes_more_than_the_maximum(tp: int, rank: int) -> None:
    config = model_config()
    layout = pool_layout(config, tp)
    everywhere = {(layer, name): rank for layer in range(3) for name in TARGET_MODULES}
    most = max_adapter_pages(layout, config, rank)
    assert num_adapter_pages(everywhere, layout, config) == most
    everywhere[0, "up_proj"] -= 1
    assert num_adapter_pages(everywhere, layout, config) <= most


def test_a_rank_64_adapter_of_7b_packs_in_seconds_of_cpu_at_most() -> None:
    config = model_config(
        hidden_size=4096, intermediate_size=11008, num_layers=4, num_heads=32, num_kv_heads=32,
        head_dim=128,
    )  # fmt: skip
    layout = pool_layout(config, 1, "bfloat16")
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    weights = random_weights(config, {(layer, name): 64 for layer in range(4) for name in names})
    start = time.process_time()  # what others do on this machine does not count
    packed = pack_adapter(weights, layout, config)
    elapsed_s = time.process_time() - start
    assert packed.num_pages == 16  # 4 modules x 2 matrices x 64 rows x 4,096 / 131,072
    assert elapsed_s * 8 < 4, f"{elapsed_s * 8:.1f} s for 32 layers"


@pytest.mark.row(30)
@pytest.mark.parametrize(
    ("dtype", "which", "value"),
    [
        ("float32", "b", 3e38),  # times its scaling
        ("float16", "b", 5e4),
        ("float16", "a", 1e5),
        ("bfloat16", "b", 3e38),
    ],
)
def test_values_that_overflow_the_pool_are_refused(dtype: str, which: str, value: float) -> None:
    config = model_config()
    weights = random_weights(config, {(0, "q_proj"): 2, (1, "o_proj"): 3})
    module = weights.modules[1, "o_proj"]
    module.scaling = 2.0
    getattr(module, which)[1, 1] = value
    with pytest.raises(AdapterLoadError, match=f"layer 1, o_proj: .* range of {dtype}"):
        pack_adapter(weights, pool_layout(config, 2, dtype), config)
