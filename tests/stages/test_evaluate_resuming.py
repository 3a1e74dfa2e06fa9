"""`ldm eval`, killed and repeated: it goes on, and ends in the same numbers."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import pytest

from ldm_cli.errors import DataError, OutputError
from ldm_cli.reporting import SilentReporter
from ldm_cli.sampling.pipeline import Pipeline
from ldm_cli.stages import compare_results
from ldm_cli.stages.evaluate import run
from ldm_cli.stages.support.options import RunOptions

from ..faults.lives import Life
from ..training.forked import ForkedRanks
from .tiny_eval import recipe, write_home

METRICS = ["clip_score", "retrieval", "reconstruction", "frechet_distance", "attribute_accuracy"]
SWEEP = {"guidance.scale": [1.0, 2.0]}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_home(tmp_path_factory.mktemp("eval"))


@pytest.fixture(scope="module", autouse=True)
def _small_rounds() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ldm_cli.stages.support.eval_samples._PICTURES_PER_ROUND", 4)
        yield


def asked(home: Path, **changes: Any) -> Any:
    return recipe(home, METRICS, **{"batch_size": 2, "num_generated": 12, "sweep": SWEEP, **changes})


@pytest.fixture(scope="module")
def finished(home: Path, _small_rounds: None) -> dict[str, Any]:
    """The result that nothing interrupted."""
    return run(asked(home), RunOptions(device="cpu"), SilentReporter())


def started(home: Path, out: Path, *more: str, **changes: Any) -> Life:
    """The program in a process of its own."""
    file = out.parent / "recipe.json"
    file.write_text(json.dumps(asked(home, **changes).to_mapping()))
    return Life(["eval", str(file), "--out", str(out), "--device", "cpu", *more], out.parent / "log")


def kill_when(life: Life, moment: Callable[[], bool]) -> None:
    while not moment():
        assert life.lasts(0.0005), life.errors
    life.send(signal.SIGKILL)
    assert life.end() == -signal.SIGKILL


def assert_same_result(out: Path, expected: dict[str, Any]) -> None:
    found = json.loads((out / "eval.json").read_text())
    expected = json.loads(json.dumps(expected))
    assert (found["metrics"], found["points"]) == (expected["metrics"], expected["points"])
    assert sorted(path.name for path in out.iterdir()) == ["eval-curve.png", "eval-curve.svg", "eval.json"]


@pytest.mark.slow
def test_killed_while_it_measures_it_goes_on_and_ends_in_the_same_numbers(
    home: Path, finished: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Among the real images, among the pictures of the first point, and of the second."""
    out = tmp_path / "out"
    for part in ("real", "000-pipeline", "001-pipeline"):
        rounds = out / "eval-measured" / part
        kill_when(started(home, out), lambda folder=rounds: len(list(folder.glob("[0-9]*"))) >= 2)  # type: ignore[misc]
        assert not (out / "eval.json").exists()
    seeds: list[int] = []
    generate = Pipeline.generate

    def watched(self: Pipeline, requests: Any, *arguments: Any, **options: Any) -> Any:
        seeds.extend(request.seed for request in requests)
        return generate(self, requests, *arguments, **options)

    monkeypatch.setattr(Pipeline, "generate", watched)
    run(asked(home), RunOptions(device="cpu", out=out), SilentReporter())
    assert seeds in ([8, 9, 10, 11], [])  # the last rounds at most
    assert_same_result(out, finished)


@pytest.mark.exhaustive
def test_killed_at_twenty_random_moments_it_ends_in_the_same_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ldm_cli.stages.support.eval_samples._PICTURES_PER_ROUND", 64)
    home, random = write_home(tmp_path, num_scenes=2000), Random(0)
    changes = {"num_samples": 2000, "num_generated": 1000, "batch_size": 32, "sampling": {"steps": 1}}
    whole = started(home, tmp_path / "whole", **changes)
    assert whole.end() == 0, whole.errors
    out, kills = tmp_path / "out", 0
    while kills < 20:
        life = started(home, out, **changes)
        if life.computes(random.uniform(0, whole.took / 4), random):
            life.send(signal.SIGKILL)
        if life.end() == 0:  # before the signal came
            (out / "eval.json").unlink(missing_ok=True)
            continue
        assert life.code == -signal.SIGKILL, life.errors
        kills += 1
    last = started(home, out, **changes)
    assert last.end() == 0, last.errors
    assert_same_result(out, json.loads((tmp_path / "whole" / "eval.json").read_text()))


