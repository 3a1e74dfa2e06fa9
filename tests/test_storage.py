"""Where files are looked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from ldm_cli.storage import expand_home, user_cache


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
