"""An engine core whose tokens can be computed by hand, and tokenizers small enough to read.

Token k of an answer is token k of the prompt, over and over, plus N for the adapter "shift-N".
Other adapters misbehave: see `FakeCore._start`. Imported by the engine process too.
"""

from __future__ import annotations

import dataclasses
import os
import queue
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from checkpoints.errors import InvalidCheckpoint
from sloraj.config import EngineConfig
from sloraj.errors import AdapterNotFound, ConfigError, QueueFull
from sloraj.frontend_api import AdapterInfo
from sloraj.messages import (
    Abort,
    Drain,
    FromEngine,
    Generate,
    GetStats,
    Heartbeat,
    ListAdapters,
    LoadAdapter,
    Reply,
    RequestFailed,
    Shutdown,
    ToEngine,
    TokenOutput,
    UnloadAdapter,
)
from sloraj.transport import OnProgress

FACTORY = "tests.sloraj.fake_core:build"
VOCAB_SIZE = 300
EOS = 257
MAX_MODEL_LEN = 512
VERSION = "v-1"


def build(config: EngineConfig, on_progress: OnProgress) -> tuple[FakeCore, dict[str, Any]]:
    """`config.served_model_name` picks a way to fail: see the branches."""
    on_progress("weights", 1, 2)
    on_progress("weights", 2, 2)
    match config.served_model_name:
        case "refuse":
            raise ConfigError("max_rank: got 96, allowed: 1 to 64", param="max_rank")
        case "crash":
            print("about to crash", file=sys.stderr)
            raise FileNotFoundError("model.safetensors")
        case "damaged":
            raise InvalidCheckpoint("rope_theta: got -1, allowed: above 0", field="rope_theta")
        case "exit":
            print("last words", file=sys.stderr, flush=True)
            os._exit(7)
        case "slow":
            time.sleep(60)
    info = {
        "model_id": "fake", "model_path": config.model, "max_model_len": MAX_MODEL_LEN,
        "vocab_size": VOCAB_SIZE, "eos_token_ids": [EOS], "bos_token_id": 256, "max_rank": 64,
        "dtype": "float32", "kernels": "xla", "device": "cpu", "num_pages": 8, "page_size": 16,
        "num_programs": 2, "startup_s": 0.1,
    }  # fmt: skip
    return FakeCore(config), info


@dataclasses.dataclass
class _Running:
    message: Generate
    num_out: int = 0


class FakeCore:
    """One token a turn for every choice of every request."""

    def __init__(self, config: EngineConfig) -> None:
        self._inbox: queue.SimpleQueue[ToEngine] = queue.SimpleQueue()
        self._running: dict[str, _Running] = {}
        self._adapters: dict[str, AdapterInfo] = {}
        self._drains: list[int] = []
        self._max_num_waiting = min(
            config.max_num_waiting, config.tenant_max_waiting or config.max_num_waiting
        )
        self.received: list[ToEngine] = []  # by tests in the same process
        self.peak = 0

    def submit(self, message: ToEngine) -> None:
        self._inbox.put(message)

    def run(self, emit: Callable[[list[FromEngine]], None]) -> None:
        last_beat = 0.0
        while True:
            if time.monotonic() - last_beat > 0.2:
                last_beat = time.monotonic()
                emit([Heartbeat(step=0, num_running=len(self._running), num_waiting=0)])
            try:
                message = self._inbox.get(timeout=0.0005 if self._running else 0.05)
            except queue.Empty:
                emit(self._step())
                continue
            self.received.append(message)
            if isinstance(message, Shutdown):
                return
            emit(self._handle(message))

    def _handle(self, message: ToEngine) -> list[FromEngine]:
        match message:
            case Generate():
                return self._start(message)
            case Abort():
                self._running.pop(message.request_id, None)
            case LoadAdapter() if message.path == "/nowhere":
                error = AdapterNotFound("path: got '/nowhere', allowed: a directory")
                return [Reply(call_id=message.call_id, error=error.to_wire())]
            case LoadAdapter():
                info = _adapter_info(message)
                self._adapters[message.adapter_id] = info
                return [Reply(call_id=message.call_id, value=dataclasses.asdict(info))]
            case UnloadAdapter():
                self._adapters.pop(message.adapter_id, None)
                return [Reply(call_id=message.call_id)]
            case ListAdapters():
                listed = [dataclasses.asdict(info) for info in self._adapters.values()]
                return [Reply(call_id=message.call_id, value=listed)]
            case GetStats():
                stats = {"num_running": len(self._running), "peak": self.peak, "pid": os.getpid()}
                return [Reply(call_id=message.call_id, value=stats)]
            case Drain():
                self._drains.append(message.call_id)
        return []

    def _start(self, message: Generate) -> list[FromEngine]:
        match message.adapter_id:
            case "missing":
                error = AdapterNotFound("model: got 'missing', allowed: fake", param="model")
                return [RequestFailed(request_id=message.request_id, error=error.to_wire())]
            case "raise":
                raise RuntimeError("the device is on fire")
            case "exit":
                print("segmentation fault, nearly", file=sys.stderr, flush=True)
                os._exit(9)
            case "freeze":
                os.kill(os.getpid(), signal.SIGSTOP)
            case "hang":
                time.sleep(3600)
            case "nonsense":
                return None  # type: ignore[return-value]
            case "bad index":
                return [TokenOutput(request_id=message.request_id, index=99, token_ids=[65])]
        if len(self._running) >= self._max_num_waiting:
            error = QueueFull("too many requests are waiting", retry_after_s=1.0)
            return [RequestFailed(request_id=message.request_id, error=error.to_wire())]
        self._running[message.request_id] = _Running(message)
        self.peak = max(self.peak, len(self._running))
        return []

    def _step(self) -> list[FromEngine]:
        out: list[FromEngine] = []
        for request_id, running in list(self._running.items()):
            out += self._advance(request_id, running)
        if not self._running:
            out += [Reply(call_id=call_id) for call_id in self._drains]
            self._drains.clear()
        return out

    def _advance(self, request_id: str, running: _Running) -> list[FromEngine]:
        message, params = running.message, running.message.params
        token = answer_token(message.prompt_token_ids, message.adapter_id, running.num_out)
        running.num_out += 1
        is_eos = token == EOS and not params["ignore_eos"]
        finish = "stop" if is_eos else None
        if finish is None and running.num_out >= params["max_tokens"]:
            finish = "length"
        if finish is not None:
            del self._running[request_id]
        logprobs = [[token, -0.5, [[token, -0.5], [1, float("-inf")]][: params["logprobs"]]]]
        return [
            TokenOutput(
                request_id=request_id,
                index=index,
                token_ids=[] if is_eos else [token],
                logprobs=None if params["logprobs"] is None or is_eos else logprobs,
                finish_reason=finish,
                stop_token_id=EOS if is_eos else None,
                num_prompt_tokens=len(message.prompt_token_ids),
                adapter_version=VERSION if message.adapter_id else None,
            )
            for index in range(params["n"])
        ]


