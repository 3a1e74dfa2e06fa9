"""Rows of the fault matrix: kills, signals, time limits, and runs that cannot get on."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from ..conftest import REPOSITORY
from .lives import STEPS, Held, Life, Strace
from .matrix import Bench, Row

NAMES = ("vae", "clip", "unet", "sd3", "lora")


def _duration(bench: Bench, name: str) -> float:
    """Seconds that an undisturbed life computes."""
    life = bench.home.life(name, bench.fresh(), "data.num_workers=2")
    assert life.end() == 0, life.errors
    return life.took


def kill_at_random(bench: Bench, names: Sequence[str] = NAMES) -> None:
    """SIGKILL to the group at random moments, with two workers, until the run is done; then the next trainer."""
    durations = {name: _duration(bench, name) for name in names}
    turn, computed, undisturbed = 0, 0.0, 0.0
    while bench.tally.trials < bench.trials:
        name, out, kills = names[turn % len(names)], bench.fresh(), 0
        turn, undisturbed = turn + 1, undisturbed + durations[name]
        while bench.tally.trials < bench.trials:
            life = bench.home.life(name, out, "data.num_workers=2")
            if not life.computes(bench.random.uniform(0.0, durations[name]), bench.random):
                bench.tally.judge(life, {0}, f"{name}, life after {kills} kills")
                computed += life.took
                break
            life.send(signal.SIGKILL)
            bench.tally.judge(life, {-signal.SIGKILL, 0}, f"{name}, kill {kills}")
            computed += life.took
            if life.code == 0:  # it was done a moment before
                break
            bench.tally.trials += 1
            kills += 1
        computed += bench.finish(name, out, f"{name} after {kills} kills")
    bench.tally.note = f"{turn} runs; {computed:.0f} s of computing, {undisturbed:.0f} s without kills"


def kill_at_system_call(bench: Bench) -> None:
    """SIGKILL at the n-th system call on the run folder, of training or of a save beside it, pruning included."""
    calls = calls_with_one_save(bench, "vae")
    for held, number in calls if bench.trials == 0 else sorted(bench.random.sample(calls, bench.trials)):
        out = bench.copy_of(bench.home.half_done("vae"))
        life = bench.home.life("vae", out, held=held)
        tracer = Strace(life, Path(os.devnull), "-e", f"inject=all:signal=KILL:when={number}")
        life.go()
        bench.tally.judge(life, {-signal.SIGKILL, 0}, f"system call {number} after {held}")
        tracer.wait()
        bench.tally.trials += 1
        bench.finish("vae", out, f"killed at system call {number} after {held}")


def calls_with_one_save(bench: Bench, name: str) -> list[tuple[Held, int]]:
    """The system calls on its run folder of a life with one save: after `start` those of training, counted from its
    beginning; after `save` those of the save's thread."""
    calls: list[tuple[Held, int]] = []
    for held in ("start", "save"):
        out = bench.copy_of(bench.home.half_done(name))
        life = bench.home.life(name, out, held=held)
        calls += [(held, number) for number in _calls_within(out, life, out.parent / f"calls-{held}")]
    return calls


def _calls_within(folder: Path, held: Life, log: Path) -> list[int]:
    """Numbers of the system calls that touch a folder, of the thread that is held."""
    tracer = Strace(held, log)
    held.go()
    assert held.end() == 0, held.errors
    tracer.wait()
    lines = log.read_text(errors="replace").splitlines()
    return [number for number, line in enumerate(lines, start=1) if str(folder) in line]


