"""One file per command: build the models, wire the data, say what a step is, run."""

from __future__ import annotations

import importlib
from types import ModuleType


def trainer_stage(command: str) -> ModuleType:
    """The stage of a trainer's command, imported: `train-clip` → `stages/train_clip.py`.

    It has `run(recipe, options, reporter)` and `parameters(recipe, notes)`, see `support/model_sizes.py`.
    """
    return importlib.import_module(f"{__name__}.{command.replace('-', '_')}")
