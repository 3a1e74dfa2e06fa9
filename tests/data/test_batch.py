"""Batches and their parts."""

from __future__ import annotations

import torch

from ldm_cli.data.batch import Batch


def test_parts_of_a_batch_are_its_rows_in_every_field() -> None:
    batch = Batch(
        images=torch.arange(4),
        captions=["a", "b", "c", "d"],
        labels=None,
        keys=["s/0", "s/1", "s/2", "s/3"],
        epoch=torch.zeros(4),
        position=torch.arange(4),
        moments={"mean": torch.arange(4), "logvar": -torch.arange(4)},
        condition={"tokens": torch.arange(8).view(4, 2)},
    )
    first, second = batch.parts(2)
    assert (first.captions, second.captions) == (["a", "b"], ["c", "d"])
    assert second.labels is None
    assert second.moments is not None
    assert second.moments["logvar"].tolist() == [-2, -3]
    assert second.condition is not None
    assert second.condition["tokens"].tolist() == [[4, 5], [6, 7]]
    assert torch.cat([first.position, second.position]).tolist() == [0, 1, 2, 3]
