"""`--nproc N`: run N ranks of the same command on this machine.

The launcher forwards signals. Soon after a rank fails it ends the others, reports the first failure in one line, and
exits with the code of that rank. It imports no torch. A rank ends with its launcher in every case.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import FrameType

import typer

from ldm_cli.cli.report import make_reporter
from ldm_cli.cli.streams import write_line
from ldm_cli.errors import LdmError, Preempted, UsageError, WorkerError
from ldm_cli.reporting import Reporter, SilentReporter
from ldm_cli.training.interruption import SECONDS_APART

_PROGRAM = (sys.executable, "-m", "ldm_cli")
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_GRACE = 10.0
"""Seconds that the other ranks have to end on their own after a failure."""
_POLL = 0.05
_PR_SET_PDEATHSIG = 1


@dataclass
class _Rank:
    number: int
    process: subprocess.Popen[bytes]
    error_pipe: int
    """Descriptor to read the rank's error lines from."""


def is_rank() -> bool:
    """Whether a launcher, ours or torchrun, started this process."""
    return "RANK" in os.environ


def is_first_rank() -> bool:
    """Whether this process reports to the user: it is rank 0, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def become_ranks(arguments: Sequence[str], num_ranks: int | None, is_dry_run: bool = False) -> None:
    """Go on as one of the ranks that a launcher has started, or as the only process; or launch ranks, and exit.

    Args:
        arguments: of this process's command line.
        num_ranks: as `--nproc` says; a dry run needs none.

    Raises:
        Exit: with the exit code of the ranks.
        UsageError: `--nproc` contradicts the launcher that started this process.
    """
    if is_rank():
        started = os.environ.get("LOCAL_WORLD_SIZE", str(num_ranks))
        if num_ranks is not None and started != str(num_ranks):
            cause = f"--nproc {num_ranks} among {started} ranks"
            raise UsageError(cause, "one launcher is enough", "leave --nproc out")
        bind_to_launcher()
    elif num_ranks is not None and num_ranks > 1 and not is_dry_run:
        raise typer.Exit(launch(arguments, num_ranks))


def make_rank_reporter() -> Reporter:
    """The reporter of this process; only the first rank reports to the user."""
    reporter = make_reporter() if is_first_rank() else SilentReporter()
    warn_of_copies(reporter)
    return reporter


def warn_of_copies(reporter: Reporter) -> None:
    """Warn if Slurm or MPI starts several processes that nothing joins: each would do the whole work."""
    names = ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
    name = next((name for name in names if name in os.environ), "")
    launcher, num_tasks = name.partition("_")[0], os.environ.get(name, "1")
    if num_tasks not in ("", "1") and not is_rank():
        reporter.warn(
            f"{launcher} starts {num_tasks} tasks, but RANK and WORLD_SIZE are not set: each process works alone on "
            "the same output; use torchrun, or set them as scripts/train.slurm does"
        )


def bind_to_launcher() -> None:
    """Let this process end with our launcher, if that started it."""
    launcher = os.environ.get("LDM_LAUNCHER_PID")
    if launcher is None or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != int(launcher):  # it has ended before
        os._exit(WorkerError.code)


def send_to_launcher(lines: Sequence[str]) -> bool:
    """Send the error lines of this rank to the launcher, which prints one rank's; False if there is no launcher."""
    descriptor = os.environ.get("LDM_ERROR_FD")
    if descriptor is None:
        return False
    os.set_blocking(int(descriptor), False)
    try:
        os.write(int(descriptor), "\n".join(lines).encode(errors="backslashreplace")[:32768])
    except OSError:
        return False
    return True


def launch(arguments: Sequence[str], num_ranks: int, program: Sequence[str] = _PROGRAM) -> int:
    """Run `ldm ARGUMENTS` as `num_ranks` ranks and return the exit code of the job.

    Args:
        arguments: of each rank's command line.
        num_ranks: number of processes, at least 1.
        program: the command to run with these arguments.
    """
    _warn_of_too_many_threads(num_ranks)
    with _Forwarding() as forwarding:
        forwarding.ranks = _start([*program, *arguments], num_ranks)
        try:
            return _outcome(forwarding.ranks, forwarding)
        finally:
            _end(forwarding.ranks)


class _Forwarding:
    """Context in which signals go to all ranks; the second SIGTERM or SIGINT ends them at once."""

    def __init__(self) -> None:
        self.ranks: list[_Rank] = []
        self.second: int | None = None
        self._asked_at: float | None = None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._asked_at is not None and number != signal.SIGUSR1 and now - self._asked_at > SECONDS_APART:
            self.second = number
        self._asked_at = self._asked_at or now
        for rank in self.ranks:
            if rank.process.poll() is None:
                rank.process.send_signal(signal.SIGKILL if self.second else number)

    def __enter__(self) -> _Forwarding:
        # Ranks inherit the block and lift it once their handlers are installed.
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        self._previous = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)


