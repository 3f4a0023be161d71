"""The embedded demo, all adapters in one batch, every answer checked.

    python -m bench.demo --texts 25 --out bench/results/.../demo.json

Each adapter and the base get `--texts` random texts at once; the right answer of each is computed
by the task's own program. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path
from typing import Any

import jax

from bench.record import commit, record
from checkpoints.demo import ADAPTERS_DIR, MODEL_DIR
from checkpoints.demo.tasks import BASE_TASK, TASKS, prompt, random_text
from sloraj import Engine, SamplingParams

MAX_TOKENS = 64


def measure(num_texts: int, *, process: bool) -> dict[str, Any]:
    """Answer `num_texts` texts for the base and every adapter, mixed, and count the right ones."""
    rng = random.Random(0)
    work = [(name, random_text(rng)) for name in (None, *TASKS) for _ in range(num_texts)]
    rng.shuffle(work)
    wanted = [(BASE_TASK if name is None else TASKS[name]).answer(text) for name, text in work]
    started = time.perf_counter()
    with Engine(MODEL_DIR, adapters_dir=str(ADAPTERS_DIR), process=process, checked=True) as engine:
        startup_s = time.perf_counter() - started
        started = time.perf_counter()
        answers = engine.generate(
            [prompt(text) for _, text in work],
            SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS),
            adapter=[name for name, _ in work],
        )
        wall_s = time.perf_counter() - started
        info, stats = engine.info, engine.stats()
    is_right = [answer.text == right for answer, right in zip(answers, wanted, strict=True)]
    return {
        "device": info.device,
        "kernels": info.kernels,
        "dtype": info.dtype,
        "num_programs": info.num_programs,
        "startup_s": startup_s,
        "num_adapters": len(TASKS),
        "num_answers": len(work),
        "num_right": sum(is_right),
        "wrong": [
            (name, text, answer.text)
            for ok, (name, text), answer in zip(is_right, work, answers, strict=True)
            if not ok
        ],
        "wall_s": wall_s,
        "answers_per_s": len(work) / wall_s,
        "compiles_after_ready": stats["runner"]["compiles_after_ready"],
    }


def main() -> None:
    args = _parse()
    result = {
        "bench": "demo",
        "commit": args.commit or commit(),
        "jax": jax.__version__,
        **measure(args.texts, process=args.process),
    }
    record(result, args.out)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--texts", type=int, default=25, help="per adapter")
    parser.add_argument("--process", action="store_true", help="engine in a process of its own")
    parser.add_argument("--commit", help="where the tree is not a repository")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
