"""Workers that are killed, stopped, exiting, orphaned or closed early, and what is left of them."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm_cli.data.worker_transfer import pack, unpack
from ldm_cli.data.workers import made_by_workers
from ldm_cli.errors import DataError, RecipeError, WorkerError


@dataclass(frozen=True)
class Item:
    number: int
    tensor: Tensor
    pid: int


def _item(number: int) -> Item:
    return Item(number, torch.full((3, number % 5, 7), number), os.getpid())


def _made(
    make: Callable[[int], Any], count: int, num_workers: int = 2, num_ahead: int = 2, timeout: float = 60
) -> Generator[Any]:
    return made_by_workers(make, range(count), num_workers=num_workers, num_ahead=num_ahead, timeout=timeout)


def _children() -> set[int]:
    threads = Path("/proc/self/task").iterdir()
    return {int(child) for thread in threads for child in (thread / "children").read_text().split()}


def _left() -> tuple[set[int], int, int, set[str], Any]:
    """Children, open files, threads, names in /dev/shm, and who handles SIGCHLD."""
    gc.collect()
    files = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    # Semaphores are of other tests that run at the same time: workers have no locks.
    names = {path.name for path in Path("/dev/shm").iterdir() if not path.name.startswith("sem.")}
    return _children(), files, threading.active_count(), names, signal.getsignal(signal.SIGCHLD)


@pytest.fixture(scope="module", autouse=True)
def _imported_objects_stay() -> None:
    """No search for garbage looks through them again; there are two for each test."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    before = _left()
    yield
    assert _left() == before


@contextmanager
def _first_worker(items: Generator[Item]) -> Iterator[int]:
    """The process that made the first item, and makes every other one from then on."""
    with closing(items):
        yield next(items).pid


@pytest.mark.parametrize(
    ("count", "num_workers", "num_ahead"), [(0, 2, 2), (1, 3, 1), (23, 1, 1), (23, 2, 3), (23, 5, 2)]
)
def test_items_come_in_order_with_their_tensors(count: int, num_workers: int, num_ahead: int) -> None:
    items = list(_made(_item, count, num_workers, num_ahead))
    assert [item.number for item in items] == list(range(count))
    assert all(torch.equal(item.tensor, _item(item.number).tensor) for item in items), "none was written over"
    assert len({item.pid for item in items}) == min(num_workers, count)
    assert os.getpid() not in {item.pid for item in items}


def test_tensors_of_every_type_shape_and_stride_arrive_as_they_were(tmp_path: Path) -> None:
    file = os.memfd_create("test")
    base = torch.arange(24).view(2, 3, 4)
    tensors = [base.to(kind) for kind in (torch.uint8, torch.int64, torch.float32, torch.bfloat16, torch.bool)]
    tensors += [base.permute(2, 0, 1), base[:, 1], base.T[1:], torch.empty(0, 3), torch.tensor(7.5)]
    for place in (0, 3):
        found = unpack(pack({"a": tensors, "b": (1, "é")}, file, place))
        assert found["b"] == (1, "é")
        for one, other in zip(found["a"], tensors, strict=True):
            assert one.dtype == other.dtype
            assert torch.equal(one, other)
    os.close(file)


def test_a_worker_is_ahead_by_no_more_than_it_may(tmp_path: Path) -> None:
    def make(number: int) -> int:
        (tmp_path / str(number)).touch()
        return number

    with closing(_made(make, 100, num_workers=2, num_ahead=3)) as items:
        assert next(items) == 0
        end = time.monotonic() + 30
        while len(list(tmp_path.iterdir())) < 7 and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(0.1)
        assert sorted(int(path.name) for path in tmp_path.iterdir()) == [0, 1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGUSR2])
def test_a_killed_worker_is_named_at_once(number: signal.Signals) -> None:
    items = _made(_item, 10_000)
    with _first_worker(items) as pid:
        os.kill(pid, number)
        start = time.monotonic()
        with pytest.raises(WorkerError, match=rf"data worker 0 \(pid {pid}\) died: killed by {number.name}") as caught:
            list(items)
        assert time.monotonic() - start < 30  # not the time-out of 60 s
        assert caught.value.code == 82


