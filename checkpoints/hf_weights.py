"""Weights of a Hugging Face directory, read one by one from the memory map.

Names and shapes are checked in full on opening. Nothing is loaded on opening, so a model of any
size streams to the device with no second copy on the host.
"""

from __future__ import annotations

import contextlib
import os
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from checkpoints.config_fields import ConfigFields, read_fields, shown
from checkpoints.errors import CheckpointNotFound, InvalidCheckpoint, UnsupportedCheckpoint
from checkpoints.file_access import check_directory
from checkpoints.model_config import TARGET_MODULES, ModelConfig
from checkpoints.safetensors_file import SafetensorsFile

EMBEDDING = "model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"
_FLOATS = ("float32", "float16", "bfloat16")
_MAX_SHARDS = 1000
_COMPARED_ROWS = 4096


def module_path(layer: int, module: str) -> str:
    """Path of a target module inside the model, e.g. `model.layers.0.self_attn.q_proj`."""
    parent = "mlp" if module in ("gate_proj", "up_proj", "down_proj") else "self_attn"
    return f"model.layers.{layer}.{parent}.{module}"


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor that a checkpoint of this model holds.

    Linear weights are [out, in]. `lm_head.weight` is listed only if it is not tied to the
    embedding.
    """
    hidden = (config.hidden_size,)
    found: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, config.hidden_size)}
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}"
        found[f"{prefix}.input_layernorm.weight"] = hidden
        found[f"{prefix}.post_attention_layernorm.weight"] = hidden
        for module in TARGET_MODULES:
            size_in, size_out = config.module_shape(module)
            found[f"{module_path(layer, module)}.weight"] = (size_out, size_in)
            if _has_bias(config, module):
                found[f"{module_path(layer, module)}.bias"] = (size_out,)
        if config.qk_norm:
            found[f"{prefix}.self_attn.q_norm.weight"] = (config.head_dim,)
            found[f"{prefix}.self_attn.k_norm.weight"] = (config.head_dim,)
    found["model.norm.weight"] = hidden
    if not config.tie_word_embeddings:
        found[LM_HEAD] = (config.vocab_size, config.hidden_size)
    return found


def _has_bias(config: ModelConfig, module: str) -> bool:
    if module in ("q_proj", "k_proj", "v_proj"):
        return config.qkv_bias
    return config.o_bias if module == "o_proj" else config.mlp_bias


class HfWeights:
    """The checked tensors of one checkpoint (context manager). Make it with `open_weights`."""

    def __init__(
        self, path: str, files: dict[str, SafetensorsFile], stack: contextlib.ExitStack
    ) -> None:
        self.path = path
        self._files = files  # tensor name -> the file that holds it
        self._stack = stack

    def __enter__(self) -> HfWeights:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the files; views already read stay valid."""
        self._stack.close()

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._files)

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(file.num_bytes(name) for name, file in self._files.items())

    def shape(self, name: str) -> tuple[int, ...]:
        return self._file(name).shape(name)

    def dtype(self, name: str) -> np.dtype[Any]:
        return self._file(name).dtype(name)

    def read(self, name: str) -> NDArray[Any]:
        """A read-only view on the memory map; no copy."""
        return self._file(name).read(name)

    def _file(self, name: str) -> SafetensorsFile:
        if name not in self._files:
            raise InvalidCheckpoint(f"{self.path}: holds no tensor {name!r}", field=name)
        return self._files[name]


def open_weights(path: str, config: ModelConfig, *, root: str | None = None) -> HfWeights:
    """Open the safetensors of directory `path` and check them against `config`.

    Returns: weights whose `names` are exactly those of `expected_tensors(config)`.
    Raises:  CheckpointNotFound: no weights. InvalidCheckpoint: a tensor is missing, unexpected, or
             of the wrong shape, or a tied lm_head differs from the embedding.
             UnsupportedCheckpoint: only `.bin` files, or tensors that are not floats.
    """
    check_directory(path, root=root)
    with contextlib.ExitStack() as stack:
        files = _open_files(path, root, stack)
        expected = expected_tensors(config)
        _check_tensors(path, files, expected)
        if config.tie_word_embeddings and LM_HEAD in files:
            _check_tied(path, files[EMBEDDING], files[LM_HEAD])
        return HfWeights(path, {name: files[name] for name in expected}, stack.pop_all())


