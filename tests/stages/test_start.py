"""A training starts without what it does not use."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import REPOSITORY

from .tiny import clip_recipe, unet_recipe, vae_recipe

_CODE = """
import json, sys
from pathlib import Path
from tests.stages.tiny import trained
for number, recipe in enumerate(json.loads(sys.argv[1])):
    trained(recipe, Path(sys.argv[2], str(number)))
print(*sorted({"transformers", "diffusers", "webdataset", "matplotlib"} & set(sys.modules)))
"""


@pytest.mark.slow
def test_libraries_that_are_not_used_are_not_imported(
    scenes: Path, clip_run: Path, vae_run: Path, tmp_path: Path
) -> None:
    train: dict[str, Any] = {"steps": 2, "optimizer": "muon"}  # and AdamW, for what Muon is not meant for
    denoiser = unet_recipe(scenes, clip_run / "model", vae_run / "model", **train)
    recipes = json.dumps([clip_recipe(scenes, **train), vae_recipe(scenes, **train), denoiser])
    command = [sys.executable, "-c", _CODE, recipes, str(tmp_path)]
    imported = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    assert imported.split() == []
