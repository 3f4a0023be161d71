"""What the steps of a core were made of: rows, contexts, adapters, pages; on any runner.

The ceiling of a run (`bench.ceiling`) is computed from this: from the adapters that really were in
its batches, not from those that were registered.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from checkpoints.model_config import TARGET_MODULES, ModelConfig
from sloraj.batch import ScheduledBatch
from sloraj.core import EngineCore


@dataclasses.dataclass(frozen=True, slots=True)
class StepWork:
    """One step. Weights are counted in elements of A and B over all layers, without padding."""

    num_tokens: int
    num_decoding: int  # rows of one token
    num_sampled: int
    context_tokens: int  # of the rows of one token, that token included
    prompt_pairs: int  # query-key pairs of the longer rows
    num_adapters: int  # distinct ones
    adapter_elements: int  # weights of the distinct adapters
    adapter_products: int  # tokens x weights of the token's adapter


class BatchLog:
    """Notes every batch that a core gives its runner, until closed. Costs some 50 us a step."""

    def __init__(self, core: EngineCore, model: ModelConfig | None) -> None:
        """model: whose modules the adapters' weights are of; without it they are not counted."""
        self._sizes = np.array(
            [0 if model is None else sum(model.module_shape(name)) for name in TARGET_MODULES]
        )
        self._core, self._runner = core, core._runner
        self._inner = core._runner.execute
        self._elements: dict[str, int] = {}
        self._pages: list[tuple[int, int]] = []  # of adapters, free; in each step
        self.steps: list[StepWork] = []
        core._runner.execute = self._execute  # type: ignore[method-assign]

    def close(self) -> None:
        self._runner.execute = self._inner  # type: ignore[method-assign]

    def _execute(self, batch: ScheduledBatch) -> Any:
        self._note(batch)
        return self._inner(batch)

    def _note(self, batch: ScheduledBatch) -> None:
        core = self._core
        decoding = context = pairs = sampled = products = 0
        distinct: dict[str, int] = {}
        for row in batch.rows:
            sampled += row.samples
            if row.num_tokens == 1:
                decoding += 1
                context += row.start + 1
            else:
                pairs += row.num_tokens * row.start + row.num_tokens * (row.num_tokens + 1) // 2
            version_id = row.sequence.version_id
            if version_id is not None:
                elements = distinct.get(version_id)
                if elements is None:
                    elements = distinct[version_id] = self._elements_of(version_id)
                products += row.num_tokens * elements
        self._pages.append((core._residency.num_pages, core._pool.num_free))
        self.steps.append(
            StepWork(
                batch.num_tokens, decoding, sampled, context, pairs, len(distinct),
                sum(distinct.values()), products,
            )
        )  # fmt: skip

    def _elements_of(self, version_id: str) -> int:
        """Of A and B by their true ranks; the pages of a version say too much."""
        if version_id not in self._elements:
            packed = self._core._host_store.get(version_id).packed
            self._elements[version_id] = int((packed.segments[:, :, 3] * self._sizes).sum())
        return self._elements[version_id]

    def summary(self) -> dict[str, Any]:
        """Means over the steps in which every row has one token, unless the name says otherwise."""
        decodes = [step for step in self.steps if step.num_tokens == step.num_decoding]
        pages = np.array(self._pages).reshape(-1, 2)
        return {
            "steps": len(self.steps),
            "decode_steps": len(decodes),
            "decode_rows": _mean([step.num_decoding for step in decodes]),
            "decode_adapters": _mean([step.num_adapters for step in decodes]),
            "decode_context": _mean([s.context_tokens / max(s.num_decoding, 1) for s in decodes]),
            "tokens_in_all_steps": sum(step.num_tokens for step in self.steps),
            "adapter_pages_in_all_steps": _mean(pages[:, 0]),
            "adapter_pages_at_most": int(pages[:, 0].max(initial=0)),
            "free_pages_at_least": int(pages[:, 1].min()) if len(pages) else None,
        }


def _mean(values: Any) -> float | None:
    return float(np.mean(values)) if len(values) else None
