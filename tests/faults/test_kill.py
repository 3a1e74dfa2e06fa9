"""The program itself, killed and signalled at several moments: the same command ends in the same bits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm_cli.data.scenes import write_scenes
from ldm_cli.reporting import SilentReporter
from ldm_cli.training.checkpoint import checkpoint_name, problem_with
from ldm_cli.training.run_folder import RunFolder

from ..conftest import REPOSITORY
from ..stages.tiny import RESNET, clip_recipe, trained, unet_recipe, vae_recipe
from .runs import assert_same_run, status

pytestmark = pytest.mark.slow

STEPS = 24
"""Checkpoints at every third step, so that there is nearly always one under way."""
Moment = Callable[[Path], bool]


started_programs: list[Program] = []


class Program:
    """`python -m ldm_cli COMMAND recipe.json` in a process group of its own, on one thread."""

    def __init__(self, recipe: dict[str, Any], out: Path) -> None:
        file = out.with_suffix(".json")
        file.write_text(json.dumps(recipe))
        arguments = [recipe["command"], str(file), "--out", str(out), "--device", "cpu"]
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
        started_programs.append(self)
        self.out = out
        self.errors = out.with_suffix(".log").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "ldm_cli", *arguments],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=self.errors,
            start_new_session=True,
        )

    def clear_away(self) -> None:
        """End what is left, stopped or not."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.errors.close()

    def wait(self) -> int:
        code = self.process.wait(timeout=600)
        self.errors.seek(0)
        self.last_line = (self.errors.read().splitlines() or [""])[-1]
        return code

    def at(self, moment: Moment) -> Program:
        """Returns when the run folder looks as `moment` wants it, with every process of the run stopped."""
        end = time.monotonic() + 120
        while True:
            if moment(self.out):
                os.killpg(self.process.pid, signal.SIGSTOP)
                while self._state() not in "TZ":
                    time.sleep(0.0005)
                if moment(self.out):
                    return self
                os.killpg(self.process.pid, signal.SIGCONT)
            assert self.process.poll() is None, f"it ended before: {self.wait()} {self.last_line}"
            assert time.monotonic() < end
            time.sleep(0.0005)

    def _state(self) -> str:
        return Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[0]

    def signal(self, number: signal.Signals, group: bool = True) -> Program:
        """Send a signal, to all processes or to the trainer alone, and let them go on."""
        (os.killpg if group else os.kill)(self.process.pid, number)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGCONT)
        return self

    def group_is_gone(self) -> bool:
        try:
            os.killpg(self.process.pid, 0)
        except ProcessLookupError:
            return True
        return False


def started(out: Path) -> bool:
    return (out / "status.json").exists()


def while_saving(out: Path) -> bool:
    """In the middle of a checkpoint that is not the first."""
    folder = out / "checkpoints"
    return any(folder.glob("step-*")) and any(folder.glob(".tmp-step-*/model"))


def after_checkpoints(out: Path) -> bool:
    return len(list((out / "checkpoints").glob("step-*"))) >= 2


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scenes, and a CLIP and an autoencoder for the denoiser."""
    home = tmp_path_factory.mktemp("home")
    write_scenes(home / "scenes", 40, 32, 0, SilentReporter(), val_samples=6, shard_samples=16)
    trained(clip_recipe(home / "scenes", steps=1), home / "clip")
    trained(vae_recipe(home / "scenes", steps=1), home / "vae")
    return home


def recipes(home: Path) -> dict[str, dict[str, Any]]:
    train = {"steps": STEPS, "save_every": 3, "log_every": 4, "validate_every": 7, "ema_decay": 0.9}
    adversarial = {"adversarial_weight": 0.5, "discriminator_channels": 8, "discriminator_layers": 2}
    scenes, models = home / "scenes", (home / "clip/model", home / "vae/model")
    resnet = clip_recipe(scenes, RESNET, gradient_accumulation=2, **train)
    workers = vae_recipe(scenes, loss=adversarial, data={"num_workers": 2, "flip_probability": 0.5}, **train)
    return {"clip": resnet, "vae": workers, "unet": unet_recipe(scenes, *models, **train)}


@pytest.fixture(scope="module")
def undisturbed(home: Path) -> Callable[[str], Path]:
    """The run of a recipe that nothing disturbed; made once."""
    made: dict[str, Path] = {}

    def run(name: str) -> Path:
        if name not in made:
            made[name] = home / f"whole-{name}"
            trained(recipes(home)[name], made[name])
        return made[name]

    return run


@pytest.fixture(autouse=True)
def _no_process_stays() -> Iterator[None]:
    """Not even when a test fails or is interrupted while all processes of a run are stopped."""
    yield
    while started_programs:
        started_programs.pop().clear_away()


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """As in the processes: sums over threads round differently."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("name", "moments"),
    [
        ("vae", (started, while_saving, after_checkpoints)),
        ("clip", (while_saving,)),
        ("unet", (while_saving,)),
    ],
    ids=["vae", "clip", "unet"],
)
def test_killed_and_repeated_it_ends_in_the_same_bits(
    home: Path, undisturbed: Callable[[str], Path], tmp_path: Path, name: str, moments: tuple[Moment, ...]
) -> None:
    """Before the first checkpoint, in the middle of a save, and after it; each time the whole group."""
    recipe, out = recipes(home)[name], tmp_path / "run"
    for moment in moments:
        killed = Program(recipe, out).at(moment).signal(signal.SIGKILL)
        assert killed.wait() == -signal.SIGKILL
        assert status(out)["state"] == "running"
        if moment is while_saving:
            assert list(out.rglob(".tmp-*"))
    last = Program(recipe, out)
    assert last.wait() == 0, last.last_line
    assert_same_run(undisturbed(name), out, STEPS)
    assert not list(out.rglob(".tmp-*"))
    assert status(out)["state"] == "finished"


