"""What is no YAML is refused without the seconds that torch takes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY


@pytest.mark.parametrize("text", ["a: &a [x]\nb: *a\n", "- a\n", "a: [", "name: x\nname: y\n", "a: !!python/none x\n"])
def test_a_text_that_is_no_recipe_is_refused_without_torch(tmp_path: Path, text: str) -> None:
    (tmp_path / "r.yaml").write_text(text)
    code = f"""
import sys
from ldm_cli.cli.app import run
assert run(["train-vae", {str(tmp_path / "r.yaml")!r}]) == 78
print("torch" in sys.modules)
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert result.stdout == "False\n"
    assert f"{tmp_path / 'r.yaml'}:" in result.stderr
