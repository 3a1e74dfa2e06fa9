"""Batches are on the device before they are needed: the order of copies, events and streams, with a stub of CUDA."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm_cli.data import to_device
from ldm_cli.data.batch import Batch
from ldm_cli.data.to_device import sent_to_device

CUDA = torch.device("cuda", 1)


@dataclass
class Stream:
    """What a thread has told a stream to do, in order; the work itself is done when `run` is called."""

    device: torch.device
    work: list[Callable[[], None]]

    def record_event(self) -> SimpleNamespace:
        event = SimpleNamespace(done=False, stream=self)
        self.work.append(lambda: setattr(event, "done", True))
        return event

    def wait_event(self, event: Any) -> None:
        self.work.append(lambda: event.stream.run(event))

    def run(self, until: Any = None) -> None:
        while self.work and not (until and until.done):
            self.work.pop(0)()


class Streams:
    """A stub of `torch.cuda`: a current stream for each thread."""

    def __init__(self) -> None:
        self.of_thread: dict[int, Stream] = {}

    def Stream(self, device: torch.device) -> Stream:
        return Stream(device, [])

    def set_stream(self, stream: Stream) -> None:
        self.of_thread[threading.get_ident()] = stream

    def current_stream(self, device: torch.device) -> Stream:
        default = Stream(torch.device("cuda", 0), [])
        return self.of_thread.setdefault(threading.get_ident(), default)


@dataclass
class Words:
    """A stub of a batch and of its memory."""

    content: str
    used_by: list[Stream] = field(default_factory=list)

    def map(self, change: Callable[[Any], Any]) -> Words:
        raise NotImplementedError

    def record_stream(self, stream: Stream) -> None:
        self.used_by.append(stream)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Streams:
    stub = Streams()

    def sent(item: Words, device: torch.device) -> tuple[Words, Words]:
        """The content is there when the stream comes to the copy, and not before."""
        stream, pinned, target = stub.current_stream(device), item.content, Words("not copied yet")
        assert stream.device == CUDA, "the thread works on its own device"
        stream.work.append(lambda: setattr(target, "content", pinned))
        return target, target

    monkeypatch.setattr(to_device, "_sent", sent)
    for name in ("Stream", "set_stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, getattr(stub, name))
    return stub


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = threading.active_count()
    yield
    assert threading.active_count() == before


def source(made: list[int], count: int = 6) -> Generator[Words]:
    """One buffer that is written again for each item, as a reader's would be."""
    try:
        buffer = Words("")
        for number in range(count):
            made.append(threading.get_ident())
            buffer.content = str(number)
            yield buffer
    finally:
        made.append(-1)


def test_the_steps_stream_waits_for_the_copies_of_a_thread_and_the_host_does_not(cuda: Streams) -> None:
    made: list[int] = []
    here = threading.get_ident()
    step = cuda.current_stream(CUDA)
    seen = []
    for item in sent_to_device(source(made), CUDA):
        assert item.used_by == [step], "its memory is kept until the step has used it"
        time.sleep(0.02)  # the next ones are made and sent meanwhile
        step.work.append(lambda item=item: seen.append(item.content))  # type: ignore[misc]
        assert seen == [], "nobody has waited"
    step.run()
    assert seen == list("012345")
    assert made[0] == here, "processes that the source starts belong to the consumer's thread"
    assert here not in made[1:]
    assert len(cuda.of_thread) == 2


def test_items_are_prepared_before_the_copy(cuda: Streams) -> None:
    prepare = lambda item: Words(f"<{item.content}>")  # noqa: E731
    items = list(sent_to_device(source([]), CUDA, prepare))
    cuda.current_stream(CUDA).run()
    assert [item.content for item in items] == ["<0>", "<1>", "<2>", "<3>", "<4>", "<5>"]


def test_only_a_few_items_are_on_the_device_ahead_of_the_step(cuda: Streams) -> None:
    made: list[int] = []
    given = source(made, 100)
    with closing(sent_to_device(given, CUDA)) as items:
        next(items)
        time.sleep(0.1)
        assert len(made) <= 4
    assert made[-1] == -1, "the source is closed"


