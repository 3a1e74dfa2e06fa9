"""`ldm spiral`: train on two numbers instead of a picture, and plot each step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ldm_cli.errors import DivergedError, OutputError
from ldm_cli.formats.json_file import write_json
from ldm_cli.lesson.experiment import experiment, facts
from ldm_cli.lesson.figures import lesson_figures
from ldm_cli.lesson.network import Trained, train
from ldm_cli.lesson.page import page
from ldm_cli.lesson.spiral import Points, data_set
from ldm_cli.plots.panels import save_png
from ldm_cli.reporting import Reporter
from ldm_cli.storage import storage_errors, whole_file, write_whole

PAGE_NAME = "index.html"
FACTS_NAME = "spiral.json"
_NUM_POINTS = 2000


def run(
    out: Path, seed: int, num_steps: int, guidance: float, reporter: Reporter, *, overwrite: bool = False
) -> dict[str, Any]:
    """Train the network, sample with every method of the lesson, and write the figures and the page.

    Args:
        out: folder for index.html, the figures as PNG, and spiral.json.
        seed: of the data, the weights and all noise.
        num_steps: optimizer steps, at least 1.
        guidance: the guidance scale that is compared with no guidance.

    Returns:
        Settings, the last loss, the measures, and the paths of the files. spiral.json holds the same without the paths.

    Raises:
        OutputError: `out` holds a lesson already, or cannot be written.
        StorageError: writing failed.
        DivergedError: the loss is not finite.
    """
    if (out / PAGE_NAME).exists() and not overwrite:
        raise OutputError(f"'{out / PAGE_NAME}' exists already", remedy="choose another --out, or pass --overwrite")
    with storage_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    with _one_thread():
        return _lesson(out, seed, num_steps, guidance, reporter)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Threads cost so small a network more than they save, most on a busy machine, and their sums differ in bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _lesson(out: Path, seed: int, num_steps: int, guidance: float, reporter: Reporter) -> dict[str, Any]:
    data = data_set(_NUM_POINTS, seed)
    trained = _train(data, num_steps, seed, reporter)
    reporter.info("drawing samples and figures")
    with torch.inference_mode():
        lesson = experiment(trained, data, guidance, seed)
        measured = facts(lesson)
        figures = lesson_figures(lesson)
        html = page(lesson, figures, measured)
    files = {figure.name: out / f"{figure.name}.png" for figure in figures}
    for figure in figures:
        with whole_file(files[figure.name]) as temporary:
            save_png(figure.panels, figure.columns, temporary)
    settings = {"seed": seed, "steps": num_steps, "guidance": guidance}
    result = {"settings": settings, "loss": trained.losses[-1], **measured}
    write_json(out / FACTS_NAME, result)
    write_whole(out / PAGE_NAME, html)
    reporter.info(f"the lesson is in {out / PAGE_NAME}")
    return {**result, "files": {"page": str(out / PAGE_NAME), **{name: str(path) for name, path in files.items()}}}


def _train(data: Points, num_steps: int, seed: int, reporter: Reporter) -> Trained:
    with reporter.progress("spiral", num_steps) as progress:
        report: Callable[[int, float], None] = lambda done, loss: progress.update(done, {"loss": loss})  # noqa: E731
        trained = train(data, num_steps, seed, report)
    if not all(bool(weights.isfinite().all()) for weights in trained.network.state_dict().values()):
        raise DivergedError("the spiral's network diverged", f"weights are not finite after {num_steps} steps")
    return trained
