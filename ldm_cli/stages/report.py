"""`ldm report`: runs on one page."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm_cli.errors import DataError, OutputError
from ldm_cli.reporting import Reporter
from ldm_cli.stages import compare_results
from ldm_cli.stages.support.report_page import MARK, report_page
from ldm_cli.stages.support.run_summary import RunSummary, read_run
from ldm_cli.storage import write_whole

PAGE_NAME = "report.html"
_HEAD_BYTES = 4096


@dataclass(frozen=True)
class ReportOptions:
    """Where the page goes, and how long it is kept up to date."""

    out: Path | None = None
    """File; None: report.html in the folder of the only run, or here for several."""
    watch: float | None = None
    """Seconds between two versions, while a run goes on; None: one version."""


def run(folders: Sequence[Path], options: ReportOptions, reporter: Reporter) -> dict[str, Any]:
    """Write the page of some runs.

    Args:
        folders: of training runs, and of evaluations.
        reporter: receives the names of files that cannot be read.

    Returns:
        `page`, `bytes`, and `runs`: name and state of each.

    Raises:
        InputNotFoundError: a folder is none of a run.
        OutputError, StorageError: the page cannot be written, or another file is in its place.
    """
    file = options.out or (folders[0] / PAGE_NAME if len(folders) == 1 else Path(PAGE_NAME))
    _expect_own(file)
    warned = set[str]()
    while True:
        runs = [read_run(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]
        goes_on = options.watch is not None and any(one.state == "running" for one in runs)
        text = report_page(runs, _evaluations(runs), options.watch if goes_on else None)
        write_whole(file, text)
        for problem in (f"{one.folder}: {problem}" for one in runs for problem in one.problems):
            if problem not in warned:
                warned.add(problem)
                reporter.warn(problem)
        if not goes_on or options.watch is None:
            states = [{"name": one.name, "state": one.state} for one in runs]
            return {"page": str(file), "bytes": len(text.encode()), "runs": states}
        time.sleep(options.watch)


def _expect_own(file: Path) -> None:
    """Refuse to replace a file that is no report."""
    if not file.exists():
        return
    try:
        with file.open("rb") as stream:
            is_own = MARK.encode() in stream.read(_HEAD_BYTES)
    except OSError as error:
        raise OutputError(f"cannot replace '{file}'", error.strerror or str(error)) from error
    if not is_own:
        raise OutputError(f"'{file}' exists already", "it is no report", "choose another name with --out")


def _names(folders: Sequence[Path]) -> list[str]:
    short = [folder.resolve().name for folder in folders]
    return short if len(set(short)) == len(short) else [str(folder) for folder in folders]


def _evaluations(runs: Sequence[RunSummary]) -> dict[str, Any] | None:
    """The results of all evaluations side by side, or None where there is none that can be shown."""
    if not (files := [run.evaluation for run in runs if run.evaluation is not None]):
        return None
    try:
        return compare_results.run(files)
    except DataError as error:
        runs[0].problems.append(f"{error.what}: {error.cause}" if error.cause else error.what)
        return None