def test_a_wait_of_the_source_is_interrupted_at_the_end(cuda: Streams) -> None:
    interruption = threading.Event()

    def waiting() -> Generator[Words]:
        yield Words("first")
        assert interruption.wait(60)

    start = time.monotonic()
    with closing(sent_to_device(waiting(), CUDA, interrupt=interruption.set)) as items:
        next(items)
    assert time.monotonic() - start < 30


def test_an_error_of_the_source_comes_after_the_items_before_it(cuda: Streams) -> None:
    def failing(count: int) -> Generator[Words]:
        yield from source([], count)
        raise KeyError("end")

    for count in (0, 1, 3):
        items: list[Words] = []
        with pytest.raises(KeyError, match="end"):
            items.extend(sent_to_device(failing(count), CUDA))
        assert len(items) == count
    assert list(sent_to_device(source([], 0), CUDA)) == []


def batch(number: int, images: Tensor) -> Batch:
    counter = torch.full((2,), number)
    moments = {"mean": (counter + 0.5).to(torch.bfloat16)}
    return Batch(
        images, ["a", "b"], counter, ["s/a", "s/b"], counter, counter, moments=moments, tokens={"ids": counter}
    )


def test_for_the_cpu_there_is_no_thread_and_no_copy() -> None:
    given = batch(3, torch.ones(2, 3, 8, 8))
    made: list[int] = []

    def batches() -> Generator[Batch]:
        made.append(threading.get_ident())
        yield given

    (found,) = sent_to_device(batches(), torch.device("cpu"))
    assert found is given
    assert made == [threading.get_ident()]


def test_a_batch_is_one_copy_and_holds_the_same_numbers() -> None:
    images = torch.arange(2 * 3 * 5 * 7, dtype=torch.uint8).view(2, 3, 5, 7)
    for pictures in (images, images[:, :0], images.permute(0, 3, 1, 2)):
        given = batch(3, pictures)
        found, memory = to_device._sent(given, torch.device("cpu"))
        assert torch.equal(found.images, given.images)
        assert found.images.dtype == torch.uint8
        assert (found.captions, found.keys, found.condition) == (given.captions, given.keys, None)
        assert found.labels is not None
        assert found.moments is not None
        for tensor in (found.labels, found.epoch, found.position, found.tokens["ids"]):
            assert tensor.tolist() == [3, 3]
        assert found.moments["mean"].dtype == torch.bfloat16
        assert found.moments["mean"].tolist() == [3.5, 3.5]
        memory.zero_()
        assert not found.images.any(), "the tensors are parts of one memory"
    (sent,) = sent_to_device((given for _ in range(1)), torch.device("meta"))
    assert sent.images.is_meta
    assert sent.tokens["ids"].is_meta


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_that_are_copied_ahead_equal_plain_copies() -> None:
    device = torch.device("cuda", torch.cuda.device_count() - 1)
    busy = torch.randn(2048, 2048, device=device)
    buffer = torch.empty(2, 3, 512, 512, dtype=torch.uint8)

    def batches() -> Generator[Batch]:
        for number in range(100):
            buffer.fill_(number)
            yield batch(number, buffer if number % 3 else torch.empty(2, 0, 0, 0, dtype=torch.uint8))

    sums = []
    for number, found in enumerate(sent_to_device(batches(), device)):
        for _ in range(number % 5):
            busy = busy @ busy / busy.norm()  # the device falls behind the host
        assert found.images.device == device
        assert found.moments is not None
        sums.append(
            found.images.double().sum() + 1000 * found.moments["mean"].double().sum() + found.tokens["ids"].sum()
        )
    expected = [
        (number * buffer.numel() if number % 3 else 0) + 2000 * (number + 0.5) + 2 * number for number in range(100)
    ]
    assert torch.stack(sums).tolist() == expected
