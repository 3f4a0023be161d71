"""Executes scheduled batches: keeps the device state, picks programs, moves bytes.

A step is enqueued by `execute` and read by `collect`; between the two the host may enqueue the next
one, so the device never waits for Python. Nothing here decides what runs: that is the scheduler's.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from checkpoints.model_config import TARGET_MODULES
from sloraj.batch import (
    AdapterInstall,
    SampledToken,
    ScheduledBatch,
    ScheduledRow,
    StepResult,
    TokenLogprobs,
)
from sloraj.model.llama import Model
from sloraj.model.weights import Leaves, Progress
from sloraj.runner.arena import HostArena
from sloraj.runner.buckets import Bucket, Buckets
from sloraj.runner.compiles import CompileCounter, Key, compile_all
from sloraj.runner.jobs import INSTALL_PAGES, make_jobs
from sloraj.runner.lora_variants import SlotVariants
from sloraj.runner.packing import known_token_ids, pack_step
from sloraj.runner.programs import BUFFER_ARGUMENT, COUNT_TOKENS, bind_packing
from sloraj.runner.rows import RESETS, has_penalties, needs_full_sampling, pack_resets
from sloraj.runner.state import STAGING_SPEC, RunnerConfig, StepLogits, abstract_state, zeros
from sloraj.sampler import FULL, GREEDY, LOGPROBS, VARIANTS


@dataclasses.dataclass(frozen=True, slots=True)
class StepHandle:
    """An enqueued step: which rows are sampled, and the arrays to wait for.

    Logits are let go as soon as they are sampled from: the next step's then get the same place, and
    the CUDA graph that writes them need not be changed.
    """

    batch: ScheduledBatch
    sampled: tuple[ScheduledRow, ...]
    logits: StepLogits | None  # in checked mode, and when nothing is sampled
    drawn: jax.Array | None
    floats: jax.Array | None


class DeviceRunner:
    """Owns the pool, the adapter table, the row state and the programs (`sloraj.batch.Runner`)."""

    def __init__(
        self,
        model: Model,
        ends: Leaves,
        layers: list[Leaves],
        mesh: Mesh,
        buckets: Buckets,
        config: RunnerConfig,
    ) -> None:
        self._model, self._ends, self._layers = model, ends, layers
        self._mesh, self._buckets, self._config = mesh, buckets, config
        self._null_row = config.null_row
        self._vocab_size = model.spec.config.vocab_size
        self._compiles = CompileCounter()
        self.host_arena = HostArena(mesh.devices.flat[0])
        self._staging_sharding = NamedSharding(mesh, STAGING_SPEC)
        self._staged: dict[int, list[jax.Array]] = {}  # by tag: pages on their way
        self._known_at_reset: dict[int, int] = {}
        self._num_steps = self._num_install_bytes = self._num_padding_tokens = 0
        self._programs: dict[Key, Any] = {}
        self._slot_variants = SlotVariants(buckets.lora_variants)
        state = zeros(abstract_state(config, mesh, self._vocab_size))
        self._state, self._sample_state = state.forward, state.sample
        self._rows, self._table = state.rows, state.table

    # --- start ---------------------------------------------------------------------------------

    @property
    def num_programs(self) -> int:
        """Programs compiled at start; none is compiled after."""
        return len(self._programs)

    @property
    def num_cache_hits(self) -> int:
        """Compilations that the persistent cache answered."""
        return self._compiles.num_cache_hits

    def compile(self, progress: Progress, *, only: Collection[Key] | None = None) -> None:
        """Compile the programs; `only` names those that a test is content with."""
        jobs = make_jobs(self._model, self._mesh, self._buckets, self._config)
        jobs = [job for job in jobs if only is None or job.key in only]
        self._programs = compile_all(jobs, progress)

    def program_text(self, key: Key) -> str:
        """The optimised HLO of a compiled program."""
        return str(self._programs[key].as_text())

    def warm_up(self, progress: Progress, *, repeats: int = 1) -> None:
        """Compile every program, run each on the null row and the null page, then stop counting."""
        self.compile(progress)
        for _ in range(repeats):
            self._run_every_program()
        jax.block_until_ready(self._state.pools)
        self._compiles.mark_ready()

    def _run_every_program(self) -> None:
        self._reset_rows([])
        self._count_tokens(self._count_buffer([]))
        self._bind_slot(0, 0, (), self._empty_segments())  # slot 0 stays empty
        for size in INSTALL_PAGES:
            staging = jax.device_put(self._empty_staging(size), self._staging_sharding)
            self._install_pages(staging, (0,) * size)
        logits_of: dict[int, StepLogits] = {}
        empty = ScheduledBatch(step=0, rows=())
        for bucket in (*self._buckets.decode, *self._buckets.mixed):
            for variant in self._buckets.lora_variants:
                logits_of[bucket.num_logits] = self._run_forward(bucket, variant, empty)
        for logits in logits_of.values():
            for variant in VARIANTS:
                self._run_sample(variant, logits)

    def _empty_segments(self) -> np.ndarray:
        return np.zeros((self._config.layout.num_layers, len(TARGET_MODULES), 4), np.int32)

    def _empty_staging(self, num_pages: int) -> np.ndarray:
        layout = self._config.layout
        shape = (num_pages, layout.num_layers, layout.tp * layout.page_elems)
        return np.zeros(shape, jnp.dtype(layout.dtype))

    # --- a step --------------------------------------------------------------------------------

    def execute(self, batch: ScheduledBatch) -> StepHandle:
        """Enqueue installs, row resets, the forward pass and sampling; never waits for the
        device.
        """
        for install in batch.installs:
            self._install_adapter(install)
        resets = [row for row in batch.rows if row.is_reset]
        for start in range(0, len(resets), RESETS):
            self._reset_rows(resets[start : start + RESETS])
        self._count_prefill(batch)
        bucket = self._buckets.pick(batch.num_tokens, batch.is_decode, batch.chunks)
        variant = self._slot_variants.of({row.slot for row in batch.rows})
        logits = self._run_forward(bucket, variant, batch)
        self._num_steps += 1
        self._num_padding_tokens += bucket.num_tokens - batch.num_tokens
        sampled = tuple(row for row in batch.rows if row.samples)
        drawn = floats = None
        if sampled:
            drawn, floats = self._run_sample(_variant(sampled), logits)
            drawn.copy_to_host_async()
        is_kept = self._config.checked or drawn is None
        return StepHandle(batch, sampled, logits if is_kept else None, drawn, floats)

    def collect(self, handle: StepHandle) -> StepResult:
        """Wait for a step's tokens."""
        tokens: list[SampledToken] = []
        violations = 0
        if handle.drawn is not None:
            drawn = np.asarray(handle.drawn).tolist()
            floats: Iterable[list[float] | None] = itertools.repeat(None)
            if handle.floats is not None:
                floats = np.asarray(handle.floats).tolist()
            tokens = list(map(_sampled_token, handle.sampled, drawn, floats))
        if handle.logits is not None:
            violations = int(handle.logits.violations)
        return StepResult(handle.batch.step, tuple(tokens), violations)

    def _run_forward(self, bucket: Bucket, variant: str, batch: ScheduledBatch) -> StepLogits:
        page_size = self._config.layout.page_size
        program = self._programs["forward", bucket.name, variant]
        buffer: Any = pack_step(
            batch, bucket, null_row=self._null_row, page_size=page_size,
            rank_of=self._slot_variants.rank_of,
        )  # fmt: skip
        self._staged = {}
        if batch.sends:
            # Copies to the device pass one after the other: the step's own data, and that of the
            # small programs before it, go first, or the step would wait for adapters that it does
            # not use. A copy starts when what is enqueued before it has ended, and so runs beside
            # this step.
            buffer = jax.device_put(buffer, program.input_shardings[0][BUFFER_ARGUMENT])
            self._staged = {send.tag: self._send_pages(send) for send in batch.sends}
        logits: StepLogits
        self._state, logits = program(
            self._ends,
            self._layers,
            self._state,
            self._sample_state.last_token,
            self._rows,
            self._table,
            buffer,
        )
        return logits

    def _run_sample(self, variant: str, logits: StepLogits) -> tuple[jax.Array, jax.Array | None]:
        program = self._programs["sample", variant, logits.logits.shape[0]]
        self._sample_state, drawn, floats = program(self._sample_state, logits, self._rows)
        return drawn, floats

    def _reset_rows(self, rows: list[ScheduledRow]) -> None:
        for row in rows:
            self._known_at_reset[row.row] = row.sequence.num_known_tokens
        buffer = pack_resets(rows, self._null_row, self._vocab_size)
        self._rows, counts = self._programs["reset",](self._rows, self._sample_state.counts, buffer)
        self._sample_state = dataclasses.replace(self._sample_state, counts=counts)

    def _count_prefill(self, batch: ScheduledBatch) -> None:
        """Let the penalties of rows that use them see the tokens computed in this step."""
        known = [
            (row.row, token, int(position >= row.sequence.num_prompt_tokens))
            for row in batch.rows
            if has_penalties(row.sequence.params)
            for position, token in enumerate(known_token_ids(row), row.start)
            if position < self._known_at_reset[row.row]  # later ones were counted when sampled
        ]
        for start in range(0, len(known), COUNT_TOKENS):
            self._count_tokens(self._count_buffer(known[start : start + COUNT_TOKENS]))

    def _count_buffer(self, known: list[tuple[int, int, int]]) -> np.ndarray:
        buffer = np.zeros((3, COUNT_TOKENS), np.int32)
        buffer[0] = self._null_row
        if known:
            buffer[:, : len(known)] = np.array(known, np.int32).T
        return buffer

    def _count_tokens(self, buffer: np.ndarray) -> None:
        counts = self._programs["count",](self._sample_state.counts, buffer)
        self._sample_state = dataclasses.replace(self._sample_state, counts=counts)

    # --- adapters ------------------------------------------------------------------------------

    def _send_pages(self, install: AdapterInstall) -> list[jax.Array]:
        """Start the copies of a version's pages, in pieces of INSTALL_PAGES."""
        pages, start = install.packed.pages, 0
        sent: list[jax.Array] = []
        for size in INSTALL_PAGES:
            while len(install.pages) - start >= size:
                sent.append(jax.device_put(pages[start : start + size], self._staging_sharding))
                start += size
        self._num_install_bytes += install.packed.num_bytes
        return sent

    def _install_adapter(self, install: AdapterInstall) -> None:
        staged = self._staged.pop(install.tag, None)
        start = 0
        for piece in self._send_pages(install) if staged is None else staged:
            stop = start + piece.shape[0]
            self._install_pages(piece, install.pages[start:stop])
            start = stop
        self._slot_variants.bind(install.slot, install.packed.segments)
        self._bind_slot(install.slot, install.tag, install.pages, install.packed.segments)

    def _install_pages(self, staging: jax.Array, pages: tuple[int, ...]) -> None:
        pools = self._programs["install", len(pages)](
            self._state.pools, staging, np.array(pages, np.int32)
        )
        self._state = dataclasses.replace(self._state, pools=pools)

    def _bind_slot(self, slot: int, tag: int, pages: tuple[int, ...], segments: np.ndarray) -> None:
        packing = bind_packing(self._table)
        buffer = np.zeros(packing.size, np.int32)
        fields = packing.split(buffer)
        fields["slot"][...], fields["num_pages"][...], fields["tag"][...] = slot, len(pages), tag
        fields["pages"][: len(pages)] = pages
        fields["segments"][...] = segments
        self._table, owners = self._programs["bind",](self._table, self._state.owners, buffer)
        self._state = dataclasses.replace(self._state, owners=owners)

    # --- figures -------------------------------------------------------------------------------

    def stats(self) -> dict[str, Any]:
        return {
            "num_programs": self.num_programs,
            "compiles_at_start": self._compiles.num_at_start,
            "compiles_after_ready": self._compiles.num_after_ready,
            "compile_cache_hits": self._compiles.num_cache_hits,
            "compile_s": self._compiles.seconds,
            "num_runner_steps": self._num_steps,
            "install_bytes": self._num_install_bytes,
            "padding_tokens": self._num_padding_tokens,
            "host_arena_bytes": self.host_arena.num_bytes,
        }

    def close(self) -> None:
        self._compiles.close()


def _variant(sampled: tuple[ScheduledRow, ...]) -> str:
    params = [row.sequence.params for row in sampled]
    if any(p.logprobs is not None for p in params):
        return LOGPROBS
    return FULL if any(needs_full_sampling(p) for p in params) else GREEDY


def _sampled_token(row: ScheduledRow, ints: list[int], floats: list[float] | None) -> SampledToken:
    logprobs = None
    wanted = row.sequence.params.logprobs
    if wanted is not None and floats is not None:
        top = zip(ints[2 : 2 + wanted], floats[1 : 1 + wanted], strict=True)
        logprobs = TokenLogprobs(ints[0], floats[0], tuple(top))
    return SampledToken(row.sequence, ints[0], bool(ints[1]), logprobs)
