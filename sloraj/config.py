"""Frozen settings. `EngineConfig` is what a caller writes; "auto" values are None until
resolved.
"""

from __future__ import annotations

import dataclasses
import math

from sloraj.errors import ConfigError
from sloraj.policies.cost import BaseBytes
from sloraj.policies.settings import QueueConfig

CHUNK = 128  # elements; every row of A and B in the pool starts on a chunk


def div_ceil(a: int, b: int) -> int:
    return -(-a // b)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Everything that decides how an engine runs. All sizes in the unit of their name."""

    model: str  # HF directory, or an Orbax directory written by `sloraj convert`
    served_model_name: str | None = None  # None: the directory's name
    adapters: tuple[tuple[str, str], ...] = ()  # (adapter_id, path), loaded before readiness
    adapters_dir: str | None = None  # every sub-directory with an adapter_config.json
    dtype: str | None = None  # None: bfloat16 on a GPU, float32 on CPU
    quantization: str | None = None  # linear weights in a byte: "int8", "fp8"; None: as dtype
    tensor_parallel_size: int = 1
    page_size: int = 16  # tokens a KV page
    pool_bytes: int | None = None  # per device; None: what is left on a GPU, 256 MiB on CPU
    max_model_len: int | None = None  # None: the model's, or what the pool can hold
    max_num_seqs: int | None = None  # None: 256 on a GPU, 16 on CPU
    max_num_batched_tokens: int | None = None  # a step; None: 2048 on a GPU, 128 on CPU
    max_rank: int | None = None  # None: the largest rank among the adapters given, at least 64
    max_adapter_slots: int = 1024  # adapters resident at once; slot 0 (the base) not counted
    max_num_waiting: int = 1024
    queue_order: str = "fcfs"  # who is admitted next: "fcfs", "priority", "vtc" (fair to tenants)
    priority_ageing_s: float = 10.0  # waiting so long is worth one level of priority
    tenant_weights: tuple[tuple[str, float], ...] = ()  # vtc: NAME=SHARE; 1 for all others
    tenant_max_waiting: int | None = None  # vtc: requests of one tenant that may wait; None: all
    tenant_tolerance: float = 0.0  # vtc: service within which first come is first served
    tenant_headroom: float = 0.0  # vtc: share of rows and pages kept from who runs too many
    prompt_token_cost: float = 1.0  # vtc
    output_token_cost: float = 2.0  # vtc
    adapter_cost: float = 1.0  # vtc: 0: tokens cost the same with any adapter; 1: as its bytes say
    adapter_load_cost: float = 20_000.0  # vtc: of as many bytes as the base model's, when loaded
    cluster_adapters: int | None = None  # above so many running ones, prefer those; None: never
    cluster_max_overtakes: int = 256  # that one request bears from such preference
    cluster_max_wait_s: float | None = None  # after which nobody is overtaken so; None: no limit
    cluster_max_lead: float = 4096.0  # vtc: service by which those preferred may be ahead
    host_adapter_bytes: int | None = None  # None: no limit
    loader_processes: int | None = None  # that read adapters; None: 4 on a GPU, 0 (threads) on CPU
    retention: str = "cost"  # which idle adapters stay on the device: "cost", "lru", "paper"
    prefetch: bool = True  # send adapters of waiting requests ahead
    first_token_slo_s: float | None = None  # objective: seconds to a request's first token
    early_abort: str | None = None  # refuse what would miss it: see policies/early_abort.py
    kernels: str | None = None  # "xla", "triton", "mosaic", "bmm"; None: the best known of each op
    adapter_pool_bytes: int | None = None  # of the pool, for adapters alone; None: it is shared
    merged_adapter: str | None = None  # a directory; added into the base's weights at load
    pad_ranks: bool = False  # store and compute every adapter at max_rank; to see what that costs
    checked: bool = False  # compare page owner tags in every step
    compilation_cache_dir: str | None = None  # None: JAX's own, or ~/.cache/sloraj; "": none
    random_weights: bool = False  # benchmarks: only config.json is read
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("tensor_parallel_size", "page_size", "max_num_seqs", "max_num_batched_tokens",
                     "max_model_len", "max_adapter_slots", "max_num_waiting"):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}: got {value}, allowed: 1 and up", param=name)
        rows, tokens = self.max_num_seqs, self.max_num_batched_tokens
        if rows is not None and tokens is not None and tokens <= rows:
            raise ConfigError(
                f"max_num_batched_tokens: got {tokens}, allowed: above max_num_seqs ({rows}), so "
                f"that a prefill always advances",
                param="max_num_batched_tokens",
            )
        if self.max_rank is not None and not 1 <= self.max_rank <= 256:
            raise ConfigError(f"max_rank: got {self.max_rank}, allowed: 1 to 256", param="max_rank")
        if self.retention not in ("cost", "lru", "paper"):
            raise ConfigError(
                f"retention: got {self.retention!r}, allowed: 'cost', 'lru', 'paper'",
                param="retention",
            )
        slo_s = self.first_token_slo_s
        if slo_s is not None and not (slo_s > 0 and math.isfinite(slo_s)):
            raise ConfigError(
                f"first_token_slo_s: got {slo_s}, allowed: above 0, or none",
                param="first_token_slo_s",
            )
        self._check_early_abort()
        if self.loader_processes is not None and not 0 <= self.loader_processes <= 64:
            raise ConfigError(
                f"loader_processes: got {self.loader_processes}, allowed: 0 to 64",
                param="loader_processes",
            )
        if self.adapter_pool_bytes is not None and not (
            1 <= self.adapter_pool_bytes < (self.pool_bytes or self.adapter_pool_bytes + 1)
        ):
            raise ConfigError(
                f"adapter_pool_bytes: got {self.adapter_pool_bytes}, allowed: 1 and up, and less "
                f"than pool_bytes ({self.pool_bytes})",
                param="adapter_pool_bytes",
            )
        if self.kernels not in (None, "xla", "triton", "mosaic", "bmm"):
            raise ConfigError(
                f"kernels: got {self.kernels!r}, allowed: 'xla', 'triton', 'mosaic', 'bmm'",
                param="kernels",
            )
        if self.quantization not in (None, "int8", "fp8"):
            raise ConfigError(
                f"quantization: got {self.quantization!r}, allowed: 'int8', 'fp8', or none",
                param="quantization",
            )
        if self.dtype not in (None, "float32", "bfloat16", "float16"):
            raise ConfigError(
                f"dtype: got {self.dtype!r}, allowed: float32, bfloat16, float16", param="dtype"
            )
        _ = self.queue  # refuses

    def _check_early_abort(self) -> None:
        kind = self.early_abort
        allowed = "'model', 'largest', 'paper', or none"
        if kind is not None and self.first_token_slo_s is None:
            allowed = "none, unless first_token_slo_s says what a request is to be refused for"
        elif kind == "paper" and (self.queue_order != "fcfs" or self.cluster_adapters is not None):
            allowed = "another or none with another queue_order than fcfs or with cluster_adapters"
        elif kind in (None, "model", "largest", "paper"):
            return
        raise ConfigError(f"early_abort: got {kind!r}, allowed: {allowed}", param="early_abort")

    @property
    def queue(self) -> QueueConfig:
        """The settings of the waiting queue, which have the same names."""
        names = [field.name for field in dataclasses.fields(QueueConfig)]
        return QueueConfig(**{name: getattr(self, name) for name in names})


