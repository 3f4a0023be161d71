"""Linear layer: rows times a weight, which may be kept in one byte an element."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels import linear_mosaic as mosaic
from pallas_kernels import linear_triton as triton
from pallas_kernels.dispatch import unknown_implementation
from pallas_kernels.tuning_table import shape_key, tuned

MEASURED_ROWS = (1, 16, 64, 128, 256, 512, 2048)  # a step's rows are served as the next of these
MAX_UNMEASURED_ROWS = 256  # beyond, one-byte weights that were not measured are widened for XLA


def linear_reference(
    x: jax.Array, weight: jax.Array, scale: jax.Array | None, out_dtype: jnp.dtype
) -> jax.Array:
    """The specification of `linear`: one product, accumulated in f32."""
    if scale is None:
        return jnp.einsum("td,nd->tn", x, weight, preferred_element_type=out_dtype)
    y = jnp.einsum("td,nd->tn", x, weight.astype(x.dtype), preferred_element_type=jnp.float32)
    return (y * scale[None, :]).astype(out_dtype)


def linear(
    x: jax.Array,
    weight: jax.Array,
    scale: jax.Array | None = None,
    *,
    out_dtype: jnp.dtype | None = None,
    implementation: str,
    config: triton.Config | mosaic.Config | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Multiply rows by a weight in the checkpoint's layout, each output feature by its scale.

    Semantics: y[t, n] = scale[n] * sum_d x[t, d] * weight[n, d], summed in f32, rounded once;
               one-byte weights beyond 256 rows: rounded before the scale and after it.
    Args:      x: `[T, in]`. weight: `[out, in]` of x's dtype, or int8 or float8_e4m3fn.
               scale: f32 `[out]`, of one-byte weights. out_dtype: of y; None: x's.
               implementation: "triton" and "mosaic" read the table of what was measured on this
               device kind ("mosaic" both kernels' entries). XLA's own matmul is the choice for
               weights of x's dtype that are not in it, and for one-byte weights beyond 256 rows.
               config: how the kernel works, in place of the table's choice.
               interpret: run the kernel in the interpreter, on any device.
    Returns:   y `[T, out]`.
    Raises:    ValueError: shapes or dtypes disagree or the implementation is unknown.
    Cost:      reads the weight once: out * in elements; 2 * T * out * in flops.
    """
    out_dtype = jnp.dtype(x.dtype if out_dtype is None else out_dtype)
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"x {x.shape} and weight {weight.shape} are not [T, in] and [out, in]")
    if (weight.dtype.itemsize == 1) != (scale is not None):
        raise ValueError(f"a weight of {weight.dtype} and a scale: one-byte weights have one")
    if scale is not None and scale.shape != weight.shape[:1]:
        raise ValueError(f"scale {scale.shape} does not fit weight {weight.shape}")
    if implementation not in ("xla", "triton", "mosaic"):
        raise unknown_implementation(implementation)
    if implementation != "xla" and config is None:
        config = chosen_config(x, weight, implementation)
    if implementation == "xla" or config is None:
        if implementation == "xla" or scale is None:
            return linear_reference(x, weight, scale, out_dtype)
        # For many rows an f32 product between the two would cost more than widening the weight.
        y = linear_reference(x, weight.astype(x.dtype), None, out_dtype)
        return (y.astype(jnp.float32) * scale[None, :]).astype(out_dtype)
    if isinstance(config, mosaic.Config):
        return mosaic.linear_mosaic(x, weight, scale, out_dtype, config=config, interpret=interpret)
    return triton.linear_triton(x, weight, scale, out_dtype, config=config, interpret=interpret)


def chosen_config(
    x: jax.Array | jax.ShapeDtypeStruct,
    weight: jax.Array | jax.ShapeDtypeStruct,
    implementation: str,
) -> triton.Config | mosaic.Config | None:
    """Which kernel serves these shapes, and how it works; None: XLA's matmul is the choice."""
    (num_rows, in_size), (out_size, _) = x.shape, weight.shape
    key = tuning_key(num_rows, out_size, in_size, weight.dtype.itemsize)
    sizes = {"num_rows": num_rows, "out_size": out_size, "in_size": in_size}
    is_mosaic = implementation == "mosaic"
    if is_mosaic and (measured := tuned("linear_mosaic", key, mosaic.Config)) is not None:
        return measured
    if (config := tuned("linear_triton", key, triton.Config)) is not None:
        return config
    if weight.dtype.itemsize > 1 or num_rows > MAX_UNMEASURED_ROWS:
        return None
    served = mosaic.Config.heuristic(**sizes, weight_bytes=1) if is_mosaic else None
    return served or triton.Config.heuristic(**sizes)


def tuning_key(num_rows: int, out_size: int, in_size: int, weight_bytes: int) -> str:
    """The table's key of a shape; numbers of rows share the entry of the next measured one.

    What decides is the bytes of a weight: int8 and float8 share their entries.
    """
    rows = next((rows for rows in MEASURED_ROWS if rows >= num_rows), MEASURED_ROWS[-1])
    return shape_key(out=out_size, rows=rows, weight_bytes=weight_bytes, **{"in": in_size})
