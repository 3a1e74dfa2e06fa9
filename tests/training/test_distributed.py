"""Ranks as real processes: what they exchange, what they agree on, and how each learns that another is gone."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from torch.distributed import HashStore

from ldm_cli.errors import LdmError, Preempted, UsageError, WorkerError
from ldm_cli.training import distributed, gradient_buckets
from ldm_cli.training.distributed import joined
from ldm_cli.training.muon import Muon
from ldm_cli.training.rank_watch import RankWatch
from ldm_cli.training.ranks import Ranks

from .forked import ForkedRanks

CPU = torch.device("cpu")


def failing(rank_error: Exception, rank: int, timeout: float = 60.0) -> int:
    """A rank that goes on until another is gone; rank 1 raises. The exit code is that of the error."""
    try:
        with joined(CPU, timeout) as ranks:
            if rank == 1:
                raise rank_error
            for _ in range(10_000):
                ranks.wait()
                time.sleep(0.01)
    except LdmError as error:
        os.write(2, str(error).encode())
        return error.code
    return 0


def exchange(rank: int) -> int:
    with joined(CPU, 60.0) as ranks:
        assert (ranks.rank, ranks.world_size, ranks.is_first) == (rank, 2, rank == 0)
        tensors = [torch.tensor([1.0, 2.0]) + 10 * rank, torch.full((2, 2), float(rank + 1)), torch.tensor(0.5)]
        ranks.sum_in_place(tensors)
        assert [t.tolist() for t in tensors] == [[12.0, 14.0], [[3.0, 3.0], [3.0, 3.0]], 1.0]
        copied = torch.tensor([float("nan"), 0.1]) if rank == 1 else torch.zeros(2)
        ranks.copy_from(1, copied)
        assert copied.isnan().tolist() == [True, False]
        assert copied[1] == torch.tensor(0.1)
        rows = torch.arange(6).view(2, 3).T + 100 * rank  # not contiguous
        assert ranks.gathered(rows).tolist() == [[0, 3], [1, 4], [2, 5], [100, 103], [101, 104], [102, 105]]
        assert ranks.texts("é" * rank) == ["", "é"]
        assert ranks.texts("") == ["", ""]
        assert ranks.from_first(f"from {rank}") == "from 0"
        assert ranks.largest(-rank) == 0
        assert ranks.largest(rank) == 1
    return 0


def test_two_processes_exchange_tensors_texts_and_numbers(tmp_path: Path) -> None:
    with ForkedRanks(exchange, tmp_path) as job:
        assert job.wait() == [0, 0], job.words()


def test_messages_of_several_buckets_add_up_to_the_same_sums(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradient_buckets, "_BUCKET_SIZE", 5)

    def work(rank: int) -> int:
        with joined(CPU, 60.0) as ranks:
            tensors = [torch.full((size,), float(size + rank)) for size in (3, 4, 9, 1, 1)]
            ranks.sum_in_place(tensors)
            assert [t.tolist() for t in tensors] == [[2.0 * size + 1] * size for size in (3, 4, 9, 1, 1)]
        return 0

    with ForkedRanks(work, tmp_path) as job:
        assert job.wait() == [0, 0], job.words()


def test_rank_0_goes_first_through_what_it_caches(tmp_path: Path) -> None:
    def work(rank: int) -> int:
        with joined(CPU, 60.0) as ranks, ranks.first_then_others():
            if rank == 0:
                time.sleep(0.3)
                (tmp_path / "cached").touch()
            assert (tmp_path / "cached").exists()
        return 0

    with ForkedRanks(work, tmp_path) as job:
        assert job.wait() == [0, 0], job.words()


def test_ranks_that_differ_are_refused_and_both_values_are_named(tmp_path: Path) -> None:
    def work(rank: int) -> int:
        with joined(CPU, 60.0) as ranks:
            ranks.expect_equal({"recipe": "one", "torch": "2"})
            message = r"rank 1 of 2 has another recipe: seed than rank 0: '1' instead of '0'"
            with pytest.raises(UsageError, match=message):
                ranks.expect_equal({"torch": "2", "recipe: seed": str(rank)})
        return 0

    with ForkedRanks(work, tmp_path) as job:
        assert job.wait() == [0, 0], job.words()


def test_a_rank_that_raises_gives_its_own_words_to_the_others(tmp_path: Path) -> None:
    with ForkedRanks(lambda rank: failing(ZeroDivisionError("in the model"), rank), tmp_path) as job:
        assert job.wait() == [WorkerError.code, 1]
        words = "rank 1 of 2 failed: ZeroDivisionError: in the model; run the same command again [E-WORKER]"
        assert job.words()[0] == words


@pytest.fixture
def short_telling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks give a lost one half a second to say why."""
    monkeypatch.setattr(distributed, "TELLING", 0.5)


@pytest.mark.usefixtures("short_telling")
def test_a_rank_that_is_preempted_is_no_failure_to_announce(tmp_path: Path) -> None:
    with ForkedRanks(lambda rank: failing(Preempted("stopped"), rank), tmp_path) as job:
        assert job.wait() == [WorkerError.code, Preempted.code]
        assert job.words()[0].startswith("lost another rank")