def killed_while_indexing(bench: Bench) -> None:
    """SIGKILL at the n-th system call on the cache of indexes: the next life has the same index of the data."""
    command = ["data", "index", str(bench.home.folder / "scenes"), "--json"]
    shared = os.environ["XDG_CACHE_HOME"]

    def life(cache: Path, held: Held) -> Life:
        os.environ["XDG_CACHE_HOME"] = str(cache)
        return Life(command, cache.parent / "log", held=held)

    def facts(one: Life) -> list[str]:
        return re.findall(r'"(?:fingerprint|samples)": *"?(\w+)', one.errors)

    try:
        numbers = _calls_within(cache := bench.fresh(), whole := life(cache, held="start"), bench.folder / "calls")
        for number in numbers if bench.trials == 0 else bench.random.sample(numbers, bench.trials):
            killed = life(cache := bench.fresh(), held="start")
            tracer = Strace(killed, Path(os.devnull), "-e", f"inject=all:signal=KILL:when={number}")
            killed.go()
            bench.tally.judge(killed, {-signal.SIGKILL, 0}, f"system call {number}")
            tracer.wait()
            bench.tally.judge(again := life(cache, held=None), {0}, f"after system call {number}")
            if facts(again) != facts(whole) or len(facts(whole)) != 2:
                bench.tally.silent.append(f"system call {number}: another index: {facts(again)}")
            bench.tally.trials += 1
    finally:
        os.environ["XDG_CACHE_HOME"] = shared


def stopped(bench: Bench, *, group: bool, repeat: int = 1, apart: float = 0.0) -> None:
    """SIGTERM, SIGINT or SIGUSR1 at a random moment; the run is saved, and ends the same afterwards."""
    durations = {name: _duration(bench, name) for name in NAMES}
    while bench.tally.trials < bench.trials:
        name = NAMES[bench.tally.trials % len(NAMES)]
        number = bench.random.choice(
            (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1) if repeat == 1 else (signal.SIGTERM, signal.SIGINT)
        )
        out = bench.fresh()
        life = bench.home.life(name, out, "data.num_workers=2")
        moment = bench.random.uniform(0.0, durations[name])
        life.computes(moment, bench.random)
        for _ in range(repeat):
            life.send(number, group)
            time.sleep(apart)
        at_once = {128 + number} if apart else set()
        bench.tally.judge(life, {0, 75, *at_once}, f"{name}: {number.name} after {moment:.2f} s")
        bench.tally.trials += 1
        bench.finish(name, out, f"{name}: {number.name} after {moment:.2f} s")


def unharmed(bench: Bench) -> None:
    """SIGHUP, and SIGSTOP with SIGCONT: the run goes on."""
    duration = _duration(bench, "vae")
    while bench.tally.trials < bench.trials:
        out = bench.fresh()
        life = bench.home.life("vae", out, "data.num_workers=2")
        # Before the signals are held or ignored there is a process, but no run yet.
        life.computes(bench.random.uniform(0.3 * duration, duration), bench.random)
        if bench.tally.trials % 2:
            life.send(signal.SIGHUP)
        else:
            life.send(signal.SIGSTOP)
            time.sleep(bench.random.uniform(0, 2))
            life.send(signal.SIGCONT)
        bench.tally.judge(life, {0}, "SIGHUP" if bench.tally.trials % 2 else "SIGSTOP, SIGCONT")
        bench.tally.trials += 1
        bench.finish("vae", out, "unharmed")


def max_time(bench: Bench) -> None:
    """--max-time again and again, until the run is done."""
    life = bench.home.life("unet", bench.fresh())
    started = time.monotonic()
    assert life.end() == 0, life.errors
    duration = time.monotonic() - started  # the limit is one of time, too, on a busy machine as on a quiet one
    while bench.tally.trials < bench.trials:
        out, code = bench.fresh(), 75
        while code == 75 and bench.tally.trials < bench.trials:
            limit = f"{bench.random.uniform(0.3, 1.0) * duration:.2f}"
            code = bench.tally.judge(bench.home.life("unet", out, "--max-time", limit), {0, 75}, f"limit {limit}")
            bench.tally.trials += 1
        bench.finish("unet", out, "after --max-time")


