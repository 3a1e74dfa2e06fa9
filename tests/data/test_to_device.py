"""Batches are on the device before they are needed: the order of copies, events and streams, with a stub of CUDA."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm_cli.data.batch import Batch
from ldm_cli.data.to_device import on_device

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
    """A stub of `torch.cuda`: a current stream for each thread, and pinned memory that is reused after its copies."""

    def __init__(self) -> None:
        self.of_thread: dict[int, Stream] = {}
        self.pinned_in: set[int] = set()

    def Stream(self, device: torch.device) -> Stream:
        return Stream(device, [])

    def set_stream(self, stream: Stream) -> None:
        self.of_thread[threading.get_ident()] = stream

    def current_stream(self, device: torch.device) -> Stream:
        default = Stream(torch.device("cuda", 0), [])
        return self.of_thread.setdefault(threading.get_ident(), default)


class Words:
    """A stub of a tensor: its content is copied when the stream comes to it, and not before."""

    def __init__(self, cuda: Streams, content: str, place: str = "host") -> None:
        self.cuda, self.content, self.place = cuda, content, place
        self.used_by: list[Stream] = []

    def map(self, change: Callable[[Any], Any]) -> Words:
        changed: Words = change(self)
        return changed

    def pin_memory(self) -> Words:
        self.cuda.pinned_in.add(threading.get_ident())
        return Words(self.cuda, self.content, "pinned")

    def to(self, device: torch.device, *, non_blocking: bool) -> Words:
        assert (self.place, device, non_blocking) == ("pinned", CUDA, True)
        target, stream = Words(self.cuda, "not copied yet", "device"), self.cuda.current_stream(device)
        assert stream.device == CUDA, "the thread works on its own device"
        stream.work.append(lambda: setattr(target, "content", self.content))
        return target

    def record_stream(self, stream: Stream) -> None:
        self.used_by.append(stream)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Streams:
    stub = Streams()
    for name in ("Stream", "set_stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, getattr(stub, name))
    return stub


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = threading.active_count()
    yield
    assert threading.active_count() == before


def source(cuda: Streams, made: list[int], count: int = 6) -> Generator[Words]:
    """One buffer that is written again for each item, as a reader's would be."""
    try:
        buffer = Words(cuda, "")
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
    for item in on_device(source(cuda, made), CUDA):
        assert item.place == "device"
        assert item.used_by == [step], "its memory is kept until the step has used it"
        time.sleep(0.02)  # the next ones are made and sent meanwhile
        step.work.append(lambda item=item: seen.append(item.content))  # type: ignore[misc]
        assert seen == [], "nobody has waited"
    step.run()
    assert seen == list("012345")
    assert here not in cuda.pinned_in
    assert made[0] == here, "processes that the source starts belong to the consumer's thread"
    assert here not in made[1:]
    assert len(cuda.of_thread) == 2


def test_items_are_prepared_before_the_copy(cuda: Streams) -> None:
    prepare = lambda item: Words(cuda, f"<{item.content}>")  # noqa: E731
    items = list(on_device(source(cuda, []), CUDA, prepare))
    cuda.current_stream(CUDA).run()
    assert [item.content for item in items] == ["<0>", "<1>", "<2>", "<3>", "<4>", "<5>"]


def test_only_a_few_items_are_on_the_device_ahead_of_the_step(cuda: Streams) -> None:
    made: list[int] = []
    given = source(cuda, made, 100)
    with closing(on_device(given, CUDA)) as items:
        next(items)
        time.sleep(0.1)
        assert len(made) <= 4
    assert made[-1] == -1, "the source is closed"


def test_an_error_of_the_source_comes_after_the_items_before_it(cuda: Streams) -> None:
    def failing(count: int) -> Generator[Words]:
        yield from source(cuda, [], count)
        raise KeyError("end")

    for count in (0, 1, 3):
        items: list[Words] = []
        with pytest.raises(KeyError, match="end"):
            items.extend(on_device(failing(count), CUDA))
        assert len(items) == count
    assert list(on_device(source(cuda, [], 0), CUDA)) == []


def batch(number: int, images: Tensor) -> Batch:
    counter = torch.full((2,), number)
    moments = {"mean": counter + 0.5}
    return Batch(
        images, ["a", "b"], counter, ["s/a", "s/b"], counter, counter, moments=moments, tokens={"ids": counter}
    )


def test_on_the_cpu_there_is_no_thread_and_no_copy() -> None:
    given = batch(3, torch.ones(2, 3, 8, 8))
    made: list[int] = []

    def batches() -> Generator[Batch]:
        made.append(threading.get_ident())
        yield given

    (found,) = on_device(batches(), torch.device("cpu"))
    assert made == [threading.get_ident()]
    assert found.images is given.images
    assert found.tokens["ids"] is given.tokens["ids"]


def test_every_tensor_of_a_batch_is_mapped() -> None:
    mapped = batch(3, torch.ones(2, 1)).map(lambda tensor: tensor.to("meta"))
    assert mapped.labels is not None
    assert mapped.moments is not None
    tensors = [
        mapped.images,
        mapped.labels,
        mapped.epoch,
        mapped.position,
        mapped.moments["mean"],
        mapped.tokens["ids"],
    ]
    assert all(tensor.is_meta for tensor in tensors)
    assert (mapped.captions, mapped.keys, mapped.condition) == (["a", "b"], ["s/a", "s/b"], None)


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
    for number, found in enumerate(on_device(batches(), device)):
        for _ in range(number % 5):
            busy = busy @ busy / busy.norm()  # the device falls behind the host
        assert found.images.device == device
        assert found.moments is not None
        sums.append(found.images.double().sum() + 1000 * found.moments["mean"].sum() + found.tokens["ids"].sum())
    expected = [
        (number * buffer.numel() if number % 3 else 0) + 2000 * (number + 0.5) + 2 * number for number in range(100)
    ]
    assert torch.stack(sums).tolist() == expected
