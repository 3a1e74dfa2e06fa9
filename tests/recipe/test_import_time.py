"""Recipes are read, checked and refused without the seconds that torch takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from ldm_cli.recipe.shipped import shipped_recipes
from tests.cli.test_startup import HEAVY
from tests.conftest import Ldm

_IMPORT = "import time:"
_HEAVY = HEAVY - {"pydantic", "yaml"}
RECIPE = """\
command: train-vae
name: tiny
data: {shards: a.tar, image_size: 16}
vae: {}
train: {steps: 1, batch_size: 1}
"""


def run(ldm: Ldm, *arguments: str) -> tuple[int, list[str], set[str]]:
    """Exit code, what was said on stderr, and which of the heavy libraries were imported."""
    result = ldm(*arguments, env={"PYTHONPROFILEIMPORTTIME": "1"})
    imports = [line for line in result.stderr.splitlines() if line.startswith(_IMPORT)]
    words = [line for line in result.stderr.splitlines() if not line.startswith(_IMPORT)]
    libraries = {line.rpartition("|")[2].strip().partition(".")[0] for line in imports}
    assert "ldm_cli" in libraries
    return result.returncode, words, libraries & _HEAVY


@pytest.mark.parametrize("text", ["a: &a [x]\nb: *a\n", pytest.param("a: [", marks=pytest.mark.exhaustive)])
def test_a_text_that_is_no_recipe_is_refused_without_torch(ldm: Ldm, tmp_path: Path, text: str) -> None:
    (tmp_path / "r.yaml").write_text(text)
    code, words, heavy = run(ldm, "train-vae", "r.yaml")
    assert (code, heavy) == (78, set())
    assert "r.yaml:" in words[0]


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("train:", "trian:", "r.yaml:5:1: trian: unknown key (did you mean 'train'?)"),
        (
            "vae: {}",
            "vae: {norm_num_groups: 24}",
            "r.yaml:4:24: vae.norm_num_groups: norm_num_groups=24 does not divide 64 of block_out_channels",
        ),
        (
            "vae: {}",
            "vae: {}\nloss: {adversarial_weight: 1.0}",
            "r.yaml:3:35: data.image_size=16 is too small for loss.discriminator_layers=3, which need 24 px",
        ),
    ],
)
def test_a_fault_in_a_recipe_is_named_without_torch(ldm: Ldm, tmp_path: Path, old: str, new: str, problem: str) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE.replace(old, new))
    code, words, heavy = run(ldm, "train-vae", "r.yaml")
    assert (code, heavy) == (78, set())
    assert words == [f"ldm: error: {problem} [E-RECIPE]"]


@pytest.mark.parametrize(
    ("command", "recipe"),
    [
        ("train-unet", "demo/unet"),
        ("sample", "demo/sample.yaml"),
        pytest.param("train-clip", "demo/clip", marks=pytest.mark.exhaustive),
        pytest.param("eval", "demo/eval", marks=pytest.mark.exhaustive),
    ],
)
def test_an_unknown_key_on_the_command_line_is_refused_without_torch(ldm: Ldm, command: str, recipe: str) -> None:
    code, words, heavy = run(ldm, command, recipe, "unknown.field=1")
    assert (code, heavy) == (78, set())
    assert words[-1].startswith("ldm: error: override 'unknown.field=1': unknown: unknown key")


@pytest.mark.parametrize("arguments", [["check", *shipped_recipes()], ["show", "demo/clip", "--resolved"], ["schema"]])
def test_sound_recipes_are_checked_and_shown_without_torch(ldm: Ldm, arguments: list[str]) -> None:
    assert run(ldm, "recipe", *arguments) == (0, [], set())
