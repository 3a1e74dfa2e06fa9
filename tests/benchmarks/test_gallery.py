"""The gallery's page: which demos it takes, and its numbers."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks import gallery
from benchmarks.gallery import GENERATORS, PROMPTS, training_seconds
from ldm_cli.recipe.load import load_recipe

_ACCURACY = {"generated": {"all": {"shape_and_color": 0.75, "num_single": 200}}}
_DISTANCE = {"fd[23232ff2]": 7.5, "fd[23232ff2]_interval": [6.0, 9.0]}


def write_run(folder: Path, rates: list[float]) -> None:
    folder.mkdir(parents=True)
    lines = [{"step": 10 * (n + 1), "images_per_second": rate} for n, rate in enumerate(rates)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"step": 0}]))
    (folder / "recipe.resolved.yaml").write_text(json.dumps({"recipe": {"train": {"batch_size": 64}}}))


def write_results(folder: Path) -> None:
    """What the commands leave behind."""
    (folder / "eval").mkdir(parents=True)
    metrics = {"attribute_accuracy": _ACCURACY, "frechet_distance": _DISTANCE}
    (folder / "eval/eval.json").write_text(json.dumps({"metrics": metrics}))
    images = []
    for prompt in PROMPTS:
        for seed in (0, 1):
            file = folder / f"{len(images)}.png"
            Image.new("RGB", (32, 32), (0, 0, 255)).save(file)
            images.append({"file": str(file), "prompt": prompt, "seed": seed})
    (folder / "sample.json").write_text(json.dumps({"images": images, "seconds": 4.0}))


def test_every_run_is_one_that_the_makefile_trains() -> None:
    makefile = (Path(__file__).parents[2] / "Makefile").read_text()
    trained = {load_recipe(name).recipe.name for name in set(re.findall(r"train-\w+ (\S+/\S+)", makefile))}
    for one in GENERATORS:
        assert set(one.runs) <= trained, one.title
        assert f"runs/{one.model}" in makefile or one.model in trained
        assert f"\n{one.target}:" in makefile


def test_the_time_of_training_is_that_of_the_logged_steps(tmp_path: Path) -> None:
    write_run(tmp_path / "run", [640.0, 320.0])
    assert training_seconds(tmp_path / "run") == pytest.approx(2 * (10 * 64 / 640 + 10 * 64 / 320))


def test_the_page_shows_the_demos_that_were_run_and_names_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, out, first = tmp_path / "runs", tmp_path / "runs/gallery", GENERATORS[0]
    for run in first.runs:
        write_run(runs / run, [640.0])
    write_results(out / first.key)
    monkeypatch.setattr(gallery, "networks", lambda model: [torch.nn.Linear(1000, 999)])
    text = gallery.page([(first, gallery.figures(first, runs, out))], GENERATORS[1:], out)
    assert "<td>75% [69%, 80%]</td><td>7.5 [6.0, 9.0]</td><td>1.0 M</td><td>6</td><td>2.00</td>" in text
    assert text.count("data:image/webp") == 2 * len(PROMPTS)
    assert "<code>make demo-ar</code>" in text
    assert "@" not in text.replace("@media", "")
    assert "http" not in text


def test_the_sheet_has_a_row_for_each_generator(tmp_path: Path) -> None:
    for one in GENERATORS[:2]:
        write_results(tmp_path / one.key)
    assert gallery.sheet(GENERATORS[:2], tmp_path).size == (4 * 132 - 4, 2 * 132 - 4)
