"""Opening and reading files that nobody has vouched for.

Every reader of this package goes through `open_regular`: it never blocks (a FIFO is refused, not
waited for), never opens a device, and, when a root is given, never leaves it. Errors are those of
`checkpoints.errors`.
"""

from __future__ import annotations

import os
import stat

from checkpoints.errors import CheckpointNotFound, InvalidCheckpoint

MAX_CONFIG_BYTES = 4 << 20  # far above any config.json, far below what would hurt

_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a character device"),
    (stat.S_ISBLK, "a block device"),
)


def open_regular(path: str, *, root: str | None = None) -> int:
    """Open a regular file for reading and return its descriptor, which the caller closes.

    Args:   path: the file. root: if given, the directory that the file must really lie in, symbolic
            links followed; a file with a second hard link is refused too, because its other name
            may lie anywhere.
    Raises: CheckpointNotFound: no such file. InvalidCheckpoint: not a regular file, outside root,
            or not readable.
    """
    try:
        resolved = os.path.realpath(path, strict=True)
        before = os.stat(resolved)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointNotFound(f"{path}: no such file") from error
    except (OSError, ValueError) as error:  # link loop, name too long, NUL in the name
        raise InvalidCheckpoint(f"{path!r}: cannot be resolved: {error}") from error
    _check_kind(path, before)
    if root is not None:
        _check_inside(path, resolved, before, root)
    try:
        descriptor = os.open(resolved, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise InvalidCheckpoint(f"{path}: cannot be opened: {error.strerror}") from error
    after = os.fstat(descriptor)
    if (after.st_dev, after.st_ino) != (before.st_dev, before.st_ino):
        os.close(descriptor)
        raise InvalidCheckpoint(f"{path}: was replaced while it was being opened")
    return descriptor


def check_directory(path: str, *, root: str | None = None) -> str:
    """The resolved path of a directory. Raises as `open_regular` does."""
    try:
        resolved = os.path.realpath(path, strict=True)
        found = os.stat(resolved)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointNotFound(f"{path}: no such directory") from error
    except (OSError, ValueError) as error:
        raise InvalidCheckpoint(f"{path!r}: cannot be resolved: {error}") from error
    if not stat.S_ISDIR(found.st_mode):
        raise InvalidCheckpoint(f"{path}: is not a directory")
    if root is not None and not is_inside(resolved, root):
        raise InvalidCheckpoint(f"{path}: lies outside the allowed directory {root}")
    return resolved


def is_inside(resolved: str, root: str) -> bool:
    """Whether an already resolved path is `root` or lies below it."""
    real_root = os.path.realpath(root)
    return os.path.commonpath([resolved, real_root]) == real_root


def read_exactly(descriptor: int, into: memoryview, offset: int, path: str) -> None:
    """Fill `into` from `offset`. Raises InvalidCheckpoint if the file ends before that."""
    done = 0
    while done < len(into):
        try:
            count = os.preadv(descriptor, [into[done:]], offset + done)
        except OSError as error:
            raise InvalidCheckpoint(f"{path}: cannot be read: {error.strerror}") from error
        if count == 0:
            raise InvalidCheckpoint(f"{path}: ended at byte {offset + done} while being read")
        done += count


def read_small_file(
    path: str, *, root: str | None = None, max_bytes: int = MAX_CONFIG_BYTES
) -> bytes:
    """Whole contents of a file. Raises as `open_regular`, or above `max_bytes`."""
    descriptor = open_regular(path, root=root)
    try:
        size = os.fstat(descriptor).st_size
        if size > max_bytes:
            raise InvalidCheckpoint(f"{path}: is {size} bytes, at most {max_bytes} are read")
        contents = bytearray(size)
        read_exactly(descriptor, memoryview(contents), 0, path)
        return bytes(contents)
    finally:
        os.close(descriptor)


def _check_kind(path: str, found: os.stat_result) -> None:
    if stat.S_ISREG(found.st_mode):
        return
    kind = next((name for test, name in _KINDS if test(found.st_mode)), "a special file")
    raise InvalidCheckpoint(f"{path}: is {kind}, a regular file is needed")


def _check_inside(path: str, resolved: str, found: os.stat_result, root: str) -> None:
    if not is_inside(resolved, root):
        raise InvalidCheckpoint(f"{path}: lies outside the allowed directory {root}")
    if found.st_nlink > 1:
        raise InvalidCheckpoint(
            f"{path}: has {found.st_nlink} hard links, so it may also lie outside {root}; copy the "
            "file"
        )
