"""What serving a request costs, in prompt tokens of the base model.

A prompt token costs the device arithmetic, an output token the bytes that its row makes the device
read: so an adapter adds to the one its share of the base's parameters, and to the other its share
of what a row reads without it. A cold adapter costs the bus its bytes.
Source: VTC's weighted tokens (arXiv:2401.00588, section 3), made to depend on the adapter.
"""

from __future__ import annotations

import dataclasses

from sloraj.policies.settings import QueueConfig

NOMINAL_CONTEXT = 512  # tokens whose KV a row reads; costs need a number before there is one


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BaseBytes:
    """What adapters are measured by, in bytes over all devices. 0: unknown, adapters are free."""

    weights: int = 0  # the base model's parameters in the dtype of the pool
    row: int = 0  # read for one row of a full batch: its share of the weights, and its KV


def base_bytes(
    *, num_parameters: int, weight_bytes: int, token_bytes: int, itemsize: int, max_num_seqs: int
) -> BaseBytes:
    """From the engine's geometry: `token_bytes` is the KV of a token, `itemsize` the pool's."""
    row = weight_bytes // max_num_seqs + NOMINAL_CONTEXT * token_bytes
    return BaseBytes(weights=num_parameters * itemsize, row=row)


@dataclasses.dataclass(frozen=True, slots=True)
class ServiceCost:
    settings: QueueConfig
    base: BaseBytes

    def prompt(self, num_tokens: int, adapter_bytes: int) -> float:
        share = adapter_bytes / self.base.weights if self.base.weights else 0.0
        token = self.settings.prompt_token_cost * (1 + self.settings.adapter_cost * share)
        return num_tokens * token

    def output_token(self, adapter_bytes: int) -> float:
        share = adapter_bytes / self.base.row if self.base.row else 0.0
        return self.settings.output_token_cost * (1 + self.settings.adapter_cost * share)

    def load(self, num_bytes: int) -> float:
        share = num_bytes / self.base.weights if self.base.weights else 0.0
        return self.settings.adapter_load_cost * share
