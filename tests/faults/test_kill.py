"""Training runs, killed and signalled at several moments: the same command ends in the same bits."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from ldm_cli.reporting import SilentReporter
from ldm_cli.training.checkpoint import checkpoint_name, problem_with
from ldm_cli.training.run_folder import RunFolder

from ..conftest import Ldm
from .lives import STEPS, Home, Life
from .runs import assert_same_run, status

pytestmark = pytest.mark.slow

WORKERS = "data.num_workers=2"
Moment = Callable[[Path], bool]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return Home(tmp_path_factory.mktemp("home"))


@pytest.fixture
def start(home: Home) -> Iterator[Callable[..., Life]]:
    """Begins a run; not even a test that fails or is interrupted leaves a process of it, stopped or not."""
    lives: list[Life] = []

    def life(name: str, out: Path, *more: str) -> Life:
        lives.append(home.life(name, out, *more))
        return lives[-1]

    yield life
    for one in lives:
        if one.code is None:
            one.send(signal.SIGKILL)
            one.end()


def stop_at(life: Life, out: Path, moment: Moment) -> Life:
    """Returns when the run folder looks as `moment` wants it, with every process of the run stopped."""
    end = time.monotonic() + 120
    while True:
        if moment(out):
            life.send(signal.SIGSTOP)
            while _state(life) not in "TZ":
                time.sleep(0.0005)
            if moment(out):
                return life
            life.send(signal.SIGCONT)
        assert life.lasts(0.0005), f"it ended before: {life.end()} {life.errors}"
        assert time.monotonic() < end


def _state(life: Life) -> str:
    return Path(f"/proc/{life.pid}/stat").read_text().rpartition(")")[2].split()[0]


def send(life: Life, number: signal.Signals, group: bool = True) -> Life:
    """A signal to all processes or to the trainer alone, which then go on."""
    life.send(number, group)
    life.send(signal.SIGCONT)
    return life


def is_gone(life: Life) -> bool:
    """Whether no process of its group is left."""
    with suppress(ProcessLookupError):
        os.killpg(life.pid, 0)
        return False
    return True


def last_line(life: Life) -> str:
    return (life.errors.splitlines() or [""])[-1]


def started(out: Path) -> bool:
    return (out / "status.json").exists()


def while_saving(out: Path) -> bool:
    """In the middle of a checkpoint that is not the first."""
    folder = out / "checkpoints"
    return any(folder.glob("step-*")) and any(folder.glob(".tmp-step-*/model"))


def after_checkpoints(out: Path) -> bool:
    return len(list((out / "checkpoints").glob("step-*"))) >= 2


@pytest.mark.parametrize(
    ("name", "moments"),
    [
        ("vae", (started, while_saving, after_checkpoints)),
        ("clip", (while_saving,)),
        # Their runs are lost and continued in tests/stages, too.
        *(
            pytest.param(name, (while_saving,), marks=pytest.mark.exhaustive)
            for name in ("unet", "lora", "vq", "ar", "prior", "decoder", "sd3")
        ),
    ],
)
def test_killed_and_repeated_it_ends_in_the_same_bits(
    home: Home, start: Callable[..., Life], tmp_path: Path, name: str, moments: tuple[Moment, ...]
) -> None:
    """Before the first checkpoint, in the middle of a save, and after it; each time the whole group."""
    out = tmp_path / "run"
    for moment in moments:
        killed = send(stop_at(start(name, out, WORKERS), out, moment), signal.SIGKILL)
        assert killed.end() == -signal.SIGKILL
        assert status(out)["state"] == "running"
        if moment is while_saving:
            assert list(out.rglob(".tmp-*"))
    last = start(name, out, WORKERS)
    assert last.end() == 0, last.errors
    assert_same_run(home.finished(name), out, STEPS)
    assert not list(out.rglob(".tmp-*"))
    assert status(out)["state"] == "finished"


@pytest.mark.parametrize(
    ("name", "number"),
    [("vae", signal.SIGTERM), pytest.param("unet", signal.SIGINT, marks=pytest.mark.exhaustive)],
)
def test_a_signal_to_the_group_saves_and_the_same_command_ends_in_the_same_bits(
    home: Home, start: Callable[..., Life], tmp_path: Path, name: str, number: signal.Signals
) -> None:
    out = tmp_path / "run"
    stopped = send(stop_at(start(name, out, WORKERS), out, after_checkpoints), number)
    assert stopped.end() == 75, stopped.errors
    assert last_line(stopped).startswith("ldm: error: stopped at step ")
    assert last_line(stopped).endswith("run the same command again to go on [E-PREEMPTED]")
    state = status(out)
    assert (state["state"], state["reason"]) == ("preempted", f"received {number.name}")
    assert (out / "checkpoints" / checkpoint_name(state["step"])).is_dir()
    assert is_gone(stopped)
    last = start(name, out, WORKERS)
    assert last.end() == 0, last.errors
    assert_same_run(home.finished(name), out, STEPS)


def test_a_kill_of_the_trainer_alone_frees_the_run_at_once_and_its_workers_leave(
    start: Callable[..., Life], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    killed = send(stop_at(start("vae", out, WORKERS), out, after_checkpoints), signal.SIGKILL, group=False)
    killed.end()
    with RunFolder(out, SilentReporter()):
        pass
    end = time.monotonic() + 30
    while not is_gone(killed):
        assert time.monotonic() < end, "workers survive their trainer"
        time.sleep(0.1)


def test_a_second_signal_ends_it_at_once_and_the_checkpoint_holds(start: Callable[..., Life], tmp_path: Path) -> None:
    """The batch is large, so that the first signal is still waiting for the end of the step."""
    out = tmp_path / "run"
    large = ("train.batch_size=512", "train.micro_batch=16", "train.save_every=1")
    life = stop_at(start("vae", out, WORKERS, *large), out, lambda out: started(out) and status(out)["step"] == 1)
    for _ in range(2):
        life.send(signal.SIGCONT)
        time.sleep(0.2)
        life.send(signal.SIGTERM)
    began = time.monotonic()
    assert life.end() == 128 + signal.SIGTERM
    assert time.monotonic() - began < 30
    assert problem_with(out / "checkpoints" / checkpoint_name(1)) is None


def test_a_finished_run_ends_with_0_and_touches_nothing(home: Home, ldm: Ldm) -> None:
    """By a process of its own, as a user starts it."""
    out = home.finished("vae")
    before = {p: p.stat().st_mtime_ns for p in (out, *out.rglob("*"))}
    result = ldm(*home.arguments("vae", out))
    assert result.returncode == 0, result.stderr
    assert "finished already" in result.stderr.splitlines()[-1]
    assert {p: p.stat().st_mtime_ns for p in (out, *out.rglob("*"))} == before
