"""Drives the real runner step by step, without a scheduler, and reads each step's logits."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence as Seq

import jax.numpy as jnp
import numpy as np

from checkpoints.hf_config import read_model_config
from checkpoints.hf_weights import open_weights
from checkpoints.peft_adapter import read_adapter
from pallas_kernels.dispatch import Implementation, KernelChoice
from sloraj.adapters.layout import max_adapter_pages, pack_adapter
from sloraj.batch import AdapterInstall, ScheduledBatch, ScheduledRow
from sloraj.config import PoolLayout, div_ceil
from sloraj.model.llama import abstract_model
from sloraj.model.step import StepSpec
from sloraj.model.weights import load_parameters
from sloraj.parallel.mesh import local_kv_heads, make_mesh
from sloraj.request import SamplingParams, Sequence
from sloraj.runner import DeviceRunner
from sloraj.runner.buckets import make_buckets
from sloraj.runner.jobs import INSTALL_PAGES
from sloraj.runner.state import RunnerConfig

GREEDY = SamplingParams(temperature=0.0)


def quiet(stage: str, done: int, total: int) -> None:
    """Progress nobody looks at."""


class Driver:
    """One model, its adapters in slots 1, 2, ..., and rows that are driven by hand."""

    def __init__(
        self,
        model: str,
        adapters: Seq[str] = (),
        *,
        tp: int = 1,
        max_num_seqs: int = 8,
        max_num_tokens: int = 64,
        page_size: int = 16,
        max_rank: int = 64,
        max_model_len: int = 128,
        num_pages: int = 512,
        kernels: Implementation = "xla",
        dtype: str = "float32",
        quantization: str | None = None,
    ) -> None:
        self.config = config = read_model_config(model)
        mesh = make_mesh(tp)
        spec = StepSpec(
            config=config,
            tp=tp,
            page_size=page_size,
            max_rank=max_rank,
            kernels=KernelChoice.uniform(kernels),
            quantization=quantization,
        )
        self.layout = PoolLayout(
            num_layers=config.num_layers, num_kv_heads=local_kv_heads(config, tp),
            head_dim=config.head_dim, page_size=page_size, tp=tp, dtype=dtype,
        )  # fmt: skip
        with open_weights(model, config) as weights:
            ends, layers = load_parameters(
                weights, config, mesh, jnp.dtype(dtype), quiet, quantization
            )
        buckets = make_buckets(max_num_seqs, max_num_tokens, page_size, 16)
        buckets = dataclasses.replace(buckets, decode=buckets.decode[-1:])  # one will do
        self.runner = DeviceRunner(
            abstract_model(spec, jnp.dtype(dtype)),
            ends, layers, mesh, buckets,
            RunnerConfig(
                layout=self.layout, num_pages=num_pages, max_num_seqs=max_num_seqs,
                max_model_len=max_model_len, max_adapter_slots=16,
                max_adapter_pages=max_adapter_pages(self.layout, config, max_rank), checked=True,
            ),
        )  # fmt: skip
        self.max_num_seqs, self.page_size = max_num_seqs, page_size
        self.mixed = ("forward", buckets.mixed[-1].name, "all")
        self.decode = ("forward", buckets.decode[-1].name, "all")
        self.runner.compile(
            quiet,
            only=[
                self.mixed, self.decode, ("sample", "greedy", max_num_seqs),
                *(("install", n) for n in INSTALL_PAGES), ("bind",), ("reset",), ("count",),
            ],
        )  # fmt: skip
        self._pages = itertools.count(1)
        self._tags = itertools.count(1)
        self._slot_tags = {0: 0}
        self._installs = [self._install(slot, path) for slot, path in enumerate(adapters, 1)]
        self._page_tables: dict[int, list[int]] = {}

    def _install(self, slot: int, path: str) -> AdapterInstall:
        packed = pack_adapter(read_adapter(path, self.config), self.layout, self.config)
        self._slot_tags[slot] = tag = next(self._tags)
        pages = tuple(next(self._pages) for _ in range(packed.num_pages))
        return AdapterInstall(slot=slot, tag=tag, pages=pages, packed=packed)

    def open(self, tokens: Seq[int], slot: int, row: int) -> Sequence:
        """A sequence of known tokens on a row; nothing is computed yet."""
        return Sequence(
            request_id=f"row{row}", index=0, prompt_token_ids=list(tokens), params=GREEDY,
            max_output_tokens=100, stop_ids=frozenset(), seed=0, tag=next(self._tags),
            version_id=None, arrival_s=0.0, row=row, slot=slot,
        )  # fmt: skip

    def step(self, work: Seq[tuple[Sequence, int]]) -> list[tuple[np.ndarray, int]]:
        """Compute the next `num_tokens` of each sequence: (logits [V], greedy token) after them."""
        rows = []
        for sequence, num_tokens in sorted(work, key=lambda w: w[1] > 1):
            start = sequence.num_computed_tokens
            first_new_page = len(sequence.pages)
            while len(sequence.pages) < div_ceil(start + num_tokens, self.page_size):
                sequence.pages.append(next(self._pages))
            assert sequence.row is not None
            rows.append(
                ScheduledRow(
                    sequence=sequence, row=sequence.row, slot=sequence.slot,
                    adapter_tag=self._slot_tags[sequence.slot], start=start, num_tokens=num_tokens,
                    first_new_page=first_new_page, is_reset=start == 0, samples=True,
                )
            )  # fmt: skip
            sequence.num_computed_tokens += num_tokens
        installs, self._installs = tuple(self._installs), []
        handle = self.runner.execute(ScheduledBatch(0, tuple(rows), installs))
        result = self.runner.collect(handle)
        assert result.owner_violations == 0
        assert handle.logits is not None
        logits = np.asarray(handle.logits.logits)
        found = {
            id(row.sequence): (logits[i], result.tokens[i].token_id) for i, row in enumerate(rows)
        }
        return [found[id(sequence)] for sequence, _ in work]

    def greedy(self, prompts: Seq[tuple[Seq[int], int]], num_tokens: int) -> list[list[int]]:
        """Greedy continuations of (tokens, slot) prompts, all in one batch of full size."""
        assert len(prompts) == self.max_num_seqs
        sequences = [self.open(tokens, slot, row) for row, (tokens, slot) in enumerate(prompts)]
        drawn = self.step([(s, s.num_prompt_tokens) for s in sequences])
        for _ in range(num_tokens - 1):
            for sequence, (_, token) in zip(sequences, drawn, strict=True):
                sequence.output_token_ids.append(token)
            drawn = self.step([(s, 1) for s in sequences])
        for sequence, (_, token) in zip(sequences, drawn, strict=True):
            sequence.output_token_ids.append(token)
        return [s.output_token_ids for s in sequences]