def resolve(config: EngineConfig, platform: str) -> EngineConfig:
    """The configuration with everything made explicit that the platform ("cpu", "gpu") decides."""
    is_cpu = platform == "cpu"
    rows = config.max_num_seqs or (16 if is_cpu else 256)
    tokens = config.max_num_batched_tokens or max(128 if is_cpu else 2048, 2 * rows)
    return dataclasses.replace(
        config,
        dtype=config.dtype or ("float32" if is_cpu else "bfloat16"),
        max_num_seqs=rows,
        max_num_batched_tokens=tokens,
        loader_processes=(0 if is_cpu else 4)
        if config.loader_processes is None
        else config.loader_processes,
    )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PoolLayout:
    """Geometry of the page pool, per device. Elements, not bytes, unless the name says so."""

    num_layers: int
    num_kv_heads: int  # per device
    head_dim: int
    page_size: int  # tokens
    tp: int
    dtype: str
    padded_rank: int | None = None  # every A and B gets so many rows; None: its own rank

    @property
    def page_elems(self) -> int:
        return 2 * self.page_size * self.num_kv_heads * self.head_dim  # 2: key and value

    @property
    def chunks_per_page(self) -> int:
        return self.page_elems // CHUNK

    def __post_init__(self) -> None:
        if self.page_elems % CHUNK:
            raise ConfigError(
                f"page_size: got {self.page_size}, allowed: one that makes 2 * page_size * kv "
                f"heads ({self.num_kv_heads}) * head_dim ({self.head_dim}) a multiple of {CHUNK}",
                param="page_size",
            )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """The resolved numbers that the host side (pages, adapters, scheduler) runs on."""

    num_pages: int  # including the null page 0
    page_size: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_adapter_slots: int
    max_num_waiting: int
    max_rank: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    host_adapter_bytes: int | None = None
    token_buckets: tuple[int, ...] = ()  # sizes that steps with prefill are padded to, ascending
    num_adapter_pages: int | None = None  # that adapters alone may own; None: all are shared
    install_pages_per_step: int = 256  # bounds the copies that one step waits behind
    retention: str = "cost"
    prefetch: bool = True
    first_token_slo_s: float | None = None
    early_abort: str | None = None
    queue: QueueConfig = dataclasses.field(default_factory=QueueConfig)
    base_bytes: BaseBytes = dataclasses.field(default_factory=BaseBytes)
