"""Seconds as a linear function of a step's features, with coefficients that are never negative.

    cost.seconds(features) == cost.fixed_s(features) + cost.context_s * features.context_tokens

The second form is what fast-forwarding uses: while the same rows decode, their contexts grow and
nothing else changes.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Mapping

from bench.simulator.features import StepFeatures

BUCKET, CONTEXT = "bucket:", "context_tokens"
_SHARED = ("prompt_pairs", "num_resets", "num_installs", "install_bytes")
_BY_KIND = ("adapter_elements", "adapter_products", "largest_elements")


def device_columns(features: StepFeatures) -> Iterator[tuple[str, float]]:
    """What a step's work is made of: its program, and the work that varies within the program.
    Waiting for adapters that are still on their way is none.

    Reading contexts costs the same in every step. Deltas are computed by other kernels for steps
    that only decode, so their columns are kept apart.
    """
    kind = "decode" if features.is_decode else "mixed"
    yield BUCKET + features.bucket, 1.0
    if features.variant != "base":
        yield f"{kind}:{features.variant}", 1.0
    yield CONTEXT, features.context_tokens
    for name in _SHARED:
        yield name, getattr(features, name)
    for name in _BY_KIND:
        yield f"{kind}:{name}", getattr(features, name)


def execute_columns(features: StepFeatures) -> Iterator[tuple[str, float]]:
    """What the host does in `Runner.execute`: packing, launching, issuing copies."""
    kind = "decode" if features.is_decode else "mixed"
    yield "step", 1.0
    yield (
        f"{kind}:{features.variant}",
        1.0 if kind == "mixed" or features.variant != "base" else 0.0,
    )
    for name in ("num_sampled", "num_resets", "num_installs", "num_late"):
        yield name, getattr(features, name)


def host_columns(features: StepFeatures) -> Iterator[tuple[str, float]]:
    """What the host does for a step before it hands it to the runner: messages, scheduling."""
    yield "step", 1.0
    yield "num_sampled", features.num_sampled
    yield "num_resets", features.num_resets
    yield "num_installs", features.num_installs


class Cost:
    """Coefficients by column, in seconds a unit. A bucket that no run has shown is interpolated.
    "bucket:mixed-512:attention" is what a variant adds in one bucket alone (no fit finds that).
    """

    def __init__(self, coefficients: Mapping[str, float]) -> None:
        """Raises ValueError if one is negative."""
        self.coefficients = dict(coefficients)
        for name, value in self.coefficients.items():
            if not value >= 0:
                raise ValueError(f"{name}: got {value} s, allowed: 0 and up")
        get = self.coefficients.get
        self.context_s = get(CONTEXT, 0.0)
        self._step_s, self._sampled_s = get("step", 0.0), get("num_sampled", 0.0)
        self._shared = [(name, get(name, 0.0)) for name in _SHARED if get(name, 0.0)]
        self._by_kind = {
            kind: [(n, get(f"{kind}:{n}", 0.0)) for n in _BY_KIND] for kind in ("decode", "mixed")
        }
        self._programs: dict[tuple[str, str], float] = {}
        self._known: dict[str, list[tuple[int, float]]] = {}
        for name, value in self.coefficients.items():
            if name.startswith(BUCKET) and name.count(":") == 1:
                kind, size = _kind_and_size(name.removeprefix(BUCKET))
                self._known.setdefault(kind, []).append((size, value))
        for sizes in self._known.values():
            sizes.sort()

    def seconds(self, features: StepFeatures) -> float:
        return self.fixed_s(features) + self.context_s * features.context_tokens

    def fixed_s(self, features: StepFeatures) -> float:
        """All but what grows with the contexts of decoding rows."""
        key = features.bucket, features.variant
        total = self._programs.get(key)
        if total is None:
            total = self._programs[key] = self._program_s(features)
        for name, value in self._shared:
            total += value * getattr(features, name)
        for name, value in self._by_kind["decode" if features.is_decode else "mixed"]:
            total += value * getattr(features, name)
        return total + self._sampled_s * features.num_sampled

    def _program_s(self, features: StepFeatures) -> float:
        kind, _ = _kind_and_size(features.bucket)
        get, name = self.coefficients.get, features.variant
        variant = get(f"{kind}:{name}", 0.0) + get(f"{BUCKET}{features.bucket}:{name}", 0.0)
        return self._step_s + variant + self.bucket_s(features.bucket)

    def bucket_s(self, bucket: str) -> float:
        """What a bucket's program takes by itself."""
        kind, size = _kind_and_size(bucket)
        return _at(self._known.get(kind, []), size)


def _kind_and_size(bucket: str) -> tuple[str, int]:
    kind, _, size = bucket.partition("-")
    return kind, int(size)


def _at(known: list[tuple[int, float]], size: int) -> float:
    """The value at a size: known, between its neighbours, that of the smallest, or beyond the
    largest in proportion.
    """
    if not known:
        return 0.0
    place = bisect.bisect_left(known, (size, -1.0))
    if place == len(known):
        return known[-1][1] * size / known[-1][0]
    above, value = known[place]
    if place == 0 or above == size:
        return value
    below, before = known[place - 1]
    return before + (value - before) * (size - below) / (above - below)