def _open_files(
    path: str, root: str | None, stack: contextlib.ExitStack
) -> dict[str, SafetensorsFile]:
    single = os.path.join(path, "model.safetensors")
    index = os.path.join(path, "model.safetensors.index.json")
    if os.path.lexists(single):
        file = stack.enter_context(SafetensorsFile(single, root=root))
        return dict.fromkeys(file.names, file)
    if os.path.lexists(index):
        return _open_shards(path, read_fields(index, root=root), root, stack)
    pickles = [name for name in sorted(os.listdir(path)) if name.endswith((".bin", ".pt", ".pth"))]
    if pickles:
        raise UnsupportedCheckpoint(
            f"{path}: only pickled weights ({pickles[0]}), which are never opened; convert them "
            "with "
            "`AutoModelForCausalLM.from_pretrained(p).save_pretrained(out)`"
        )
    raise CheckpointNotFound(
        f"{path}: holds neither model.safetensors nor model.safetensors.index.json"
    )


def _open_shards(
    path: str, index: ConfigFields, root: str | None, stack: contextlib.ExitStack
) -> dict[str, SafetensorsFile]:
    weight_map = index.mapping("weight_map")
    for name, shard in weight_map.items():
        if (
            not isinstance(shard, str)
            or os.path.basename(shard) != shard
            or not shard.endswith(".safetensors")
        ):
            raise InvalidCheckpoint(
                f"{index.where}: weight_map[{shown(name)}] is {shown(shard)}, allowed is a "
                ".safetensors file name",
                field="weight_map",
            )
    shards = sorted(set(weight_map.values()))
    if not 1 <= len(shards) <= _MAX_SHARDS:
        raise InvalidCheckpoint(
            f"{index.where}: weight_map names {len(shards)} files, allowed are 1 to {_MAX_SHARDS}",
            field="weight_map",
        )
    found: dict[str, SafetensorsFile] = {}
    for shard in shards:
        file = stack.enter_context(SafetensorsFile(os.path.join(path, shard), root=root))
        for name in file.names:
            if weight_map.get(name) != shard:
                raise InvalidCheckpoint(
                    f"{file.path}: holds {shown(name)}, which the index places in "
                    f"{weight_map.get(name)}",
                    field=name,
                )
            found[name] = file
    for name, shard in weight_map.items():
        if name not in found:
            raise InvalidCheckpoint(
                f"{index.where}: {shard} does not hold {shown(name)}", field=name
            )
    return found


def _check_tensors(
    path: str, files: dict[str, SafetensorsFile], expected: dict[str, tuple[int, ...]]
) -> None:
    missing = [name for name in expected if name not in files]
    if missing:
        raise InvalidCheckpoint(
            f"{path}: {len(missing)} tensors are missing, the first is {missing[0]}",
            field=missing[0],
        )
    # Old exports carry the rotary frequencies, which follow from the config.
    allowed = expected.keys() | {LM_HEAD}
    extra = [n for n in files if n not in allowed and not n.endswith("rotary_emb.inv_freq")]
    if extra:
        raise InvalidCheckpoint(
            f"{path}: {len(extra)} tensors are not part of this model, the first is "
            f"{shown(extra[0])}",
            field=extra[0],
        )
    for name, shape in expected.items():
        if files[name].shape(name) != shape:
            raise InvalidCheckpoint(
                f"{path}: {name} is {list(files[name].shape(name))}, the config asks for "
                f"{list(shape)}",
                field=name,
            )
        if files[name].dtype(name).name not in _FLOATS:
            raise UnsupportedCheckpoint(
                f"{path}: {name} is stored as {files[name].dtype(name).name}, supported are "
                f"{', '.join(_FLOATS)}",
                field=name,
            )


def _check_tied(path: str, embedding_file: SafetensorsFile, head_file: SafetensorsFile) -> None:
    embedding, head = embedding_file.read(EMBEDDING), head_file.read(LM_HEAD)
    same = embedding.shape == head.shape and embedding.dtype == head.dtype
    for start in range(0, len(embedding) if same else 0, _COMPARED_ROWS):
        rows = slice(
            start, start + _COMPARED_ROWS
        )  # in blocks: the comparison of a whole table allocates
        same = same and embedding[rows].tobytes() == head[rows].tobytes()
    if not same:
        raise InvalidCheckpoint(
            f"{path}: tie_word_embeddings is true, but {LM_HEAD} differs from {EMBEDDING}",
            field="tie_word_embeddings",
        )