def test_a_worker_that_exits_is_named_with_its_code() -> None:
    def make(number: int) -> int:
        if number == 3:
            os._exit(7)
        return number

    items = _made(make, 10)
    assert [next(items) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(WorkerError, match=r"data worker 1 \(pid \d+\) died: ended with exit code 7"):
        next(items)


def test_a_stopped_worker_is_named_after_the_time_out_and_does_not_outlive_it() -> None:
    items = _made(_item, 10_000, timeout=0.4)
    with _first_worker(items) as pid:
        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(WorkerError, match=rf"data worker 0 \(pid {pid}\) hangs: no answer for 0.4 seconds"):
            list(items)


def test_another_thread_may_interrupt_the_wait_for_an_item() -> None:
    interruption = threading.Event()

    def make(number: int) -> int:
        time.sleep(60 * number)
        return number

    items = made_by_workers(make, range(2), num_workers=1, num_ahead=1, timeout=60, interruption=interruption)
    assert next(items) == 0
    threading.Timer(0.1, interruption.set).start()
    start = time.monotonic()
    with pytest.raises(WorkerError, match="interrupted"):
        next(items)
    assert time.monotonic() - start < 30


def test_a_worker_that_takes_longer_than_a_slice_of_the_time_out_is_waited_for() -> None:
    def make(number: int) -> int:
        time.sleep(1.2)
        return number

    assert list(_made(make, 1, timeout=5)) == [0]


def test_workers_ignore_the_signals_that_a_batch_queue_sends_to_all() -> None:
    with closing(_made(_item, 60)) as items:
        pids = {next(items).pid for _ in range(2)}
        for pid in pids:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
                os.kill(pid, number)
        assert {item.pid for item in items} == pids


def test_a_signal_while_workers_are_started_leaves_none_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    fork = os.fork

    def interrupted() -> int:
        if (pid := fork()) > 0:
            signal.pthread_kill(threading.get_ident(), signal.SIGINT)
        return pid

    monkeypatch.setattr(os, "fork", interrupted)
    before, others = signal.signal(signal.SIGINT, signal.default_int_handler), _children()
    try:
        with pytest.raises(KeyboardInterrupt):
            next(_made(_item, 9))
        assert _children() <= others
    finally:
        signal.signal(signal.SIGINT, before)


def test_errors_arrive_as_they_were_raised_after_the_items_before_them() -> None:
    errors = (
        DataError("what", "cause", "remedy"),
        RecipeError("what", "cause", problems=("a:1:2: b",)),
        KeyError("missing"),
    )
    for error in errors:

        def make(number: int, error: Exception = error) -> int:
            if number == 4:
                raise error
            return number

        received = []
        with pytest.raises(type(error)) as caught:
            received.extend(_made(make, 10))
        assert caught.value.args == error.args
        assert str(caught.value) == str(error)
        assert {k: v for k, v in vars(caught.value).items() if k != "__notes__"} == vars(error)
        assert "in make" in caught.value.__notes__[0], "the traceback of the worker is told"
        assert received == [0, 1, 2, 3]


def test_an_error_that_cannot_travel_says_what_it_said() -> None:
    class Local(Exception):
        pass

    def make(number: int) -> Any:
        if number:
            return lambda: None
        raise Local("the words")

    with pytest.raises(RuntimeError, match="the words"):
        list(_made(make, 1))
    with pytest.raises(Exception, match="lambda"):
        list(made_by_workers(make, [1], num_workers=1, num_ahead=1, timeout=60))


def test_pools_opened_and_closed_again_and_again_leave_nothing() -> None:
    def make(number: int) -> Tensor:
        return torch.full((50_000,), number, dtype=torch.uint8)

    for taken in range(20):
        with closing(_made(make, 1000)) as items:
            assert [int(next(items)[-1]) for _ in range(taken % 4)] == list(range(taken % 4))


def test_closing_does_not_wait_for_slow_or_stopped_workers() -> None:
    def make(number: int) -> int:
        if number > 1:
            time.sleep(60)
        return os.getpid()

    with closing(_made(make, 10)) as items:
        pid = next(items)
        os.kill(pid, signal.SIGSTOP)
        start = time.monotonic()
    assert time.monotonic() - start < 30


@pytest.mark.parametrize("where", ["main thread", "another thread"])
def test_workers_end_when_their_parent_is_killed(where: str) -> None:
    script = textwrap.dedent(
        """
        import os, sys, threading, time
        from ldm_cli.data.workers import made_by_workers

        def run():
            items = made_by_workers(lambda n: os.getpid(), range(10**9), num_workers=3, num_ahead=2, timeout=60)
            more = made_by_workers(lambda n: os.getpid(), range(10**9), num_workers=2, num_ahead=2, timeout=60)
            pids = [next(items) for _ in range(3)] + [next(more) for _ in range(2)]
            os.write(1, (" ".join(map(str, pids)) + "\\n").encode())
            while True:
                next(items)

        if sys.argv[1] == "main thread":
            run()
        else:
            threading.Thread(target=run, daemon=True).start()
            time.sleep(60)
        """
    )
    with subprocess.Popen([sys.executable, "-c", script, where], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pids = [int(word) for word in parent.stdout.readline().split()]
        assert len(set(pids)) == 5
        parent.kill()
        parent.wait()
        deadline = time.monotonic() + 5
        while any(map(_alive, pids)) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not any(map(_alive, pids))


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