def too_little_time(bench: Bench) -> None:
    """--max-time below what preparing takes: 75 so often as a requeueing job may hope for better, then 80."""
    from ldm_cli.training.failures import MAX_ATTEMPTS

    while bench.tally.trials < bench.trials:
        name = NAMES[bench.tally.trials % len(NAMES)]
        out = bench.copy_of(bench.home.half_done(name)) if bench.random.random() < 0.5 else bench.fresh()
        (out / ".lock").unlink(missing_ok=True)  # a kill that was noted there would count, too
        for life in range(MAX_ATTEMPTS + 1):
            allowed = {75} if life < MAX_ATTEMPTS else {80}
            bench.tally.judge(bench.home.life(name, out, "--max-time", "0.001"), allowed, f"{name}: life {life}")
        (out / "failures.jsonl").unlink()
        bench.tally.trials += 1
        bench.finish(name, out, f"{name}: after too little time")


def stopped_while_importing(bench: Bench) -> None:
    """A real start, imports and all, stopped in its first two seconds: nothing is there to save, and the code is 75."""
    while bench.tally.trials < bench.trials:
        number = bench.random.choice((signal.SIGTERM, signal.SIGINT, signal.SIGUSR1))
        out, moment = bench.fresh(), bench.random.uniform(0.3, 2.0)
        command = [sys.executable, "-m", "ldm_cli", *bench.home.arguments("vae", out)]
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
        with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
            time.sleep(moment)
            process.send_signal(number)
            errors = process.communicate(timeout=120)[1]
        bench.tally.judge_words(process.returncode, errors, {75}, f"{number.name} after {moment:.2f} s")
        bench.tally.trials += 1
        bench.finish("vae", out, "stopped while importing")


def crash_loop(bench: Bench) -> None:
    """A run that dies in the same step, life after life: 80 at last, and never before there is a reason."""
    from ldm_cli.training.failures import MAX_ATTEMPTS

    while bench.tally.trials < bench.trials:
        out, step = bench.fresh(), bench.random.randint(2, STEPS - 1)
        more = ("train.save_every=1000", "train.batch_size=256")  # long enough to be caught in
        for _ in range(MAX_ATTEMPTS):
            life = bench.home.life("vae", out, *more)
            # Not what the life before left there.
            inside = re.compile(rf"pid {life.pid} on .*, in step {step}$")
            while not inside.match(_read(out / ".lock").strip()) and life.lasts(0.0002):
                pass
            life.send(signal.SIGKILL)
            bench.tally.judge(life, {-signal.SIGKILL}, f"killed in step {step}")
        bench.tally.judge(bench.home.life("vae", out, *more), {80}, f"after {MAX_ATTEMPTS} lives")
        (out / "failures.jsonl").unlink()
        bench.tally.judge(bench.home.life("vae", out, *more), {0}, "after the cause is gone")
        bench.tally.trials += 1


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""


ROWS: dict[str, tuple[Row, int]] = {
    "kill-at-random": (kill_at_random, 200),
    "kill-adapters-at-random": (partial(kill_at_random, names=("lora",)), 20),
    "kill-codebook-at-random": (partial(kill_at_random, names=("vq",)), 20),
    "kill-tokens-at-random": (partial(kill_at_random, names=("ar",)), 20),
    "kill-at-system-call": (kill_at_system_call, 0),
    "kill-while-indexing": (killed_while_indexing, 0),
    "signal-to-process": (partial(stopped, group=False), 12),
    "signal-to-group": (partial(stopped, group=True), 12),
    "signal-doubled-by-wrapper": (partial(stopped, group=True, repeat=2), 6),
    "signal-twice": (partial(stopped, group=True, repeat=2, apart=0.2), 12),
    "signal-while-importing": (stopped_while_importing, 6),
    "hangup-stop-continue": (unharmed, 6),
    "max-time": (max_time, 6),
    "max-time-too-short": (too_little_time, 3),
    "crash-loop": (crash_loop, 2),
}