@pytest.mark.usefixtures("short_telling")
@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.exhaustive)])
def test_a_killed_rank_is_noticed_long_before_the_time_out(tmp_path: Path, victim: int) -> None:
    def work(rank: int) -> int:
        (tmp_path / f"pid{rank}").touch()
        return failing(RuntimeError(), rank=0)

    with ForkedRanks(work, tmp_path) as job:
        while len(list(tmp_path.glob("pid*"))) < 2:
            time.sleep(0.01)
        time.sleep(0.5)
        job.send(victim, signal.SIGKILL)
        began = time.monotonic()
        assert job.wait([1 - victim]) == [WorkerError.code]
        assert time.monotonic() - began < 30, "the time-out is 60 s"


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.exhaustive)])
def test_a_stopped_rank_is_missed_after_the_time_out(tmp_path: Path, victim: int) -> None:
    """Each of them stops itself where no connection breaks."""

    def work(rank: int) -> int:
        try:
            with joined(CPU, 1.0) as ranks:
                ranks.wait()
                if rank == victim:
                    os.kill(os.getpid(), signal.SIGSTOP)
                ranks.wait()
        except LdmError as error:
            os.write(2, str(error).encode())
            return error.code
        return 0

    with ForkedRanks(work, tmp_path) as job:
        assert job.wait([1 - victim]) == [WorkerError.code]
        assert f"rank {victim} of 2 is lost: it has sent nothing for 1 s" in job.words()[1 - victim]


def test_a_wait_for_the_device_ends_when_another_rank_is_lost(tmp_path: Path) -> None:
    """The device is busy with a sum that the lost rank never sends."""

    class Event:
        def __init__(self, is_done_after: int) -> None:
            self.asked, self.is_done_after = 0, is_done_after

        def query(self) -> bool:
            self.asked += 1
            return self.asked > self.is_done_after

    def work(rank: int) -> int:
        try:
            with joined(CPU, 1.0) as ranks:
                ranks.wait_for(Event(5))  # type: ignore[arg-type]
                ranks.wait()
                if rank == 1:
                    os.kill(os.getpid(), signal.SIGKILL)
                ranks.wait_for(Event(10**9))  # type: ignore[arg-type]
        except LdmError as error:
            os.write(2, str(error).encode())
            return error.code
        return 0

    began = time.monotonic()
    with ForkedRanks(work, tmp_path) as job:
        assert job.wait() == [WorkerError.code, -signal.SIGKILL]
        assert "rank 1 of 2 is lost: it has sent nothing for 1 s" in job.words()[0]
    assert time.monotonic() - began < 20


def test_a_process_that_cannot_ask_ends_when_another_rank_is_lost(tmp_path: Path) -> None:
    def work(rank: int) -> int:
        with joined(CPU, 1.0) as ranks:
            assert isinstance(ranks, distributed._ConnectedRanks)
            ranks._watch.ends_process = True
            ranks.wait()
            if rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)  # stands for a launch that waits for room in the GPU's queue
        return 0

    began = time.monotonic()
    with ForkedRanks(work, tmp_path) as job:
        assert job.wait() == [WorkerError.code, -signal.SIGKILL]
    assert time.monotonic() - began < 30


def test_two_threads_that_ask_do_not_make_the_store_silent_for_twice_as_long() -> None:
    watch = RankWatch(HashStore(), rank=0, world_size=1, timeout=2.0)  # does not run: its beats stand still
    for ask in (0, 1):
        threads = [threading.Thread(target=watch.asked) for _ in range(3)]
        for thread in threads:
            thread.start()
            thread.join()
        assert watch.asked() is None, ask
    for _ in range(3):
        assert watch.failure is None
        watch.asked()
    assert watch.failure == ("rank 0 of 1 is lost", "it has sent nothing for 2 s")


def test_a_slow_rank_is_waited_for_as_long_as_it_gives_signs_of_life(tmp_path: Path) -> None:
    def work(rank: int) -> int:
        with joined(CPU, 1.0) as ranks:
            time.sleep(2.0 * (rank == 0))
            ranks.wait()
        return 0

    with ForkedRanks(work, tmp_path) as job:
        assert job.wait() == [0, 0], job.words()


@pytest.mark.parametrize(
    ("shapes", "shared"),
    [
        ([(6, 4), (4, 4), (8, 3, 3, 3), (5, 7), (2, 9)], False),
        ([(6, 4), (300, 260), (256, 32, 3, 3), (260, 300), (300, 300)], True),
    ],
)
def test_muon_on_two_ranks_takes_the_steps_of_one_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shapes: list[tuple[int, ...]], shared: bool
) -> None:
    told: list[int] = []
    tell = distributed._ConnectedRanks.sum_in_place
    monkeypatch.setattr(
        distributed._ConnectedRanks, "sum_in_place", lambda self, t: told.append(len(t)) or tell(self, t)
    )

    def stepped(ranks: Ranks) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(1)
        parameters = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
        optimizer = Muon(parameters, lr=0.1, weight_decay=0.1, ranks=ranks)
        for _ in range(3):
            for parameter in parameters:
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()
        return [parameter.detach() for parameter in parameters]

    expected = stepped(Ranks())

    def work(rank: int) -> int:
        with joined(CPU, 60.0) as ranks:
            assert all(torch.equal(a, b) for a, b in zip(stepped(ranks), expected, strict=True))
        assert told == [len(shapes)] * 3 * shared
        return 0

    with ForkedRanks(work, tmp_path) as job:
        assert job.wait() == [0, 0], job.words()


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "1"}, "RANK=1, WORLD_SIZE=, LOCAL_RANK="),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK=x"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "impossible: RANK=2, WORLD_SIZE=2"),
    ],
)
def test_a_contradictory_environment_is_refused(
    environment: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=message), joined(CPU, 60.0):
        pass


def test_a_process_without_a_launcher_is_a_job_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with joined(CPU, 60.0) as ranks:
        assert (ranks.rank, ranks.world_size, ranks.texts("a"), ranks.largest(3)) == (0, 1, ["a"], 3)


def test_an_impossible_rank_is_misuse() -> None:
    with pytest.raises(ValueError, match=r"rank=2 is not in \[0, world_size=2\)"):
        Ranks(2, 2)
