"""`sloraj serve | generate | check | convert`: every way to start from a terminal."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any

from checkpoints.errors import CheckpointError
from serving.cli_options import add_options, printable, read_config
from serving.config import ServerConfig
from sloraj.config import EngineConfig
from sloraj.errors import ConfigError, SlorajError
from sloraj.frontend_api import FrontendApi
from sloraj.request import SamplingParams


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 done, 1 refused or failed (the reason is on stderr), 2 wrong
    usage.
    """
    args = _parser().parse_args(argv)
    run: Callable[[argparse.Namespace], int] = args.run
    try:
        return run(args)
    except KeyboardInterrupt:
        return 130
    except (SlorajError, CheckpointError) as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sloraj", description="Thousands of LoRA adapters of one base model, in one batch."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    serve = commands.add_parser("serve", help="serve a model and its adapters over HTTP")
    serve.add_argument("model", help="directory of the base model")
    add_options(serve, EngineConfig, skip=("model",))
    add_options(serve, ServerConfig)
    serve.add_argument("--print-config", action="store_true", help="show the configuration and end")
    serve.add_argument(
        "--enable-lora", action="store_true", help="accepted and ignored: adapters are always on"
    )
    serve.set_defaults(run=_serve)

    generate = commands.add_parser("generate", help="answer prompts without a server")
    generate.add_argument("model", help="directory of the base model")
    generate.add_argument(
        "--prompt", action="append", required=True, help="a prompt; may be repeated"
    )
    generate.add_argument("--adapter", help="answer as this adapter; omitted: the base model")
    add_options(generate, EngineConfig, skip=("model", "seed"))
    add_options(generate, SamplingParams, skip=("logit_bias", "stop_token_ids"))
    generate.set_defaults(run=_generate)

    check = commands.add_parser("check", help="say whether adapters would load, and why not")
    check.add_argument("adapter", nargs="+", help="directory of a PEFT adapter")
    check.add_argument("--model", required=True, help="directory of the base model it is for")
    check.add_argument("--max-rank", "--max-lora-rank", type=int, default=256)
    check.set_defaults(run=_check)

    convert = commands.add_parser("convert", help="write a checkpoint that loads onto a mesh")
    convert.add_argument("model", help="directory of the base model")
    convert.add_argument("out", help="directory to write, which must not exist")
    convert.add_argument("--tp", type=int, default=1, help="devices it is to be split over")
    convert.set_defaults(run=_convert)
    return parser


def _late(module: str) -> Any:
    """Parts that pull in JAX are imported only by the command that needs them."""
    return importlib.import_module(module)


def _serve(args: argparse.Namespace) -> int:
    engine_config: EngineConfig = read_config(EngineConfig, args)
    server_config: ServerConfig = read_config(ServerConfig, args)
    if args.print_config:
        shown = {"engine": printable(engine_config), "server": printable(server_config)}
        print(json.dumps(shown, indent=2))
        return 0
    logging.basicConfig(level=server_config.log_level.upper(), format="%(levelname)s %(message)s")
    server = _late("serving.server")
    roots = [engine_config.adapters_dir] if engine_config.adapters_dir else []
    status: int = server.serve(
        lambda: _start_engine(engine_config),
        server_config,
        default_roots=roots,
        max_adapter_slots=engine_config.max_adapter_slots,
    )
    return status


def _start_engine(config: EngineConfig) -> FrontendApi:
    """The engine in a process of its own, with progress bars on a terminal."""
    launch = _late("sloraj.launch")
    bars = launch.ProgressBars() if sys.stderr.isatty() else None
    try:
        engine: FrontendApi = launch.start_frontend(config, process=True, on_progress=bars)
        return engine
    finally:
        if bars is not None:
            bars.close()


def _generate(args: argparse.Namespace) -> int:
    params: SamplingParams = read_config(SamplingParams, args)
    config: EngineConfig = read_config(EngineConfig, args)
    settings = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.name != "model"
    }
    with _late("sloraj.engine").Engine(config.model, **settings) as engine:
        for answer in engine.generate(args.prompt, params, args.adapter):
            for choice in answer.choices:
                print(choice.text)
    return 0


def _check(args: argparse.Namespace) -> int:
    peft = _late("checkpoints.peft_adapter")
    model = _late("checkpoints.hf_config").read_model_config(args.model)
    num_bad = 0
    for path in args.adapter:
        report = peft.check_adapter(path, model, max_rank=args.max_rank)
        if report.problem is not None:
            num_bad += 1
            print(f"bad  {path}: {report.problem}")
        else:
            ranks = ", ".join(map(str, report.ranks))
            print(
                f"ok   {path}: rank {ranks} on {', '.join(report.modules)} in {report.num_layers} "
                f"layers, {report.num_bytes / 2**20:.1f} MiB, version {report.version}"
            )
    return 1 if num_bad else 0


def _convert(args: argparse.Namespace) -> int:
    if args.tp < 1:
        raise ConfigError(f"tp: got {args.tp}, allowed: 1 and up", param="tp")
    _late("sloraj.convert").convert(args.model, args.out, args.tp)
    devices = f" --tensor-parallel-size {args.tp}" if args.tp > 1 else ""
    print(f"wrote {args.out}; serve it with: sloraj serve {args.out}{devices}")
    return 0
