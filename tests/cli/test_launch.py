"""The launcher with ranks that are small scripts: whose code and words it returns, signals, and that nobody is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

_LAUNCHER = """
import sys
from ldm_cli.cli import launch
launch._GRACE = 1.0
sys.exit(launch.launch(sys.argv[2:], 2, (sys.executable, "-c", sys.argv[1])))
"""
_HEAD = """
import os, signal, sys, time
from pathlib import Path
from ldm_cli.cli.launch import bind_to_launcher, send_to_launcher
rank, folder = int(os.environ["RANK"]), Path(sys.argv[1])
bind_to_launcher()
def ready():
    (folder / f"pid{rank}").write_text(str(os.getpid()))
"""


def start(script: str, folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", _LAUNCHER, _HEAD + textwrap.dedent(script), str(folder)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)


def ended(process: subprocess.Popen[str]) -> tuple[int, list[str]]:
    _, said = process.communicate(timeout=60)
    return process.returncode, said.splitlines()


def pids(folder: Path) -> list[int]:
    """Of both ranks, once they are ready."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        texts = [file.read_text() for file in sorted(folder.glob("pid*"))]
        if len(texts) == 2 and all(texts):
            return [int(text) for text in texts]
        time.sleep(0.02)
    raise AssertionError("the ranks did not start")


def is_alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def test_all_ranks_done_is_success_and_the_cores_are_shared(tmp_path: Path) -> None:
    script = """
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "OMP_NUM_THREADS")
    (folder / f"env{rank}").write_text(" ".join(os.environ[name] for name in names))
    """
    environment = os.environ.pop("OMP_NUM_THREADS", None)
    try:
        assert ended(start(script, tmp_path)) == (0, [])
    finally:
        if environment is not None:
            os.environ["OMP_NUM_THREADS"] = environment
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    for rank in range(2):
        assert (tmp_path / f"env{rank}").read_text() == f"{rank} {rank} 2 2 127.0.0.1 {threads}"


def test_more_threads_than_processors_are_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fair = max(1, len(os.sched_getaffinity(0)) // 2)
    monkeypatch.setenv("OMP_NUM_THREADS", str(fair))
    assert ended(start("", tmp_path)) == (0, [])
    monkeypatch.setenv("OMP_NUM_THREADS", str(fair + 1))
    code, (line,) = ended(start("", tmp_path))
    assert code == 0
    assert line.startswith(f"warning: 2 ranks with OMP_NUM_THREADS={fair + 1} have more threads than")
    assert line.endswith(f"set it to {fair}")


def test_the_first_failing_rank_gives_code_and_words(tmp_path: Path) -> None:
    script = """
    if rank == 1:
        send_to_launcher(["ldm: error: the shard is damaged [E-DATA]"])
        os._exit(65)
    time.sleep(0.5)
    send_to_launcher(["ldm: error: rank 1 of 2 failed [E-WORKER]"])
    os._exit(82)
    """
    assert ended(start(script, tmp_path)) == (65, ["ldm: error: the shard is damaged [E-DATA]"])


def test_a_killed_rank_is_named_and_the_stuck_other_is_ended(tmp_path: Path) -> None:
    process = start("ready(); time.sleep(600)", tmp_path)
    first, second = pids(tmp_path)
    os.kill(second, signal.SIGKILL)
    code, said = ended(process)
    assert code == 82
    assert said == ["ldm: error: rank 1 of 2 was killed by SIGKILL; run the same command again [E-WORKER]"]
    assert not is_alive(first)


def test_a_bug_in_a_rank_is_a_failed_rank(tmp_path: Path) -> None:
    script = """
    send_to_launcher(["ldm: error: unexpected ValueError: no [E-BUG]"])
    os._exit(70)
    """
    code, said = ended(start(script, tmp_path))
    assert code == 82
    assert said[0].endswith("of 2 failed: unexpected ValueError: no [E-WORKER]")
    assert len(said) == 1


def test_a_signal_reaches_every_rank_and_a_preempted_job_is_preempted(tmp_path: Path) -> None:
    script = """
    def stop(number, frame):
        time.sleep(0.3 * (1 - rank))  # rank 0 is saving while the other has left
        send_to_launcher(["ldm: error: stopped [E-PREEMPTED]"])
        os._exit(75)
    signal.signal(signal.SIGTERM, stop)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    ready()
    time.sleep(600)
    """
    process = start(script, tmp_path)
    pids(tmp_path)
    process.terminate()
    assert ended(process) == (75, ["ldm: error: stopped [E-PREEMPTED]"])


def test_a_job_is_preempted_though_a_rank_that_waits_for_the_preempted_one_loses_it(tmp_path: Path) -> None:
    script = """
    ready()
    time.sleep(0.3 * rank)
    send_to_launcher(["ldm: error: " + ("lost another rank [E-WORKER]" if rank else "stopped [E-PREEMPTED]")])
    os._exit(82 if rank else 75)
    """
    assert ended(start(script, tmp_path)) == (75, ["ldm: error: stopped [E-PREEMPTED]"])


def test_a_signal_before_the_ranks_are_ready_waits_for_them(tmp_path: Path) -> None:
    script = """
    ready()
    time.sleep(1)
    send_to_launcher(["ldm: error: stopped [E-PREEMPTED]"])
    os._exit(75 if signal.SIGTERM in signal.sigpending() else 1)
    """
    process = start(script, tmp_path)
    pids(tmp_path)
    process.terminate()
    assert ended(process)[0] == 75


def test_the_second_signal_ends_the_job_at_once(tmp_path: Path) -> None:
    process = start("ready(); time.sleep(600)", tmp_path)
    both = pids(tmp_path)
    process.terminate()
    time.sleep(0.3)
    process.terminate()
    assert ended(process)[0] == 143
    assert not any(is_alive(pid) for pid in both)


def test_no_rank_outlives_a_killed_launcher(tmp_path: Path) -> None:
    process = start("ready(); time.sleep(600)", tmp_path)
    both = pids(tmp_path)
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 10
    while any(is_alive(pid) for pid in both) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(is_alive(pid) for pid in both)