def test_another_number_of_ranks_goes_on(home: Path, finished: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    rounds = out / "eval-measured" / "000-pipeline"
    kill_when(started(home, out), lambda: rounds.is_dir())
    options = RunOptions(device="cpu", out=out)
    with ForkedRanks(lambda rank: 0 * len(run(asked(home), options, SilentReporter())), tmp_path, 2) as job:
        assert job.wait() == [0, 0], job.words()
    assert_same_result(out, finished)


def test_a_damaged_round_is_measured_again(home: Path, finished: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    rounds = out / "eval-measured" / "001-pipeline"
    kill_when(started(home, out), lambda: rounds.is_dir())
    file = next((out / "eval-measured" / "real").glob("00000002-*.safetensors"))
    file.write_bytes(file.read_bytes()[:-8])
    run(asked(home), RunOptions(device="cpu", out=out), SilentReporter())
    assert_same_result(out, finished)


def test_a_finished_evaluation_is_read_and_another_one_is_refused(home: Path, tmp_path: Path) -> None:
    options, reporter = RunOptions(device="cpu", out=tmp_path), SilentReporter()
    result = run(asked(home), options, reporter)
    assert run(asked(home), options, reporter) == json.loads(json.dumps(result))
    assert any("is in" in message for message in reporter.messages)
    for changes, message in (({"num_generated": 10}, "eval.num_generated: 12 → 10"), ({"sweep": {}}, "eval.sweep")):
        with pytest.raises(OutputError, match=f"of another evaluation: {message}"):
            run(asked(home, **changes), options, reporter)


def test_overwriting_begins_anew_and_goes_on_when_it_was_killed(
    home: Path, finished: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run(asked(home, num_generated=10), RunOptions(device="cpu", out=out), SilentReporter())
    rounds = out / "eval-measured" / "001-pipeline"
    kill_when(started(home, out, "--overwrite"), lambda: len(list(rounds.glob("[0-9]*"))) > 0)
    kept = {path: path.stat().st_mtime_ns for path in (out / "eval-measured" / "real").iterdir()}
    again = started(home, out, "--overwrite")
    while again.lasts(0.0005):
        for path, time in kept.items():
            with suppress(FileNotFoundError):
                assert path.stat().st_mtime_ns == time
    assert again.end() == 0, again.errors
    assert_same_result(out, finished)


def test_a_damaged_result_is_measured_again(home: Path, tmp_path: Path) -> None:
    out, reporter = tmp_path / "out", SilentReporter()
    quick = recipe(home, ["reconstruction"])
    expected = run(quick, RunOptions(device="cpu", out=out), SilentReporter())["metrics"]
    sound = (out / "eval.json").read_text()
    (out / "eval.json").write_text(sound.replace('"psnr": ', '"psnr": 1', 1))
    assert (out / "eval.json").read_text() != sound
    with pytest.raises(DataError, match="damaged: it is not as it was written"):
        compare_results.run([out / "eval.json"])
    assert run(quick, RunOptions(device="cpu", out=out), reporter)["metrics"] == expected
    assert any("is damaged: it is measured again" in message for message in reporter.messages)
    assert json.loads((out / "eval.json").read_text())["metrics"] == json.loads(sound)["metrics"]
    assert "sha256" not in run(quick, RunOptions(device="cpu", out=out), SilentReporter())


def test_measurements_of_other_models_are_refused(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    kill_when(started(home, out), lambda: (out / "eval-measured" / "real").is_dir())
    other = write_home(tmp_path / "other")
    (other / "pipeline").rename(other / "same")
    moved = asked(home, pipeline=str(other / "same"), num_generated=12)
    run(moved, RunOptions(device="cpu", out=out), SilentReporter())  # the same weights at another place
    result = json.loads((out / "eval.json").read_text())
    result["provenance"]["models"]["clip"]["sha256"] = "0" * 64
    (out / "eval.json").write_text(json.dumps(result))
    with pytest.raises(OutputError, match=r"the fingerprint of clip\.sha256: '000"):
        run(moved, RunOptions(device="cpu", out=out), SilentReporter())
