"""Lives of real runs, cheap enough for hundreds: processes forked from one that has imported everything.

A life is `ldm ARGUMENTS` in a session of its own, with its own signals, workers and files; only the imports, two
seconds of every start, are shared. What they cost and how they can be interrupted is tested apart.
"""

from __future__ import annotations

import faulthandler
import json
import os
import resource
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any, Literal

import torch._dynamo  # noqa: F401 - the first step of an optimizer imports it, for 1.5 s: here once for all lives

from ldm_cli.training.background import Background
from ldm_cli.training.interruption import hold_signals, release_signals

STEPS, SAVE_EVERY = 12, 3
Held = Literal["start", "save"] | None
TIMEOUT = 300.0
"""Seconds that a life may take on a busy machine; whatever takes longer hangs."""
_CPU_CLOCK = 2
"""CPUCLOCK_SCHED of the kernel, with which clock_getcpuclockid(3) makes the clock of a process out of its number."""
SYSTEM_CALLS = (
    "openat,write,pwrite64,fsync,rename,unlink,unlinkat,mkdir,rmdir,link,linkat,ftruncate,chmod,fchmod,copy_file_range"
)


class Life:
    """`ldm ARGUMENTS` from its start to its end.

    Args:
        arguments: of the command line.
        log: stderr goes there, stdout too.
        held: stop, until `go`, before the first instruction or in the thread of the first save, before its first one.
        max_file_bytes, max_bytes: RLIMIT_FSIZE, RLIMIT_AS.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        log: Path,
        held: Held = None,
        max_file_bytes: int | None = None,
        max_bytes: int | None = None,
    ):
        self.log = log
        hold_signals()  # as the program does first of all
        self.pid = os.fork()
        if self.pid == 0:
            _live(arguments, log, held, {resource.RLIMIT_FSIZE: max_file_bytes, resource.RLIMIT_AS: max_bytes})
        release_signals()
        self._pidfd = os.pidfd_open(self.pid)
        self._poll = select.poll()
        self._poll.register(self._pidfd, select.POLLIN)
        self.code: int | None = None
        self.took = 0.0
        self.peak = 0
        """Bytes of memory that it took at most, with what it shares with this process."""
        self.hung = False
        if held:
            os.waitpid(self.pid, os.WUNTRACED)
        self.thread = int(_note_of_thread(log).read_text()) if held == "save" else self.pid
        """The thread that is held."""

    def lasts(self, seconds: float) -> bool:
        """Wait so long; whether it lives then."""
        return not self._poll.poll(1000 * seconds)

    def computes(self, seconds: float, random: Random) -> bool:
        """Wait until it has computed so long, and a moment more, so that it may also be caught waiting; whether it
        lives then. Processor time is the same moment of a run on a busy machine and on a quiet one.
        """
        while (left := seconds - self.seconds()) > 0:
            if not self.lasts(max(left, 0.001)):
                return False
        return self.lasts(random.uniform(0.0, 0.01))

    def seconds(self) -> float:
        """Processor time of its first process until now, or until its end."""
        return time.clock_gettime(~self.pid << 3 | _CPU_CLOCK)

    def send(self, number: int, group: bool = True) -> None:
        """A signal to all its processes, or to the first one; it may be gone already."""
        with suppress(ProcessLookupError):
            (os.killpg if group else os.kill)(self.pid, number)

    def go(self) -> None:
        """Let a held life begin."""
        os.kill(self.pid, signal.SIGCONT)

    def end(self, patience: float = TIMEOUT) -> int:
        """Wait for its end; its exit code, or -N if signal N ended it. What hangs is killed."""
        if self.lasts(patience):
            self.hung = True
            self.send(signal.SIGABRT, group=False)  # tells in the log where it hangs
            time.sleep(1)
            self.send(signal.SIGKILL)
            self.lasts(TIMEOUT)
        self.took = self.seconds()
        _, status, usage = os.wait4(self.pid, 0)
        self.peak = usage.ru_maxrss * 1024
        os.close(self._pidfd)
        self.code = os.waitstatus_to_exitcode(status)
        return self.code

    def survivors(self, patience: float = 15.0) -> list[int]:
        """Processes of its session that are still there after a while; they are killed."""
        deadline = time.monotonic() + patience
        while (left := _session(self.pid)) and time.monotonic() < deadline:
            time.sleep(0.02)
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        return left

    @property
    def errors(self) -> str:
        """What it said."""
        return self.log.read_text(encoding="utf-8", errors="replace")


def _note_of_thread(log: Path) -> Path:
    return log.with_suffix(".thread")


def _hold_first_save(note: Path) -> None:
    attempt = Background._attempt

    def hold(self: Background, work: Callable[[], None]) -> None:
        Background._attempt = attempt  # type: ignore[method-assign]
        note.write_text(str(threading.get_native_id()))
        os.kill(os.getpid(), signal.SIGSTOP)
        attempt(self, work)

    Background._attempt = hold  # type: ignore[method-assign]


def _live(arguments: Sequence[str], log: Path, held: Held, limits: Mapping[int, int | None]) -> None:
    code = 70
    try:
        os.setsid()
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        for number in (1, 2):
            os.dup2(descriptor, number)
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__  # pytest's would keep what is said
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        for kind, limit in limits.items():
            if limit is not None:
                resource.setrlimit(kind, (limit, limit))
        faulthandler.enable(sys.__stderr__)
        from ldm_cli.cli.app import run

        if held == "start":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif held == "save":
            _hold_first_save(_note_of_thread(log))
        code = run(list(arguments))
        sys.stdout.flush()
    finally:
        os._exit(code)


def _session(leader: int) -> list[int]:
    """Processes of a session that are no zombies."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == leader and fields[0] not in "ZX":
                found.append(int(entry.name))
    return found


