"""What the Pallas Mosaic GPU kernels share."""

from __future__ import annotations

from typing import Any

import jax
from jax.experimental.pallas import mosaic_gpu

plgpu: Any = mosaic_gpu  # its types differ between JAX versions
Ref = Any  # Pallas has no public type for the references that a kernel gets


def interpret_params(interpret: bool) -> Any:
    """What `plgpu.kernel` wants as `interpret`.

    Raises: NotImplementedError: this version of JAX has no public interpreter for Mosaic GPU.
    """
    if not interpret:
        return None
    if jax.__version_info__ < (0, 11):
        raise NotImplementedError("the Mosaic GPU interpreter is public from JAX 0.11 on")
    return plgpu.InterpretGPUParams()