def answer_token(prompt: list[int], adapter_id: str | None, place: int) -> int:
    """The whole model."""
    shift = int(adapter_id.removeprefix("shift-")) if adapter_id else 0
    token = prompt[place % len(prompt)]
    return token if token >= 256 else (token + shift) % 256


def _adapter_info(message: LoadAdapter) -> AdapterInfo:
    return AdapterInfo(
        adapter_id=message.adapter_id, path=message.path, version=VERSION, rank=8, num_pages=2,
        num_bytes=4096, state="on_host", pinned=message.pinned, num_leases=0, loaded_at=1.5,
    )  # fmt: skip


# --- tokenizers ----------------------------------------------------------------------------------


def byte_alphabet() -> list[str]:
    """Byte -> its character in byte-level vocabularies, learnt from the library itself."""
    pre = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    chars: list[str] = [""] * 256
    for code in [*range(0x80), *range(0x80, 0x800), 0x800, 0x1000, *range(0x3000, 0x10000, 0x1000)]:
        if 0xD800 <= code < 0xE000:
            continue
        _fill(chars, pre, chr(code))
    for code in range(0x10000, 0x110000, 0x10000):
        _fill(chars, pre, chr(code))
    free = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - set(chars))
    never_in_utf8 = [byte for byte in range(256) if not chars[byte]]
    for byte, char in zip(never_in_utf8, sorted(free, key=ord), strict=True):
        chars[byte] = char
    return chars


def _fill(chars: list[str], pre: Any, text: str) -> None:
    spelled = pre.pre_tokenize_str(text)[0][0]
    for byte, char in zip(text.encode(), spelled, strict=True):
        chars[byte] = char


def byte_level(*, adds_bos: bool = False, merges: tuple[bytes, ...] = ()) -> str:
    """tokenizer.json of byte-level BPE: id b is byte b, then "<s>", "</s>", merges of two."""
    chars = byte_alphabet()
    vocab = {char: byte for byte, char in enumerate(chars)}
    vocab |= {"<s>": 256, "</s>": 257}
    pairs = [tuple(chars[b] for b in merge) for merge in merges]
    vocab |= {"".join(pair): 258 + n for n, pair in enumerate(pairs)}
    made = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=pairs))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<s>", "</s>"])
    if adds_bos:
        made.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 256)]
        )
    return str(made.to_str())


def sentencepiece_like() -> str:
    """tokenizer.json as Llama 2 has it: id b is "<0xNN>", 256 "<s>", 257 "</s>", then pieces."""
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"<s>": 256, "</s>": 257}
    for piece in ["▁", *"helowrd", "é", "▁h", "he", "▁w", "wo", "▁he"]:
        vocab[piece] = len(vocab)
    merges = [("▁", "h"), ("h", "e"), ("▁", "w"), ("w", "o"), ("▁h", "e")]
    made = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True))
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    made.add_special_tokens(["<s>", "</s>"])
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 256)]
    )
    return str(made.to_str())


def word_pieces() -> str:
    """tokenizer.json whose decoder is none of the two kinds above."""
    words = ["[UNK]", "hello", "world", "##s", "un", "##do", "##ne", "!", "é", "\ufffd"]
    made = tokenizers.Tokenizer(
        models.WordPiece(vocab={w: i for i, w in enumerate(words)}, unk_token="[UNK]")
    )
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.decoder = decoders.WordPiece()
    made.add_special_tokens(["[UNK]"])
    return str(made.to_str())


def write_model(directory: Path, tokenizer_json: str | None = None) -> str:
    """A model directory as far as the frontend looks into one."""
    text = byte_level() if tokenizer_json is None else tokenizer_json
    (directory / "tokenizer.json").write_text(text, encoding="utf-8")
    return str(directory)