@pytest.mark.parametrize(("name", "number"), [("unet", signal.SIGTERM), ("vae", signal.SIGINT)])
def test_a_signal_to_the_group_saves_and_the_same_command_ends_in_the_same_bits(
    home: Path, undisturbed: Callable[[str], Path], tmp_path: Path, name: str, number: signal.Signals
) -> None:
    recipe, out = recipes(home)[name], tmp_path / "run"
    stopped = Program(recipe, out).at(after_checkpoints).signal(number)
    assert stopped.wait() == 75, stopped.last_line
    assert stopped.last_line.startswith("ldm: error: stopped at step ")
    assert stopped.last_line.endswith("run the same command again to go on [E-PREEMPTED]")
    state = status(out)
    assert (state["state"], state["reason"]) == ("preempted", f"received {number.name}")
    assert (out / "checkpoints" / checkpoint_name(state["step"])).is_dir()
    assert stopped.group_is_gone()
    last = Program(recipe, out)
    assert last.wait() == 0, last.last_line
    assert_same_run(undisturbed(name), out, STEPS)


def test_a_kill_of_the_trainer_alone_frees_the_run_at_once_and_its_workers_leave(home: Path, tmp_path: Path) -> None:
    recipe = recipes(home)["vae"]
    killed = Program(recipe, tmp_path / "run").at(after_checkpoints).signal(signal.SIGKILL, group=False)
    killed.wait()
    with RunFolder(tmp_path / "run", SilentReporter()):
        pass
    end = time.monotonic() + 30
    while not killed.group_is_gone():
        assert time.monotonic() < end, "workers survive their trainer"
        time.sleep(0.1)


def test_a_second_signal_ends_it_at_once_and_the_checkpoint_holds(home: Path, tmp_path: Path) -> None:
    """The batch is large, so that the first signal is still waiting for the end of the step."""
    recipe = recipes(home)["vae"]
    recipe["train"] |= {"batch_size": 512, "gradient_accumulation": 32, "save_every": 1}

    def in_the_second_step(out: Path) -> bool:
        return started(out) and status(out)["step"] == 1

    program = Program(recipe, tmp_path / "run").at(in_the_second_step)
    for _ in range(2):
        os.killpg(program.process.pid, signal.SIGCONT)
        time.sleep(0.2)
        program.signal(signal.SIGTERM)
    began = time.monotonic()
    assert program.wait() == 128 + signal.SIGTERM
    assert time.monotonic() - began < 30
    assert problem_with(tmp_path / "run/checkpoints" / checkpoint_name(1)) is None


def test_a_finished_run_ends_with_0_and_touches_nothing(undisturbed: Callable[[str], Path], home: Path) -> None:
    out = undisturbed("vae")
    before = {p: p.stat().st_mtime_ns for p in (out, *out.rglob("*"))}
    program = Program(recipes(home)["vae"], out)
    assert program.wait() == 0
    assert "finished already" in program.last_line
    assert {p: p.stat().st_mtime_ns for p in (out, *out.rglob("*"))} == before
