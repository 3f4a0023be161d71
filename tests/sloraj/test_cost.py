"""What service costs: by hand, from bytes."""

from __future__ import annotations

import pytest

from sloraj.policies.cost import BaseBytes, ServiceCost, base_bytes
from sloraj.policies.settings import QueueConfig

GIB = 1 << 30
BASE = BaseBytes(weights=16 * GIB, row=GIB // 4)


def test_without_an_adapter_a_prompt_token_costs_1_and_an_output_token_2() -> None:
    cost = ServiceCost(QueueConfig(), BASE)
    assert (cost.prompt(10, 0), cost.output_token(0), cost.load(0)) == (10.0, 2.0, 0.0)


def test_an_adapter_costs_its_share_of_arithmetic_of_bytes_read_and_of_the_bus() -> None:
    cost = ServiceCost(QueueConfig(adapter_load_cost=1000.0), BASE)
    num_bytes = GIB // 8
    assert cost.prompt(10, num_bytes) == 10 * (1 + 1 / 128)
    assert cost.output_token(num_bytes) == 2 * (1 + 1 / 2)
    assert cost.load(num_bytes) == 1000 / 128


@pytest.mark.parametrize("base", [BASE, BaseBytes()], ids=["switched off", "nothing to measure by"])
def test_adapters_may_be_free(base: BaseBytes) -> None:
    settings = QueueConfig(adapter_cost=0.0, adapter_load_cost=0.0)
    cost = ServiceCost(settings if base is BASE else QueueConfig(), base)
    assert (cost.prompt(3, GIB), cost.output_token(GIB), cost.load(GIB)) == (3.0, 2.0, 0.0)


def test_a_row_reads_its_share_of_the_weights_and_its_context() -> None:
    measured = base_bytes(
        num_parameters=1000, weight_bytes=1024, token_bytes=3, itemsize=2, max_num_seqs=4
    )
    assert measured == BaseBytes(weights=2000, row=1024 // 4 + 512 * 3)
