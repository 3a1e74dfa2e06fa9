"""What the folder of a run, or of an evaluation, tells; a damaged file is named and left out."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldm_cli.errors import InputNotFoundError, LdmError
from ldm_cli.formats.json_file import read_json
from ldm_cli.stages.support.eval_result import RESULT_NAME
from ldm_cli.training.run_identity import flatten

_LOG_LINES = 30


@dataclass
class RunSummary:
    """A run folder as far as it can be read.

    Attributes:
        name: of the folder; the path where several have one name.
        state: `running`, `preempted`, `failed`, `finished`; `unknown` without status.json.
        progress: last step and number of steps, as words.
        figures: name → steps and numbers, finite ones only.
        recipe: every field by its dotted name.
        environment: versions and machine, by name.
        grids: step → grid of samples.
        evaluation: the file of its result, if the folder is that of an evaluation.
    """

    name: str
    folder: Path
    state: str = "unknown"
    progress: str = ""
    figures: dict[str, tuple[list[float], list[float]]] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    grids: dict[int, Path] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)
    evaluation: Path | None = None
    curves: list[Path] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


_FILES = ("status.json", "metrics.jsonl", "recipe.resolved.yaml", RESULT_NAME)


def read_run(folder: Path, name: str) -> RunSummary:
    """Read a folder of a training run or of an evaluation.

    Raises:
        InputNotFoundError: it is neither.
    """
    if not any((folder / file).is_file() for file in _FILES):
        raise InputNotFoundError(f"'{folder}' is no folder of a run", remedy="give runs/NAME, or a folder of ldm eval")
    run = RunSummary(name, folder)
    status = _json(run, "status.json")
    run.state = str(status.get("state", "unknown"))
    if "step" in status:
        run.progress = f"step {status['step']} of {status.get('steps', '?')}"
    if status.get("error") or status.get("reason"):
        run.progress += f": {status.get('error') or status.get('reason')}"
    run.recipe = flatten(_mapping(_json(run, "recipe.resolved.yaml").get("recipe")))
    run.environment = {name: value for name, value in _json(run, "env.json").items() if name != "models"}
    _read_metrics(run)
    run.grids = dict(sorted((_step(grid), grid) for grid in folder.glob("samples/step-*/grid.png") if _step(grid) >= 0))
    if (folder / "log.txt").is_file():
        run.log = (folder / "log.txt").read_text(encoding="utf-8", errors="replace").splitlines()[-_LOG_LINES:]
    if (folder / RESULT_NAME).is_file():
        run.evaluation = folder / RESULT_NAME
        run.curves = sorted(folder.glob("*.svg"))
        run.state = "evaluation" if run.state == "unknown" else run.state
    return run


def _json(run: RunSummary, name: str) -> dict[str, Any]:
    try:
        return read_json(run.folder / name)
    except InputNotFoundError:
        return {}
    except LdmError as error:
        run.problems.append(str(error.cause or error.what) + f" ({name})")
        return {}


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _read_metrics(run: RunSummary) -> None:
    """Every readable line of metrics.jsonl, by figure."""
    file, damaged = run.folder / "metrics.jsonl", 0
    if not file.is_file():
        return
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            values = json.loads(line)
            step = int(values.pop("step"))
        except (ValueError, KeyError, TypeError, AttributeError):
            damaged += 1
            continue
        for name, value in values.items():
            if isinstance(value, int | float) and math.isfinite(value):
                steps, numbers = run.figures.setdefault(name, ([], []))
                steps.append(step)
                numbers.append(value)
    if damaged:
        run.problems.append(f"{damaged} lines of metrics.jsonl cannot be read")


def _step(grid: Path) -> int:
    digits = grid.parent.name.removeprefix("step-")
    return int(digits) if digits.isdecimal() else -1
