"""Row state: what a running sequence keeps on the device, and how the host sets it."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from sloraj.batch import ScheduledRow
from sloraj.request import MAX_LOGIT_BIAS, MAX_STOP, SamplingParams
from sloraj.runner.packing import Packing
from sloraj.sampler import SamplingRows, TokenCounts

RESETS = 8  # rows one reset program sets
NUM_BIAS = MAX_LOGIT_BIAS + 2 * MAX_STOP  # logit_bias, and stop ids held down by min_tokens
ALWAYS = 2**31 - 1
FLOATS = ("temperature", "top_p", "min_p", "presence", "frequency", "repetition")
INTS = ("top_k", "seed", "prompt_len")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RowState:
    """Arrays of `max_num_seqs + 1` rows; the last is the null row, which padding reads and
    writes.
    """

    slot: jax.Array  # i32 [rows] adapter slot, 0 = base
    tag: jax.Array  # i32 [rows] owner tag of the row's pages
    adapter_tag: jax.Array  # i32 [rows] owner tag of the leased adapter version's pages
    sampling: SamplingRows


RESET_PACKING = Packing(
    (
        *((name, (RESETS,)) for name in ("row", "slot", "tag", "adapter_tag", *INTS, *FLOATS)),
        *((name, (RESETS, NUM_BIAS)) for name in ("bias_ids", "bias_values", "bias_until")),
    )
)


def pack_resets(rows: list[ScheduledRow], null_row: int, vocab_size: int) -> np.ndarray:
    """One buffer for up to RESETS rows; the rest of it resets the null row."""
    buffer = np.zeros(RESET_PACKING.size, np.int32)
    fields = RESET_PACKING.split(buffer)
    fields["row"][:] = null_row
    fields["bias_ids"][:] = vocab_size
    for i, row in enumerate(rows):
        sequence = row.sequence
        params = sequence.params
        fields["row"][i] = row.row
        fields["slot"][i] = row.slot
        fields["tag"][i] = sequence.tag
        fields["adapter_tag"][i] = row.adapter_tag
        fields["top_k"][i] = max(params.top_k, 0)
        fields["seed"][i] = np.uint32(sequence.seed & 0xFFFFFFFF).view(np.int32)
        fields["prompt_len"][i] = sequence.num_prompt_tokens
        for name, value in _floats(params).items():
            fields[name].view(np.float32)[i] = value
        _pack_bias(fields, i, params, sequence.stop_ids)
    return buffer


def _floats(params: SamplingParams) -> dict[str, float]:
    return {
        "temperature": params.temperature,
        "top_p": params.top_p,
        "min_p": params.min_p,
        "presence": params.presence_penalty,
        "frequency": params.frequency_penalty,
        "repetition": params.repetition_penalty,
    }


def _pack_bias(
    fields: dict[str, np.ndarray], i: int, params: SamplingParams, stop_ids: frozenset[int]
) -> None:
    entries = [(token, value, ALWAYS) for token, value in params.logit_bias]
    if params.min_tokens:
        entries += [(token, -np.inf, params.min_tokens) for token in sorted(stop_ids)]
    if entries:
        tokens, values, until = zip(*entries, strict=True)
        n = len(entries)
        fields["bias_ids"][i, :n] = tokens
        fields["bias_values"].view(np.float32)[i, :n] = values
        fields["bias_until"][i, :n] = until


def reset_rows(
    state: RowState, counts: TokenCounts, buffer: jax.Array
) -> tuple[RowState, TokenCounts]:
    """Give rows to new sequences: set their parameters, clear their counts (runs on the device)."""
    fields = RESET_PACKING.split(buffer)
    rows = fields["row"]
    as_float = {
        name: jax.lax.bitcast_convert_type(fields[name], jnp.float32)
        for name in (*FLOATS, "bias_values")
    }
    fields |= as_float
    sampling = SamplingRows(
        **{
            field.name: getattr(state.sampling, field.name).at[rows].set(fields[field.name])
            for field in dataclasses.fields(SamplingRows)
        }
    )
    state = dataclasses.replace(
        state,
        slot=state.slot.at[rows].set(fields["slot"]),
        tag=state.tag.at[rows].set(fields["tag"]),
        adapter_tag=state.adapter_tag.at[rows].set(fields["adapter_tag"]),
        sampling=sampling,
    )
    counts = TokenCounts(
        in_prompt=counts.in_prompt.at[rows].set(False), output=counts.output.at[rows].set(0)
    )
    return state, counts


def needs_full_sampling(params: SamplingParams) -> bool:
    """Whether more than an argmax is needed."""
    return bool(
        not params.is_greedy or params.min_tokens or params.logit_bias or has_penalties(params)
    )


def has_penalties(params: SamplingParams) -> bool:
    return (
        params.presence_penalty != 0
        or params.frequency_penalty != 0
        or params.repetition_penalty != 1
    )
