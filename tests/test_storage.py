"""Where files are looked for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ldm_cli.errors import OutputError, StorageError
from ldm_cli.storage import TEMPORARY_PREFIX, append_text, expand_home, user_cache, write_whole
from ldm_cli.training.run_lock import RunLock


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("~/.cache", "/home/me/.cache/ldm"),
        ("~", "/home/me/ldm"),
        ("/var/cache", "/var/cache/ldm"),
        ("", "/home/me/.cache/ldm"),
    ],
)
def test_the_cache_is_below_the_folder_that_the_environment_names(
    given: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("XDG_CACHE_HOME", given)
    assert user_cache() == Path(expected)


def test_the_home_of_another_user_is_expanded() -> None:
    assert expand_home("~root/x") == str(Path("~root").expanduser() / "x")
    assert expand_home("~nobody-here/x") == "~nobody-here/x"


def test_what_is_written_in_place_follows_no_link(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "log.txt").symlink_to(victim)
    os.mkfifo(tmp_path / "fifo")
    for name, kind in (("log.txt", "a link"), ("fifo", "a FIFO"), ("none/log.txt", "No such file")):
        with pytest.raises((OutputError, StorageError), match=kind):
            append_text(tmp_path / name, "more")
    with pytest.raises(OutputError, match="a link"):
        RunLock(tmp_path / "log.txt").acquire(lambda message: None)
    assert victim.read_text() == "precious"


def test_a_link_in_the_place_of_a_temporary_file_is_removed_and_its_file_is_as_it_was(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / f"{TEMPORARY_PREFIX}a").symlink_to(victim)
    write_whole(tmp_path / "a", "new")
    assert (victim.read_text(), (tmp_path / "a").read_text()) == ("precious", "new")


def test_lines_are_added_at_the_end(tmp_path: Path) -> None:
    append_text(tmp_path / "a", "é\n")
    append_text(tmp_path / "a", "b\n")
    assert (tmp_path / "a").read_text(encoding="utf-8") == "é\nb\n"
