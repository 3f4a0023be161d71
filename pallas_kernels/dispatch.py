"""Which implementation of the kernels runs: decided once, at start-up, and passed to every op.

There is no fallback at call time: a server must not become ten times slower in silence.
"""

from __future__ import annotations

from typing import Literal, get_args

Implementation = Literal["xla", "triton"]
IMPLEMENTATIONS: tuple[str, ...] = get_args(Implementation)

_DEFAULT = {"cpu": "xla", "gpu": "triton", "cuda": "triton"}
_ALLOWED = {"cpu": ("xla",), "gpu": IMPLEMENTATIONS, "cuda": IMPLEMENTATIONS}


def resolve_implementation(requested: str | None, platform: str) -> Implementation:
    """The implementation to use on `platform` (`jax.Device.platform`): `requested`, or its best.

    Raises: ValueError: either is unknown, or the platform cannot run the implementation.
    """
    if platform not in _ALLOWED:
        raise ValueError(f"platform {platform!r} is not one of {sorted(_ALLOWED)}")
    chosen = _DEFAULT[platform] if requested is None else requested
    if chosen not in IMPLEMENTATIONS:
        raise ValueError(f"implementation {chosen!r} is not one of {list(IMPLEMENTATIONS)}")
    if chosen not in _ALLOWED[platform]:
        raise ValueError(
            f"implementation {chosen!r} does not run on platform {platform!r}, "
            f"which has {list(_ALLOWED[platform])}"
        )
    return "triton" if chosen == "triton" else "xla"


def unknown_implementation(implementation: str) -> ValueError:
    """The error of an op that was asked for an implementation it does not have."""
    return ValueError(f"implementation {implementation!r} is not one of {list(IMPLEMENTATIONS)}")
