"""Work that ranks take turns in."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ldm_cli.training.ranks import Ranks
from ldm_cli.training.shared_work import in_turns


def test_no_result_is_fetched_before_all_work_is_asked_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fetch = Tensor.cpu
    monkeypatch.setattr(Tensor, "cpu", lambda tensor: events.append("fetch") or fetch(tensor))

    def work(item: int) -> Tensor:
        events.append("work")
        return torch.tensor(item)

    assert in_turns([3, 4], work, Ranks()) == [torch.tensor(3), torch.tensor(4)]
    assert events == ["work", "work", "fetch", "fetch"]
