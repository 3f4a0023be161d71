"""The paper's own numbers, to be drawn beside ours.

Sources: "files" are the result files in the repository of S-LoRA (arXiv:2311.03285), from which its
tables and figures were made, and which match its Table 3 to rounding; "plot" is read off a
published figure and approximate. Throughput is finished requests per second, drain included.
"""

from __future__ import annotations

FILES, PLOT = "files", "plot"

# Table 3: A100 80 GB, 10 requests/s offered for 120 s. Adapters -> requests/s; None: out of memory.
TABLE_3: dict[str, dict[str, dict[int, float | None]]] = {
    "S1": {
        "S-LoRA": {5: 8.05, 100: 7.99, 1000: 7.64, 2000: 7.61},
        "vLLM-packed": {5: 2.04, 100: None, 1000: None, 2000: None},
        "PEFT": {5: 0.88, 100: 0.25},
    },
    "S2": {
        "S-LoRA": {5: 7.48, 100: 7.29, 1000: 6.69, 2000: 6.71},
        "vLLM-packed": {5: 2.04, 100: None, 1000: None, 2000: None},
        "PEFT": {5: 0.74, 100: 0.24},
    },
    "S4": {
        "S-LoRA": {2: 4.49, 100: 4.28, 1000: 3.96},
        "vLLM-packed": {2: 3.83, 100: None, 1000: None},
        "PEFT": {2: 0.54, 100: 0.13},
    },
}

# A10G at 2.5 requests/s, which saturated it: share of the base's throughput by adapters. Files.
RETENTION: dict[str, dict[int, float]] = {
    "S1": {1: 0.95, 10: 0.93, 50: 0.91, 200: 0.90},
    "S2": {1: 0.94, 10: 0.85, 50: 0.78, 200: 0.76},
}

# (GPU, setting, adapters, offered requests/s) -> requests/s of each variant. Files.
ABLATION: dict[tuple[str, str, int, float], dict[str, float]] = {
    ("A10G 24 GB", "S2", 200, 2.0): {"S-LoRA": 1.58, "no-unify-mem": 1.19, "bmm": 0.25},
    ("A100 40 GB", "S4", 200, 2.0): {
        "base": 1.82, "S-LoRA": 1.41, "no-unify-mem": 0.61, "bmm": 0.15,
    },
    ("A100 80 GB", "S2", 200, 10.0): {
        "base": 9.64, "S-LoRA": 7.52, "no-unify-mem": 6.53, "bmm": 0.26,
    },
    ("A100 80 GB", "S4", 400, 6.0): {
        "base": 5.59, "S-LoRA": 4.06, "no-unify-mem": 2.64, "bmm": 0.17,
    },
}  # fmt: skip

# Share of first tokens within 6 s: (GPU, setting, adapters, requests/s, cv) -> by policy. Files.
ATTAINMENT: dict[tuple[str, str, int, float, float], dict[str, float]] = {
    ("A10G", "S2", 200, 2.0, 1.0): {"FIFO": 0.27, "LIFO": 0.79, "early abort": 0.86},
    ("A10G", "S2", 200, 2.0, 8.0): {"FIFO": 0.32, "LIFO": 0.50, "early abort": 0.64},
    ("A100 80 GB", "S4", 400, 6.0, 1.0): {"FIFO": 0.10, "LIFO": 0.70, "early abort": 0.72},
    ("A100 80 GB", "S4", 400, 6.0, 8.0): {"FIFO": 0.14, "LIFO": 0.45, "early abort": 0.56},
}

# A100 40 GB, 32 adapters, 2 requests/s, alpha 1: d -> (requests/s, attainment). Files.
CLUSTERS: dict[str, dict[int, tuple[float, float]]] = {
    "S2": {1: (1.73, 0.85), 8: (1.71, 0.85), 32: (1.64, 0.68)},
    "S4": {1: (1.23, 0.50), 8: (1.25, 0.49), 32: (1.17, 0.28)},
}

MERGED = {"merged": 1.58, "on the fly": 1.41}  # A10G, a single adapter, requests/s. Files.

# Tensor parallel: requests/s of S-LoRA, without LoRA's communication, and the base only. Plot.
TENSOR_PARALLEL: dict[str, tuple[float, float, float]] = {
    "30B, 4 GPUs, n = 10": (3.3, 4.1, 5.1),
    "30B, 4 A100 40 GB, n = 100": (2.7, 3.4, 5.1),
    "70B, 4 A100 80 GB, n = 10": (1.8, 2.4, 3.5),
}