def _fair_threads(num_ranks: int) -> int:
    """Threads of each rank if all ranks share the processors."""
    return max(1, len(os.sched_getaffinity(0)) // num_ranks)


def _warn_of_too_many_threads(num_ranks: int) -> None:
    """Warn if the user sets more threads than there are processors: they would wait for one another."""
    asked, fair = os.environ.get("OMP_NUM_THREADS", ""), _fair_threads(num_ranks)
    if asked.isdecimal() and int(asked) > fair:
        write_line(
            f"warning: {num_ranks} ranks with OMP_NUM_THREADS={asked} have more threads than there are processors, "
            f"which on a CPU takes several times as long; unset it, or set it to {fair}"
        )


def _start(command: Sequence[str], num_ranks: int) -> list[_Rank]:
    """Start all ranks; signals that arrive meanwhile reach them afterwards."""
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    listening.listen(num_ranks)
    shared = {
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(listening.getsockname()[1]),
        "LDM_LAUNCHER_PID": str(os.getpid()),
        "LDM_STORE_FD": str(listening.fileno()),
    }
    defaults = {
        "OMP_NUM_THREADS": str(_fair_threads(num_ranks)),
        "GLOO_SOCKET_IFNAME": "lo",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }
    ranks = []
    for number in range(num_ranks):
        error_pipe, write_end = os.pipe()
        own = {"RANK": str(number), "LOCAL_RANK": str(number), "LDM_ERROR_FD": str(write_end)}
        process = subprocess.Popen(
            command,
            env={**defaults, **os.environ, **shared, **own},
            stdin=subprocess.DEVNULL,
            pass_fds=(write_end, listening.fileno()) if number == 0 else (write_end,),
        )
        os.close(write_end)
        os.set_blocking(error_pipe, False)
        ranks.append(_Rank(number, process, error_pipe))
    listening.close()
    return ranks


def _outcome(ranks: list[_Rank], forwarding: _Forwarding) -> int:
    """Wait for the ranks, report a failure, and return the job's exit code."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    failed: list[_Rank] = []
    running, deadline = list(ranks), None
    while running and (deadline is None or time.monotonic() < deadline):
        for rank in [rank for rank in running if rank.process.poll() is not None]:
            running.remove(rank)
            if rank.process.returncode != 0:
                failed.append(rank)
        # Ranks stop together, but rank 0 may still be saving when the others have left.
        if deadline is None and any(rank.process.returncode != Preempted.code for rank in failed):
            deadline = time.monotonic() + _GRACE
        if deadline is not None and all(_is_stopped(rank.process.pid) for rank in running):
            break
        time.sleep(_POLL if running else 0.0)
    if forwarding.second is not None:
        return 128 + forwarding.second
    if not failed:
        return 0
    # The rank whose end caused that of the others: one that only lost another rank is not to blame.
    return _report(min(failed, key=lambda rank: _blame(rank.process.returncode)), len(ranks))


def _is_stopped(child: int) -> bool:
    """Whether a child process has been stopped by a signal, so that it cannot end on its own."""
    return os.waitid(os.P_PID, child, os.WSTOPPED | os.WNOHANG | os.WNOWAIT) is not None


def _blame(code: int) -> int:
    return 0 if code < 0 else 3 if code == WorkerError.code else 2 if code == Preempted.code else 1


def _report(rank: _Rank, num_ranks: int) -> int:
    """Print the failure of a rank and return the job's exit code; a signal or a bug of ours counts as a lost rank."""
    code = rank.process.returncode
    name = f"rank {rank.number} of {num_ranks}"
    if code < 0:
        error = WorkerError(f"{name} was killed by {signal.Signals(-code).name}", remedy="run the same command again")
        write_line(f"ldm: error: {error}")
        return error.code
    lines = _read(rank.error_pipe).splitlines()
    if lines and code != LdmError.code:
        for line in lines:
            write_line(line)
        return code
    reason = lines[-1].removeprefix("ldm: error: ").removesuffix(f" [{LdmError.tag}]") if lines else f"code {code}"
    write_line(f"ldm: error: {name} failed: {reason} [{WorkerError.tag}]")
    return WorkerError.code


def _read(descriptor: int) -> str:
    try:
        return os.read(descriptor, 65536).decode(errors="backslashreplace")
    except OSError:
        return ""


def _end(ranks: list[_Rank]) -> None:
    for rank in ranks:
        if rank.process.poll() is None:
            rank.process.kill()
        rank.process.wait()
        os.close(rank.error_pipe)
