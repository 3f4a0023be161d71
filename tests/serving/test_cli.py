"""The command line: every config field is a flag, other servers' spellings work,
refusals are one line."""

from __future__ import annotations

import dataclasses
import json
import sys
import types
from typing import Any

import pytest

from serving import cli
from serving.cli_options import size
from serving.config import ServerConfig
from sloraj.config import EngineConfig
from sloraj.errors import AdapterNotFound, ConfigError
from sloraj.request import SamplingParams


def printed(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    assert cli.main(["serve", *argv, "--print-config"]) == 0
    shown: dict[str, Any] = json.loads(capsys.readouterr().out)
    return shown


def test_defaults_are_those_of_the_dataclasses(capsys: pytest.CaptureFixture[str]) -> None:
    shown = printed(capsys, "base")
    assert shown["engine"] == json.loads(json.dumps(dataclasses.asdict(EngineConfig(model="base"))))
    assert shown["server"] == json.loads(json.dumps(dataclasses.asdict(ServerConfig())))


@pytest.mark.parametrize("config", [EngineConfig, ServerConfig])
def test_every_field_is_a_flag_with_help(
    capsys: pytest.CaptureFixture[str], config: type[Any]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["serve", "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for field in dataclasses.fields(config):
        assert field.name == "model" or f"--{field.name.replace('_', '-')}" in text
    assert "every sub-directory with an adapter_config.json" in text  # a field's own comment


def test_the_spellings_of_other_servers_are_understood(capsys: pytest.CaptureFixture[str]) -> None:
    shown = printed(
        capsys, "base", "--enable-lora", "--max-lora-rank", "32", "--max-loras", "8",
        "--lora-modules", "sql=/a/sql", '{"name": "chat", "path": "/a/chat"}',
        "--lora-paths", "/a/plain/", "--tp", "2",
    )["engine"]  # fmt: skip
    assert shown["adapters"] == [["sql", "/a/sql"], ["chat", "/a/chat"], ["plain", "/a/plain/"]]
    assert (shown["max_rank"], shown["max_adapter_slots"]) == (32, 8)
    assert shown["tensor_parallel_size"] == 2


def test_values_are_typed_and_sizes_have_units(capsys: pytest.CaptureFixture[str]) -> None:
    shown = printed(
        capsys, "base", "--adapters-dir", "d", "--pool-bytes", "1.5GiB", "--checked", "--port", "0",
        "--no-vllm-metrics", "--adapter-root", "a", "--adapter-root", "b", "--request-timeout-s",
        "2.5",
    )  # fmt: skip
    assert shown["engine"]["pool_bytes"] == 1.5 * 2**30
    assert shown["engine"]["checked"] is True
    assert shown["server"]["vllm_metrics"] is False
    assert shown["server"]["adapter_root"] == ["a", "b"]
    assert shown["server"]["request_timeout_s"] == 2.5
    assert [size(t) for t in ("24GB", "512MiB", "7", "1k")] == [24 * 10**9, 2**29, 7, 1000]


def test_weights_of_tenants_are_pairs_or_json_and_add_up(
    capsys: pytest.CaptureFixture[str],
) -> None:
    shown = printed(
        capsys, "base", "--scheduling-policy", "vtc", "--tenant-weights", "sql=2,chat=0.5",
        "--tenant-weights", '{"a,b": 3}',
    )["engine"]  # fmt: skip
    assert shown["queue_order"] == "vtc"
    assert shown["tenant_weights"] == [["sql", 2.0], ["chat", 0.5], ["a,b", 3.0]]


def test_keys_are_never_printed(capsys: pytest.CaptureFixture[str]) -> None:
    shown = printed(capsys, "base", "--api-key", "secret", "--admin-api-key", "secret2")
    assert "secret" not in json.dumps(shown)


@pytest.mark.parametrize(
    "argv",
    [
        ["serve", "base", "--page-size", "0"],
        ["serve", "base", "--port", "99999"],
        ["serve", "base", "--api-key", "two words"],
        ["serve", "base", "--log-level", "loud"],
        ["serve", "base", "--tenant-from", "key"],
        ["serve", "base", "--queue-order", "lifo"],
        ["serve", "base", "--tenant-weights", "a=0"],
        ["serve", "base", "--tenant-weights", "a=1,a=2"],
        ["serve", "base", "--tenant-weights", "a=inf"],
        ["serve", "base", "--cluster-adapters", "0"],
        ["convert", "base", "out", "--tp", "0"],
    ],
)
def test_impossible_settings_are_one_line_and_status_1(
    capsys: pytest.CaptureFixture[str], argv: list[str]
) -> None:
    assert cli.main(argv) == 1
    errors = capsys.readouterr().err
    assert errors.startswith("error: ") and errors.count("\n") == 1
    assert "got " in errors and "allowed: " in errors


@pytest.mark.parametrize(
    "argv",
    [[], ["serve"], ["serve", "b", "--pool-bytes", "lots"], ["serve", "b", "--lora-modules", "=x"],
     ["serve", "b", "--lora-modules", "{}"], ["serve", "b", "--lora-modules", "{"], ["check", "a"],
     ["serve", "b", "--tenant-weights", "a"], ["serve", "b", "--tenant-weights", '{"a": "x"}'],
     ["serve", "b", "--tenant-weights", "{"]],
)  # fmt: skip
def test_wrong_usage_is_status_2(capsys: pytest.CaptureFixture[str], argv: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(argv)
    assert ended.value.code == 2
    assert "error: " in capsys.readouterr().err


def fake_module(monkeypatch: pytest.MonkeyPatch, name: str, **values: Any) -> None:
    module = types.ModuleType(name)
    for key, value in values.items():
        setattr(module, key, value)
    monkeypatch.setitem(sys.modules, name, module)


def test_generate_prints_each_answer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Any] = []

    class Engine:
        def __init__(self, model: str, **settings: Any) -> None:
            asked.append((model, settings["max_num_seqs"], settings["adapters"]))

        def __enter__(self) -> Engine:
            return self

        def __exit__(self, *_: object) -> None:
            asked.append("closed")

        def generate(self, prompts: list[str], params: SamplingParams, adapter: str | None) -> Any:
            if adapter == "nobody":
                raise AdapterNotFound("adapter 'nobody' is not loaded", param="model")
            asked.append((prompts, params.max_tokens, params.seed, adapter))
            choice = types.SimpleNamespace(text="answer")
            return [types.SimpleNamespace(choices=[choice]) for _ in prompts]

    fake_module(monkeypatch, "sloraj.engine", Engine=Engine)
    argv = ["generate", "base", "--prompt", "one", "--prompt", "two", "--max-num-seqs", "3"]
    more = ["--adapter", "x", "--adapters", "x=/x", "--max-tokens", "5", "--seed", "9"]
    assert cli.main([*argv, *more]) == 0
    assert capsys.readouterr().out == "answer\nanswer\n"
    assert asked == [("base", 3, (("x", "/x"),)), (["one", "two"], 5, 9, "x"), "closed"]
    assert cli.main([*argv, "--adapter", "nobody"]) == 1
    assert capsys.readouterr().err == "error: adapter 'nobody' is not loaded\n"


def test_check_says_which_adapters_would_load(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def check_adapter(path: str, config: Any, *, max_rank: int) -> Any:
        assert (config, max_rank) == ("config of base", 64)
        problem = "rank 96 exceeds max_rank 64" if path == "bad" else None
        return types.SimpleNamespace(
            path=path, problem=problem, ranks=(4, 8), modules=("q", "o"), num_layers=2,
            num_bytes=2**20, version="abc",
        )  # fmt: skip

    fake_module(monkeypatch, "checkpoints.peft_adapter", check_adapter=check_adapter)
    fake_module(
        monkeypatch, "checkpoints.hf_config", read_model_config=lambda path: f"config of {path}"
    )
    argv = ["check", "--model", "base", "--max-rank", "64"]
    assert cli.main([*argv, "good"]) == 0
    assert cli.main([*argv, "good", "bad"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "ok   good: rank 4, 8 on q, o in 2 layers, 1.0 MiB, version abc"
    assert lines[2] == "bad  bad: rank 96 exceeds max_rank 64"


def test_convert_hands_over_and_says_what_next(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[Any] = []
    fake_module(monkeypatch, "sloraj.convert", convert=lambda *args: calls.append(args))
    assert cli.main(["convert", "base", "out", "--tp", "2"]) == 0
    assert calls == [("base", "out", 2)]
    assert "sloraj serve out" in capsys.readouterr().out


def test_serve_starts_the_engine_it_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def serve(factory: Any, config: ServerConfig, **more: Any) -> int:
        seen.update(engine=factory(), port=config.port, **more)
        return 0

    def start_frontend(config: EngineConfig, *, process: bool, on_progress: Any) -> Any:
        return (config.model, process)

    fake_module(monkeypatch, "serving.server", serve=serve)
    fake_module(monkeypatch, "sloraj.launch", start_frontend=start_frontend, ProgressBars=None)
    assert cli.main(["serve", "base", "--port", "1234", "--adapters-dir", "dir"]) == 0
    assert seen == {
        "engine": ("base", True), "port": 1234, "default_roots": ["dir"], "max_adapter_slots": 1024,
    }  # fmt: skip


def test_a_missing_field_is_a_config_error() -> None:
    with pytest.raises(ConfigError):
        cli.read_config(EngineConfig, types.SimpleNamespace())
