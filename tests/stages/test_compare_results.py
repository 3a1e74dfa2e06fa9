"""`ldm compare` on results of `ldm eval`: what is set side by side, and why something is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ldm_cli.cli.app import run as run_program
from ldm_cli.errors import CheckpointError, DataError, InputNotFoundError
from ldm_cli.stages.compare_results import run


def result(file: Path, fid: float, changes: dict[str, Any] | None = None, **own: Any) -> Path:
    """A result with `fid` and `retrieval`; `changes` of its provenance by dotted names."""
    content: dict[str, Any] = {
        "metrics": {
            "fid": {"fid": fid, "fid_interval": [fid - 1, fid + 1], "num_real": 50},
            "retrieval": {"text_to_image@1": 0.5},
        },
        "provenance": {
            "models": {"inception": {"sha256": "aa", "preprocessing": "clean"}, "clip": {"sha256": "bb"}},
            "data": {"fingerprint": "cc", "num_samples": 50, "num_generated": 40},
            "recipe": {"data": {"image_size": 32, "num_workers": 0}, "eval": {"zero_shot": []}},
        },
        **own,
    }
    for name, value in (changes or {}).items():
        *path, last = name.split(".")
        place = content["provenance"]
        for part in path:
            place = place[part]
        place[last] = value
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(content))
    return file


def test_results_of_one_way_stand_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes = {"models.clip.sha256": "another", "recipe.data.num_workers": 3}  # neither is part of these measurements
    files = [result(tmp_path / "a" / "eval.json", 9.0), result(tmp_path / "b.json", 8.0, changes)]
    found = run(files)
    assert found["not_compared"] == {}
    assert [(one["name"], one["numbers"]["fid.fid"]) for one in found["results"]] == [("a", 9.0), ("b", 8.0)]
    assert "fid.num_real" not in found["results"][0]["numbers"]
    assert run_program(["compare", *map(str, files)]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["number", "a", "b"] in rows
    assert ["fid.fid", "9", "8"] in rows


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("models.inception.sha256", "dd", "a and b differ in inception.sha256: 'aa' → 'dd'"),
        ("models.inception.preprocessing", "pytorch-fid", "inception.preprocessing: 'clean' → 'pytorch-fid'"),
        ("data.num_generated", 30, "num_generated: 40 → 30"),
    ],
)
def test_a_metric_that_was_measured_otherwise_is_left_out_and_the_reason_told(
    tmp_path: Path, name: str, value: Any, reason: str
) -> None:
    found = run([result(tmp_path / "a.json", 9.0), result(tmp_path / "b.json", 8.0, {name: value})])
    assert reason in found["not_compared"]["fid"]
    assert list(found["results"][1]["numbers"]) == ["retrieval.text_to_image@1"]


@pytest.mark.parametrize(
    ("name", "value"), [("data.fingerprint", "dd"), ("data.num_samples", 30), ("recipe.data.image_size", 64)]
)
def test_nothing_is_compared_on_other_data(tmp_path: Path, name: str, value: Any) -> None:
    files = [result(tmp_path / "a.json", 9.0), result(tmp_path / "b.json", 8.0, {name: value})]
    with pytest.raises(DataError, match="no metric can be compared: fid: a and b differ in "):
        run(files)


def test_each_point_of_a_sweep_is_a_result(tmp_path: Path) -> None:
    fids = {"fid": {"fid": 7.0}}
    points = [{"pipeline": "small", "settings": {"steps": steps}, "metrics": fids} for steps in (1, 2)]
    found = run([result(tmp_path / "sweep.json", 0.0, metrics={}, points=points), result(tmp_path / "b.json", 8.0)])
    assert [one["name"] for one in found["results"]] == ["sweep, small, steps 1", "sweep, small, steps 2", "b"]
    assert found["not_compared"] == {"retrieval": "sweep, small, steps 1 lacks it"}


def test_what_is_no_result_is_named(tmp_path: Path) -> None:
    file = result(tmp_path / "a.json", 9.0)
    with pytest.raises(InputNotFoundError, match=r"b\.json"):
        run([file, tmp_path / "b.json"])
    (tmp_path / "b.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"b\.json"):
        run([file, tmp_path / "b.json"])
    (tmp_path / "b.json").write_text("{}")
    with pytest.raises(DataError, match=r"b\.json': it is no result of ldm eval"):
        run([file, tmp_path / "b.json"])
