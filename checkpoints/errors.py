"""Errors of the file readers.

CheckpointError            a file or directory cannot be used; the message says why
├── CheckpointNotFound     the directory or a required file is missing
├── InvalidCheckpoint      a file is damaged, or disagrees with itself or with the base model
└── UnsupportedCheckpoint  the file is sound, but asks for something that is not implemented
"""

from __future__ import annotations


class CheckpointError(Exception):
    """A checkpoint or adapter cannot be used. `field` names the config field or tensor at fault."""

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class CheckpointNotFound(CheckpointError):
    """The directory, or a file that it must hold, is missing."""


class InvalidCheckpoint(CheckpointError):
    """A file is damaged, or disagrees with itself or with the base model."""


class UnsupportedCheckpoint(CheckpointError):
    """The file is sound but asks for something that is not implemented."""
