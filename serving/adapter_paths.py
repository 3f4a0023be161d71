"""Where adapters may be loaded from over HTTP: inside configured roots, after following every
link.
"""

from __future__ import annotations

import stat
from collections.abc import Sequence
from pathlib import Path

from serving.errors import shown
from sloraj.errors import AdapterFilesNotFound, AdapterLoadError, InvalidRequest

_FILES = ("adapter_config.json", "adapter_model.safetensors")


class AdapterRoots:
    """The directories that clients may name adapters in. None given: clients may load nothing."""

    def __init__(self, roots: Sequence[str]) -> None:
        self._roots = [Path(root).resolve() for root in roots]

    def resolve(self, path: str) -> str:
        """The real directory `path` means, absolute or relative to a root. Reads no file's content.

        Raises InvalidRequest outside the roots (before saying whether anything is there),
        AdapterFilesNotFound where nothing is, AdapterLoadError for what is no directory of plain
        files.
        """
        if not self._roots:
            raise InvalidRequest(
                "lora_path: this server loads no adapters at run time; "
                "start it with --adapter-root DIR",
                param="lora_path",
            )
        inside = [real for root in self._roots if (real := self._within(root / path)) is not None]
        if not inside:
            raise InvalidRequest(
                f"lora_path: got {shown(path, 200)}, allowed: a directory inside an --adapter-root",
                param="lora_path",
            )
        real = next((candidate for candidate in inside if candidate.exists()), inside[0])
        if not real.exists():
            raise AdapterFilesNotFound(
                f"lora_path: {shown(path, 200)} does not exist", param="lora_path"
            )
        if not real.is_dir():
            raise AdapterLoadError(
                f"lora_path: {shown(path, 200)} is not a directory", param="lora_path"
            )
        for name in _FILES:
            self._check_file(real / name)
        return str(real)

    def _within(self, path: Path) -> Path | None:
        try:
            real = path.resolve()
        except (OSError, RuntimeError):  # a loop of links
            return None
        return real if any(real.is_relative_to(root) for root in self._roots) else None

    def _check_file(self, path: Path) -> None:
        """A missing file is the loader's to report; what is there must be a plain file of our
        own.
        """
        name = path.name
        if self._within(path) is None:
            raise AdapterLoadError(
                f"{name}: is a link out of every --adapter-root", param="lora_path"
            )
        try:
            found = path.stat()
        except OSError:
            return
        if not stat.S_ISREG(found.st_mode):
            raise AdapterLoadError(f"{name}: is not a regular file", param="lora_path")
        if found.st_nlink > 1:
            raise AdapterLoadError(
                f"{name}: has {found.st_nlink} hard links, so it may lie outside "
                "every --adapter-root too; load a copy",
                param="lora_path",
            )
