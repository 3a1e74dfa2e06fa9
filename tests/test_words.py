"""The spell check of `make lint`: it passes here, and fails on slips and on the words that the project avoids."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

from tests.conftest import REPOSITORY

WORDS = [line.partition("->")[0] for line in (REPOSITORY / "docs/words.txt").read_text(encoding="utf-8").splitlines()]


def codespell(*arguments: str) -> str:
    """What codespell complains of, with the settings of the project."""
    command = [sys.executable, "-m", "codespell_lib", *arguments]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True).stdout


def lint_arguments() -> list[list[str]]:
    """The arguments of codespell in the Makefile."""
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    (written,) = re.findall(r"^WRITTEN := (.*)$", makefile, re.MULTILINE)
    calls = re.findall(r"^\t\$\(BIN\)/codespell(.*)$", makefile, re.MULTILINE)
    return [shlex.split(call.replace("$(WRITTEN)", written)) for call in calls]


def test_the_text_of_the_project_has_no_slip_and_no_word_it_avoids() -> None:
    calls = lint_arguments()
    assert len(calls) == 2
    assert [codespell(*arguments) for arguments in calls] == ["", ""]


def test_a_slip_and_every_word_that_is_avoided_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    slip = "Rec" + "ieve"  # in two parts: the spell check reads this file, too
    page.write_text(f"{slip} them.\n" + "".join(f"A {word} here.\n" for word in WORDS))
    assert f"{slip} ==> Receive" in codespell(str(page))
    found = codespell("--dictionary", "docs/words.txt", str(page))
    assert [word for word in WORDS if f": {word} ==>" not in found] == []
    assert {"life", "lives", "parcel", "canvas"} <= set(WORDS)
