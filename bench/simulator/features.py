"""What a step's duration is computed from: one definition for real runs and for simulated ones.

`Capture.of(batch)` notes what may change before the step has ended, and is cheap enough for a real
step loop; `FeatureTable` turns captures into `StepFeatures`, later or at once.
"""

from __future__ import annotations

import array
import dataclasses
import operator
from collections.abc import Iterable

import numpy as np

from checkpoints.model_config import TARGET_MODULES, ModelConfig
from sloraj.batch import AdapterInstall, PackedAdapter, ScheduledBatch
from sloraj.runner.buckets import Buckets
from sloraj.runner.lora_variants import SlotVariants

_starts = operator.attrgetter("start")
_slots = operator.attrgetter("slot")
_counts = operator.attrgetter("num_tokens")
_samples = operator.attrgetter("samples")


@dataclasses.dataclass(frozen=True, slots=True)
class StepFeatures:
    """One step. Weights of adapters are counted in elements of A and B over all layers."""

    bucket: str
    variant: str  # which modules' deltas its program computes; see `sloraj.runner.lora_variants`
    num_tokens: int
    num_padded: int  # tokens of the bucket
    num_decoding: int  # rows of one token
    context_tokens: int  # of those rows, that token included
    num_chunks: int  # longer rows
    prompt_pairs: int  # query-key pairs of the longer rows
    num_sampled: int
    num_resets: int  # longer rows that begin
    num_adapters: int  # distinct ones
    adapter_elements: int  # weights of the distinct adapters
    largest_elements: int  # and of the largest of them
    adapter_products: int  # tokens x weights of the token's adapter
    num_installs: int
    install_bytes: int
    num_late: int  # installs that were not sent a step ahead
    late_bytes: int
    num_sends: int
    send_bytes: int

    @property
    def is_decode(self) -> bool:
        return self.num_chunks == 0

    def with_context(self, context_tokens: int) -> StepFeatures:
        return dataclasses.replace(self, context_tokens=context_tokens)


FIELDS = tuple(field.name for field in dataclasses.fields(StepFeatures))


@dataclasses.dataclass(frozen=True, slots=True)
class Capture:
    """A batch without its sequences: plain numbers that the garbage collector need not follow."""

    starts: array.array[int]
    slots: array.array[int]
    num_single: int
    num_tokens: int
    num_sampled: int
    chunks: tuple[tuple[int, int, bool], ...]  # start, length, is_reset
    installs: tuple[AdapterInstall, ...]
    sends: tuple[AdapterInstall, ...]

    @classmethod
    def of(cls, batch: ScheduledBatch) -> Capture:
        rows = batch.rows
        counts = list(map(_counts, rows))
        num_single = counts.count(1)  # they come first
        return cls(
            array.array("q", map(_starts, rows)),
            array.array("q", map(_slots, rows)),
            num_single,
            sum(counts),
            sum(map(_samples, rows)),
            tuple((r.start, r.num_tokens, r.is_reset) for r in rows[num_single:]),
            batch.installs,
            batch.sends,
        )


class FeatureTable:
    """Knows what each adapter slot holds, as installs come by; give it captures in their order."""

    def __init__(self, model: ModelConfig, buckets: Buckets) -> None:
        self._sizes = np.array([sum(model.module_shape(name)) for name in TARGET_MODULES])
        self._buckets = buckets
        self._variants = SlotVariants(buckets.lora_variants)
        self._elements: dict[int, int] = {0: 0}
        self._known: dict[int, int] = {}  # id of segments, which adapters may share -> elements
        self._kept: list[np.ndarray] = []  # so that no id is used twice
        self._sent: set[int] = set()  # tags

    def bind(self, slot: int, packed: PackedAdapter) -> None:
        """The slot holds this adapter from now on."""
        segments = packed.segments
        elements = self._known.get(id(segments))
        if elements is None:
            elements = int((segments[:, :, 3] * self._sizes).sum())
            self._known[id(segments)] = elements
            self._kept.append(segments)
        self._elements[slot] = elements
        self._variants.bind(slot, segments)

    def features(self, capture: Capture) -> StepFeatures:
        late = [i for i in capture.installs if i.tag not in self._sent]
        self._sent = {send.tag for send in capture.sends}
        for install in capture.installs:
            self.bind(install.slot, install.packed)
        slots, single = capture.slots, capture.num_single
        distinct = set(slots)
        elements_of = self._elements
        sizes = list(map(elements_of.__getitem__, distinct))
        products = sum(map(elements_of.__getitem__, slots[:single] if capture.chunks else slots))
        for slot, chunk in zip(slots[single:], capture.chunks, strict=True):
            products += chunk[1] * elements_of[slot]
        lengths = [chunk[1] for chunk in capture.chunks]
        bucket = self._buckets.pick(capture.num_tokens, not lengths, lengths)
        return StepFeatures(
            bucket=bucket.name,
            variant=self._variants.of(distinct),
            num_tokens=capture.num_tokens,
            num_padded=bucket.num_tokens,
            num_decoding=single,
            context_tokens=single + sum(capture.starts[:single] if lengths else capture.starts),
            num_chunks=len(lengths),
            prompt_pairs=sum(n * start + n * (n + 1) // 2 for start, n, _ in capture.chunks),
            num_sampled=capture.num_sampled,
            num_resets=sum(chunk[2] for chunk in capture.chunks),
            num_adapters=len(distinct) - (0 in distinct),
            adapter_elements=sum(sizes),
            largest_elements=max(sizes),
            adapter_products=products,
            num_installs=len(capture.installs),
            install_bytes=_num_bytes(capture.installs),
            num_late=len(late),
            late_bytes=_num_bytes(late),
            num_sends=len(capture.sends),
            send_bytes=_num_bytes(capture.sends),
        )


def _num_bytes(installs: Iterable[AdapterInstall]) -> int:
    return sum(install.packed.num_bytes for install in installs)