class Home:
    """Scenes, tiny models and recipes of the trainers, and of adapters, in a folder."""

    def __init__(self, folder: Path) -> None:
        from ldm_cli.data.scenes import write_scenes
        from ldm_cli.reporting import SilentReporter

        from ..sampling.tiny_ar import save_tiny_vq
        from ..stages.tiny import (
            RESNET,
            ar_recipe,
            clip_recipe,
            decoder_recipe,
            prior_recipe,
            unet_recipe,
            vae_recipe,
            vq_recipe,
        )
        from ..stages.tiny_sd3 import save_tiny_sd3, sd3_recipe

        self.folder = folder
        scenes = folder / "scenes"
        write_scenes(scenes, 40, 32, 0, SilentReporter(), val_samples=6, shard_samples=16)
        train = {"steps": STEPS, "save_every": SAVE_EVERY, "log_every": 4, "validate_every": 5, "ema_decay": 0.9}
        adversarial = {"adversarial_weight": 0.5, "discriminator_channels": 8, "discriminator_layers": 2}
        flips = {"flip_probability": 0.5}
        self._write("clip", clip_recipe(scenes, RESNET, micro_batch=4, **train))
        self._write("vae", vae_recipe(scenes, loss=adversarial, data=flips, **train))
        self._write("vq", vq_recipe(scenes, loss=adversarial, data=flips, **train))
        save_tiny_vq(folder / "codes")
        self._write("ar", ar_recipe(scenes, folder / "codes", data=flips, **train))
        for name in ("clip", "vae"):
            self.finished(name)
        models = folder / "whole-clip/model", folder / "whole-vae/model"
        unet = unet_recipe(scenes, *models, **train)
        self._write("unet", unet)
        self._write("vit", clip_recipe(scenes, **train))
        vit = folder / "whole-vit/model"
        self._write("prior", prior_recipe(scenes, vit, data=flips, **train))
        self._write("decoder", decoder_recipe(scenes, vit, models[1], data=flips, **train))
        adapters = {"rank": 2, "targets": ["all"], "conv_rank": 2, "text_encoder": True, "dropout": 0.1, "dora": True}
        kept = {field: value for field, value in unet.items() if field not in ("unet", "vae", "text_encoder")}
        self._write("sd3", sd3_recipe(scenes, save_tiny_sd3(folder / "sd3"), {"encoder_dropout": 0.4}, **train))
        self._write("lora", kept | {"start_from": str(folder / "whole-unet"), "lora": adapters})

    def _write(self, name: str, recipe: Mapping[str, Any]) -> None:
        (self.folder / f"{name}.json").write_text(json.dumps(recipe))

    def arguments(self, name: str, out: Path, *more: str) -> list[str]:
        """The command line that trains `name` in `out`."""
        if name == "lora":
            self.finished("unet")
        if name in ("prior", "decoder"):
            self.finished("vit")
        command = json.loads((file := self.folder / f"{name}.json").read_text())["command"]
        return [command, str(file), "--out", str(out), "--device", "cpu", *more]

    def life(self, name: str, out: Path, *more: str, log: Path | None = None, **options: Any) -> Life:
        """A life of the run in `out`; what it says is beside it, or in `log`."""
        return Life(self.arguments(name, out, *more), log or out.parent / f"{out.name}.log", **options)

    def finished(self, name: str) -> Path:
        """The run of `name` that nothing disturbed; made once."""
        out = self.folder / f"whole-{name}"
        if not (out / "model").is_dir():
            life = self.life(name, out)
            assert life.end() == 0, life.errors
        return out

    def half_done(self, name: str) -> Path:
        """A run that was stopped before its last checkpoint, to be copied; made once."""
        out = self.folder / f"half-{name}"
        if not out.is_dir():
            life = self.life(name, out)
            last = out / "checkpoints" / f"step-{STEPS - SAVE_EVERY:08d}"
            while not last.is_dir():
                assert life.lasts(0.001), life.errors
            life.send(signal.SIGKILL)
            life.end()
            for newer in (out / "checkpoints").glob(f"step-{STEPS:08d}"):
                shutil.rmtree(newer)
        return out


class Strace:
    """strace on the thread of a life that is held; its end is the life's."""

    def __init__(self, life: Life, output: Path, *options: str) -> None:
        command = ["strace", "-qq", "-y", "-o", str(output), "-e", f"trace={SYSTEM_CALLS}", "-e", "signal=none"]
        self._process = subprocess.Popen(
            [*command, *options, "-p", str(life.thread)], stderr=subprocess.PIPE, start_new_session=True
        )
        deadline = time.monotonic() + 30
        while "TracerPid:\t0" in Path(f"/proc/{life.thread}/status").read_text():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"strace cannot attach: {self._process.communicate()[1].decode()}")
            time.sleep(0.002)

    def wait(self) -> None:
        """After the end of the life."""
        self._process.wait(timeout=30)
        if self._process.stderr is not None:
            self._process.stderr.close()
