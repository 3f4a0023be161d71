"""The same requests through the whole Python interface: tokenizer, frontend, threads, texts."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from sloraj.config import EngineConfig
from sloraj.core import EngineCore
from sloraj.frontend import Frontend
from sloraj.frontend_api import ModelInfo
from sloraj.offline import Job, JobRunner, Window
from sloraj.request import SamplingParams
from sloraj.tokenizer import load_tokenizer
from sloraj.transport import ThreadTransport


def write_tokenizer(directory: str, vocab_size: int) -> None:
    """A byte-level tokenizer whose every id up to `vocab_size` is a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, *(f"Ġword{i}" for i in range(vocab_size - len(alphabet)))]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(Path(directory) / "tokenizer.json"))


def run_through_engine(
    core: EngineCore,
    info: dict[str, Any],
    model: str,
    prompts: np.ndarray,
    adapters: Sequence[str | None],
    num_output: int,
) -> dict[str, float]:
    """As `Engine.generate` does it, with the core in a thread beside the frontend's. Ends the core.

    Wall time from the first prompt handed in to the last text.
    """
    transport = ThreadTransport(
        EngineConfig(model=model), core_factory=lambda config, progress: (core, info)
    )
    transport.start(lambda stage, done, total: None)
    frontend = Frontend(transport, load_tokenizer(model), msgspec.convert(info, ModelInfo))
    params = SamplingParams(max_tokens=num_output, temperature=0.0, ignore_eos=True)
    jobs = [
        Job(prompt.tolist(), params, adapter)
        for prompt, adapter in zip(prompts, adapters, strict=True)
    ]
    try:
        started = time.perf_counter()
        done = JobRunner(frontend, Window(len(jobs))).run_all(jobs, return_errors=False)
        wall_s = time.perf_counter() - started
    finally:
        frontend.stop()
    if not all(completion.text for completion in done):
        raise RuntimeError("a completion has no text")
    return {
        "wall_s": wall_s,
        "requests_per_s": len(jobs) / wall_s,
        "output_tokens_per_s": len(jobs) * num_output / wall_s,
    }
