"""Input files: what is read, and what is refused before a byte of it is waited for."""

from __future__ import annotations

import os
import tracemalloc
from pathlib import Path

import pytest

from ldm_cli.errors import CheckpointError, DataError, InputNotFoundError, StorageError
from ldm_cli.inputs import read_input


def test_a_file_is_read_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"\0text\xff")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert read_input(tmp_path / "a") == read_input(tmp_path / "link") == b"\0text\xff"


def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to(tmp_path / "fifo")
    for path, kind in (
        (tmp_path / "fifo", "a FIFO"),
        (tmp_path / "link", "a FIFO"),
        (tmp_path, "a folder"),
        (Path("/dev/zero"), "a device"),
    ):
        with pytest.raises(InputNotFoundError, match=f"it is {kind}, no regular file; look again"):
            read_input(path, remedy="look again")


def test_a_file_that_is_missing_or_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("none", "none/below", "nul\0"):
        with pytest.raises(InputNotFoundError, match=r"none|nul"):
            read_input(tmp_path / name)
    for error, expected in (
        (PermissionError(13, "Permission denied"), InputNotFoundError),
        (OSError(5, "EIO"), StorageError),
    ):

        def fail(*arguments: object, error: OSError = error) -> int:
            raise error

        monkeypatch.setattr(os, "open", fail)
        with pytest.raises(expected, match=r"cannot read '.*secret'"):
            read_input(tmp_path / "secret")


def test_a_larger_file_than_is_sensible_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "large").open("wb") as file:
        file.truncate(2**40)
    for kind in (DataError, CheckpointError):
        with pytest.raises(kind, match="1 TiB are more than the 16 MiB it may have"):
            read_input(tmp_path / "large", too_large=kind)


def test_a_file_that_says_it_is_empty_is_read_to_its_end_within_the_limit() -> None:
    status = Path("/proc/self/status")
    assert status.stat().st_size == 0
    assert b"VmRSS" in read_input(status)
    with pytest.raises(DataError, match="more than the 9 bytes it may have"):
        read_input(status, 9)
    with pytest.raises(StorageError, match="Input/output error"):
        read_input(Path("/proc/self/mem"))


def test_a_link_is_refused_where_it_could_lead_anywhere(tmp_path: Path) -> None:
    (tmp_path / "words.txt").symlink_to("/etc/passwd")
    with pytest.raises(InputNotFoundError, match=r"words\.txt"):
        read_input(tmp_path / "words.txt", follow=False)


def test_a_small_file_takes_no_more_memory_than_it_has_bytes(tmp_path: Path) -> None:
    (tmp_path / "small").write_bytes(b"small")
    tracemalloc.start()
    assert read_input(tmp_path / "small", 2**31) == b"small"
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20
