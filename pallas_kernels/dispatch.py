"""Which implementation of each kernel runs: decided once, at start-up, and passed to every op.

There is no fallback at call time: a server must not become ten times slower in silence.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import Literal, get_args

import jax

from pallas_kernels.adapter_layout import CHUNK

Implementation = Literal["xla", "triton", "mosaic", "bmm"]
IMPLEMENTATIONS: tuple[str, ...] = get_args(Implementation)
log = logging.getLogger("pallas_kernels")

_ALLOWED = {"cpu": ("xla", "bmm"), "gpu": IMPLEMENTATIONS, "cuda": IMPLEMENTATIONS}
_HAS_MOSAIC = jax.__version_info__ >= (0, 11)  # what the kernels are written for
_HOPPER = ("H100", "H200", "H800", "H20", "GH200")  # words of a device kind: wgmma is theirs alone
# Ops that have a Mosaic GPU kernel, and those of them where it is the fastest known on Hopper.
MOSAIC_OPS = frozenset({"lora_shrink", "lora_expand", "ragged_attention", "linear"})
MOSAIC_BEST = frozenset({"ragged_attention", "linear"})


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class KernelChoice:
    """The implementation of every op."""

    lora_shrink: Implementation
    lora_expand: Implementation
    decode_attention: Implementation
    ragged_attention: Implementation
    rope_write: Implementation
    add_rms_norm: Implementation
    linear: Implementation

    @classmethod
    def uniform(cls, implementation: Implementation) -> KernelChoice:
        """One implementation for all ops."""
        return cls(**{field.name: implementation for field in dataclasses.fields(cls)})

    def __str__(self) -> str:
        """Its most frequent implementation, then the ops that have another."""
        chosen = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        names = list(chosen.values())
        usual = max(IMPLEMENTATIONS, key=names.count)
        others = [f"{op} {name}" for op, name in chosen.items() if name != usual]
        return ", ".join([usual, *others])


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class KernelShape:
    """What of a model and its pool decides whether a Mosaic kernel can serve it."""

    head_dim: int
    page_size: int
    dtype: str
    lora_widths: tuple[int, ...]  # of the inputs and outputs of adapted modules, on a device


def resolve_kernels(
    requested: str | None, *, platform: str, device_kind: str, shape: KernelShape
) -> KernelChoice:
    """The choice for a device: `requested` for all ops that have it, or the best known of each.

    Asked for "mosaic", ops without a Mosaic kernel run as Triton; asked for "bmm", all but those of
    LoRA run as if nothing had been asked for. Where nothing is asked for and
    a Mosaic kernel would be best but cannot serve the shape, Triton serves, and the log says why.

    Args:   platform, device_kind: as of a `jax.Device`.
    Raises: ValueError: a name is unknown, or device or shape cannot run what is asked for.
    """
    if platform not in _ALLOWED:
        raise ValueError(f"platform {platform!r} is not one of {sorted(_ALLOWED)}")
    if requested is not None and requested not in IMPLEMENTATIONS:
        raise ValueError(f"implementation {requested!r} is not one of {list(IMPLEMENTATIONS)}")
    if requested is not None and requested not in _ALLOWED[platform]:
        raise ValueError(
            f"implementation {requested!r} does not run on platform {platform!r}, "
            f"which has {list(_ALLOWED[platform])}"
        )
    if requested == "bmm":
        others = resolve_kernels(None, platform=platform, device_kind=device_kind, shape=shape)
        return dataclasses.replace(others, lora_shrink="bmm", lora_expand="bmm")
    if requested == "xla" or platform == "cpu":
        return KernelChoice.uniform("xla")
    if requested == "triton":
        return KernelChoice.uniform("triton")
    served: dict[str, Implementation] = {}
    for op in sorted(MOSAIC_BEST if requested is None else MOSAIC_OPS):
        reason = mosaic_refusal(op, device_kind, shape)
        if reason is None:
            served[op] = "mosaic"
        elif requested is not None:
            raise ValueError(f"implementation 'mosaic' of {op}: {reason}")
        else:
            log.info("%s: triton and not mosaic: %s", op, reason)
    return dataclasses.replace(KernelChoice.uniform("triton"), **served)


def mosaic_refusal(op: str, device_kind: str, shape: KernelShape) -> str | None:
    """Why the Mosaic kernel of `op` cannot serve this device and shape; None if it can."""
    if not _HAS_MOSAIC:
        return f"JAX {jax.__version__}, allowed: 0.11 and up"
    if not any(word in _HOPPER for word in device_kind.split()):
        return f"device {device_kind!r}, allowed: {', '.join(_HOPPER)}"
    if shape.dtype not in ("bfloat16", "float16"):
        return f"dtype {shape.dtype}, allowed: bfloat16, float16"
    partial = [width for width in shape.lora_widths if width % CHUNK]
    if op.startswith("lora") and partial:
        return f"widths {partial}, allowed: multiples of {CHUNK}"
    if op.endswith("attention") and shape.head_dim not in (64, 128):
        return f"head_dim {shape.head_dim}, allowed: 64, 128"
    if op.endswith("attention") and shape.page_size not in (8, 16, 32, 64, 128):
        return f"page_size {shape.page_size}, allowed: 8, 16, 32, 64, 128"
    return None


def unknown_implementation(implementation: str) -> ValueError:
    """The error of an op that was asked for an implementation it does not have."""
    return ValueError(f"implementation {implementation!r} is not one that this op has")
