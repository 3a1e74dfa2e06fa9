"""The width of edges, in closed form."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.edges import edge_width, pictures
from ldm_cli.pictures.images import save_image, to_pillow


def ramp(width: int, size: int = 64) -> Tensor:
    """A bright column on black whose sides rise evenly over `width` steps."""
    rising = torch.linspace(0, 200, width + 1)[1:]
    line = torch.cat([torch.zeros(10), rising, torch.full((20,), 200.0), rising.flip(0)])
    line = torch.nn.functional.pad(line, (0, size - len(line)))
    return line.to(torch.uint8).expand(3, size, size)


@pytest.mark.parametrize("width", [1, 2, 5, 10])
def test_an_edge_that_rises_evenly_over_w_pixels_is_w_wide(width: int) -> None:
    assert edge_width(ramp(width)) == pytest.approx(width, rel=0.01)


def test_noise_below_a_twentieth_of_the_contrast_does_not_count() -> None:
    noise = torch.randint(0, 3, (3, 64, 64), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    assert edge_width(ramp(1) + noise) == pytest.approx(1, rel=0.05)


def test_pictures_come_from_folders_and_from_shards_up_to_their_number(tmp_path: Path) -> None:
    for index in range(3):
        save_image(tmp_path / f"{index:05d}.png", ramp(index + 1))
    save_image(tmp_path / "grid.png", ramp(9))
    with tarfile.open(tmp_path / "val-0.tar", "w") as archive:
        for index in range(3):
            file = io.BytesIO()
            to_pillow(ramp(index + 1)).save(file, "PNG")
            entry = tarfile.TarInfo(f"{index}.png")
            entry.size = len(file.getvalue())
            archive.addfile(entry, io.BytesIO(file.getvalue()))
    for place in (str(tmp_path), f"{tmp_path}/val-*.tar"):
        assert [edge_width(image) for image in pictures(place, 2)] == pytest.approx([1, 2], rel=0.01)
        assert len(list(pictures(place, 9))) == 3
