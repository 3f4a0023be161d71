"""Which adapters an engine starts with, and the rank that they need. Looks at directories only."""

from __future__ import annotations

from pathlib import Path

from checkpoints.errors import CheckpointError
from checkpoints.peft_adapter import WEIGHTS_FILE
from checkpoints.safetensors_file import SafetensorsFile
from sloraj.config import EngineConfig
from sloraj.errors import ConfigError

DEFAULT_MAX_RANK, MAX_RANK = 64, 256


def find_adapters(config: EngineConfig) -> list[tuple[str, str]]:
    """(adapter_id, path) of `adapters`, and of each adapter directory in `adapters_dir`.

    Raises ConfigError when a name comes twice or the directory is missing.
    """
    found = list(config.adapters)
    if config.adapters_dir is not None:
        if not Path(config.adapters_dir).is_dir():
            raise ConfigError(
                f"adapters_dir: got {config.adapters_dir!r}, allowed: an existing directory",
                param="adapters_dir",
            )
        found += [
            (path.name, str(path))
            for path in sorted(Path(config.adapters_dir).iterdir())
            if (path / "adapter_config.json").is_file()
        ]
    names = [name for name, _ in found]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"adapters: {name!r} is given twice", param="adapters")
    return found


def largest_rank(adapters: list[tuple[str, str]]) -> int:
    """The rank to compile for: that of the largest adapter given, and DEFAULT_MAX_RANK at least.

    Unreadable files count nothing here; loading them says what is wrong.
    """
    ranks = [DEFAULT_MAX_RANK]
    for _, path in adapters:
        try:
            with SafetensorsFile(str(Path(path) / WEIGHTS_FILE)) as file:
                ranks += [file.shape(name)[0] for name in file.names if "lora_A" in name]
        except CheckpointError:
            continue
    return min(max(ranks), MAX_RANK)
