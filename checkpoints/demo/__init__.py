"""The demo model and its adapters, as ordinary Hugging Face and PEFT directories.

Trained by `bench/train_demo.py`; README.md gives the measured accuracy of each adapter, and
`checkpoints.demo.tasks` computes the right answer to every prompt.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["ADAPTERS_DIR", "MODEL_DIR"]

MODEL_DIR = (
    Path(__file__).parent / "model"
)  # config.json, model.safetensors, tokenizer, chat template
ADAPTERS_DIR = Path(__file__).parent / "adapters"  # one PEFT directory per adapter id
