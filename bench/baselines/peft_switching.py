"""Hugging Face PEFT as a baseline: batches of one adapter, and a switch between batches.

    python -m bench.baselines.peft_switching --geometry llama-7b --setting S1 --adapters 5 \\
        --requests 64 --out bench/results/nvidia-h200/sweeps/peft-S1-5.jsonl

Needs torch, transformers and peft, which this project does not; JAX is not used. As in the paper,
the adapters are on the device, the request that waits longest decides whose turn it is, and with it
go the requests of that adapter that have arrived, up to --max-batch. A batch is computed by
`generate`, greedily, to the end of its longest request. Writes the record of one point, as the
sweeps do.
"""

from __future__ import annotations

import argparse
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

from bench.columns import to_columns
from bench.geometries import GEOMETRIES, LLAMA
from bench.measures import measures, point_trace
from bench.outcome import Outcome
from bench.points import EngineSpec, Point
from bench.records import RecordError, RecordFile, header
from bench.settings import MODULES, SETTINGS
from bench.trace import Request, digest, prompt_token_ids


class _Moments(transformers.StoppingCriteria):  # type: ignore[misc]
    """Notes when each token of the batch was there; never stops it."""

    def __init__(self, now: Callable[[], float]) -> None:
        self.moments: list[float] = []
        self._now = now

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        input_ids[:, -1].max().item()  # waits for the device
        self.moments.append(self._now())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class PeftServer:
    """A model with random weights and adapters of given ranks, named "0", "1", ..."""

    def __init__(self, geometry: str, ranks: Sequence[int], device: str) -> None:
        self.device = device
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        config = transformers.LlamaConfig(**(LLAMA | GEOMETRIES[geometry]))
        generator = torch.Generator(device).manual_seed(0)
        with torch.device(device):
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
        model.requires_grad_(False)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.02, generator=generator)
        self.model: Any = None
        for index, rank in enumerate(ranks):
            lora = peft.LoraConfig(r=rank, lora_alpha=16, target_modules=list(MODULES))
            if self.model is None:
                self.model = peft.get_peft_model(model, lora, adapter_name=str(index))
            else:
                self.model.add_adapter(str(index), lora)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if "lora_" in name:
                    parameter.uniform_(-1e-3, 1e-3, generator=generator)
        self.model.to(device, dtype).eval()

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def batch(
        self, adapter: int, prompts: list[list[int]], num_new: int, now: Callable[[], float]
    ) -> list[float]:
        """The moments of `num_new` tokens, each of the whole batch's."""
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=self.device)
        mask = torch.tensor(
            [[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=self.device
        )
        self.model.set_adapter(str(adapter))
        noted = _Moments(now)
        self.model.generate(
            input_ids=ids, attention_mask=mask, do_sample=False, min_new_tokens=num_new,
            max_new_tokens=num_new, pad_token_id=0,
            stopping_criteria=transformers.StoppingCriteriaList([noted]),
        )  # fmt: skip
        return noted.moments


def replay(
    server: PeftServer, trace: Sequence[Request], *, max_batch: int, vocab_size: int,
    give_up_s: float, seed: int = 42,
) -> list[Outcome]:  # fmt: skip
    """Serve a trace, batch by batch. What is not begun at `give_up_s` has that for its error."""
    outcomes = [Outcome.of(i, request) for i, request in enumerate(trace)]
    coming, waiting = deque(range(len(trace))), deque[int]()
    started = time.monotonic()

    def now() -> float:
        return time.monotonic() - started

    while coming or waiting:
        at_s = now()
        while coming and trace[coming[0]].arrival_s <= at_s:
            outcomes[coming[0]].sent_s = at_s
            waiting.append(coming.popleft())
        if at_s >= give_up_s:
            for index in [*waiting, *coming]:
                outcomes[index].error = f"given_up: not begun after {give_up_s:g} s"
                outcomes[index].ended_s = at_s
            break
        if not waiting:
            time.sleep(max(0.0, trace[coming[0]].arrival_s - at_s))
            continue
        adapter = trace[waiting[0]].adapter
        chosen = [i for i in waiting if trace[i].adapter == adapter][:max_batch]
        waiting = deque(i for i in waiting if i not in set(chosen))
        prompts = [
            prompt_token_ids(seed, i, trace[i].num_prompt_tokens, vocab_size).tolist()
            for i in chosen
        ]
        num_new = max(trace[i].num_output_tokens for i in chosen)
        moments = server.batch(adapter or 0, prompts, num_new, now)
        for i in chosen:
            wanted, outcome = trace[i].num_output_tokens, outcomes[i]
            outcome.first_token_s, outcome.last_token_s = moments[0], moments[wanted - 1]
            outcome.ended_s, outcome.num_output_tokens = moments[wanted - 1], wanted
            outcome.finish_reason = "length"
    return outcomes


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The record of the point."""
    point = Point(
        figure="table-3", engine=EngineSpec(geometry=args.geometry), system="PEFT",
        setting=args.setting, num_adapters=args.adapters, num_requests=args.requests,
        give_up_s=args.give_up, input_range=tuple(args.lengths), output_range=tuple(args.lengths),
    )  # fmt: skip
    trace = point_trace(point, None)
    ranks = SETTINGS[args.setting].adapter_ranks(args.adapters)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    server = PeftServer(args.geometry, ranks, device)
    vocab_size = GEOMETRIES[args.geometry]["vocab_size"]
    server.batch(0, [[3, 4, 5]], 2, time.monotonic)  # the first batch makes handles and the like
    outcomes = replay(
        server, trace, max_batch=args.max_batch, vocab_size=vocab_size, give_up_s=args.give_up
    )
    versions = {m.__name__: m.__version__ for m in (torch, transformers, peft)}
    return {
        "key": point.key,
        "point": point.record(),
        "engine": {"kernels": str(versions), "max_batch": args.max_batch},
        "trace_digest": digest(trace),
        **measures(outcomes, None),
        "ceiling": None,
        "counters": {},
        "steps": {},
        "requests": to_columns(outcomes),
    }


def main() -> None:
    args = _parse()
    is_gpu = torch.cuda.is_available()
    head = header(
        bench="sweep", device=torch.cuda.get_device_name(0) if is_gpu else "cpu", seed=42,
        settings={"baseline": "PEFT", "max_batch": args.max_batch}, commit_name=args.commit,
    )  # fmt: skip
    try:
        with RecordFile.create(args.out, head) as file:
            record = run(args)
            file.append(record)
    except RecordError as exc:
        raise SystemExit(f"bench.baselines.peft_switching: {exc}") from exc
    summary = record["summary"]
    if summary is None:
        print("nothing finished")
    else:
        print(
            f"{summary['num_finished']} of {summary['num_requests']} requests in "
            f"{summary['wall_s']:.1f} s: {summary['requests_per_s']:.3f} requests/s"
        )


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--geometry", choices=sorted(GEOMETRIES), default="llama-7b")
    add("--setting", choices=sorted(SETTINGS), default="S1")
    add("--adapters", type=int, default=5)
    add("--requests", type=int, default=64)
    add("--lengths", type=int, nargs=2, default=[8, 512], help="of prompts and outputs, [from, to)")
    add("--max-batch", type=int, default=32)
    add("--give-up", type=float, default=180.0, help="seconds after which no batch is begun")
    add("--out", type=Path, required=True)
    add("--commit", help="where the tree is not a repository")
    return parser.parse_args()


if __name__ == "__main__":
    main()
