"""Nothing but a regular file inside the root is ever opened, and nothing makes the reader wait."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from checkpoints.errors import CheckpointNotFound, InvalidCheckpoint
from checkpoints.file_access import check_directory, open_regular, read_small_file

pytestmark = [pytest.mark.row(34), pytest.mark.timeout(20)]


def test_fifo_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    os.symlink("fifo", tmp_path / "link")
    for name in ("fifo", "link"):
        with pytest.raises(InvalidCheckpoint, match="is a FIFO"):
            open_regular(str(tmp_path / name))


def test_devices_and_sockets_are_refused_unopened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.symlink("/dev/zero", tmp_path / "zero")
    monkeypatch.chdir(tmp_path)  # socket paths are short
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket")
        monkeypatch.setattr(os, "open", None)  # any attempt to open fails the test
        with pytest.raises(InvalidCheckpoint, match="character device"):
            open_regular("/dev/zero")
        with pytest.raises(InvalidCheckpoint, match="character device"):
            open_regular(str(tmp_path / "zero"))
        with pytest.raises(InvalidCheckpoint, match="is a socket"):
            open_regular("socket")


def test_symbolic_links_are_followed_inside_the_root_only(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "a").mkdir(parents=True)
    (tmp_path / "outside").write_text("outside")
    (root / "inside").write_text("inside")
    os.symlink("../inside", root / "a" / "good")
    os.symlink("../../outside", root / "a" / "bad")
    os.symlink(tmp_path, root / "up")
    assert read_small_file(str(root / "a" / "good"), root=str(root)) == b"inside"
    for name in ("a/bad", "up/outside", "../outside", "a/../../outside"):
        with pytest.raises(InvalidCheckpoint, match="outside the allowed directory"):
            open_regular(str(root / name), root=str(root))
        assert read_small_file(str(root / name)) == b"outside"  # no root, no limit


def test_sibling_with_the_roots_name_as_prefix_is_outside(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "root-2").mkdir()
    (tmp_path / "root-2" / "file").write_text("x")
    with pytest.raises(InvalidCheckpoint, match="outside"):
        open_regular(str(tmp_path / "root-2" / "file"), root=str(tmp_path / "root"))
    with pytest.raises(InvalidCheckpoint, match="outside"):
        check_directory(str(tmp_path / "root-2"), root=str(tmp_path / "root"))


def test_hard_link_is_refused_under_a_root(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "outside").write_text("x")
    os.link(tmp_path / "outside", tmp_path / "root" / "file")
    with pytest.raises(InvalidCheckpoint, match="2 hard links"):
        open_regular(str(tmp_path / "root" / "file"), root=str(tmp_path / "root"))


def test_names_that_cannot_be_resolved_are_refused(tmp_path: Path) -> None:
    os.symlink("loop", tmp_path / "loop")
    os.symlink("nowhere", tmp_path / "dangling")
    for name in ("loop", "nul\0byte", "x" * 5000):
        with pytest.raises(InvalidCheckpoint, match="cannot be resolved"):
            open_regular(str(tmp_path / name))
        with pytest.raises(InvalidCheckpoint, match="cannot be resolved"):
            check_directory(str(tmp_path / name))
    for name in ("dangling", "missing", "missing/deeper"):
        with pytest.raises(CheckpointNotFound):
            open_regular(str(tmp_path / name))
        with pytest.raises(CheckpointNotFound):
            check_directory(str(tmp_path / name))


def test_file_as_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InvalidCheckpoint, match="is not a directory"):
        check_directory(str(tmp_path / "file"))
    with pytest.raises(CheckpointNotFound):
        open_regular(str(tmp_path / "file" / "below"))


@pytest.mark.row(26)
def test_size_is_checked_before_reading(tmp_path: Path) -> None:
    (tmp_path / "huge").touch()
    os.truncate(tmp_path / "huge", 1 << 30)  # sparse
    with pytest.raises(InvalidCheckpoint, match="is 1073741824 bytes, at most"):
        read_small_file(str(tmp_path / "huge"))
