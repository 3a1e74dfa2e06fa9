"""Near-duplicates: copies are found, other pictures are not, and what is written leaves them out of a run."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ldm_cli.cli.app import run as ldm
from ldm_cli.data import near_pairs as search
from ldm_cli.data.config import DataConfig
from ldm_cli.data.decode import from_pillow
from ldm_cli.data.duplicates import find_duplicates, report_duplicates
from ldm_cli.data.near_pairs import Pairs, near_pairs
from ldm_cli.data.open_shards import open_shards
from ldm_cli.data.signatures import SIDE, signatures, views
from ldm_cli.errors import InputNotFoundError, OutputError
from ldm_cli.reporting import SilentReporter

from .tars import png, write_tar

SILENT = SilentReporter()


def photo(seed: int, side: int = 80) -> Image.Image:
    """A smooth picture of random colours."""
    coarse = torch.rand(1, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    pixels = F.interpolate(coarse, (side, side), mode="bicubic").clamp(0, 1)[0]
    return Image.fromarray((255 * pixels).byte().permute(1, 2, 0).contiguous().numpy())


def saved(image: Image.Image, form: str = "PNG", **options: int) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


COPIES: dict[str, Callable[[Image.Image], bytes]] = {
    "jpeg": lambda image: saved(image, "JPEG", quality=40),
    "left_top_crop": lambda image: saved(image.crop((0, 0, 76, 76))),
    "crop": lambda image: saved(image.crop((3, 1, 79, 77))),
    "mirrored": lambda image: saved(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)),
    "smaller": lambda image: saved(image.resize((31, 31))),
    "mirrored_crop": lambda image: saved(image.crop((4, 4, 80, 80)).transpose(Image.Transpose.FLIP_LEFT_RIGHT)),
}


def thumbnails(*images: Image.Image) -> Tensor:
    return torch.cat([from_pillow(image.resize((SIDE, SIDE), Image.Resampling.BOX)) for image in images])


def write(path: Path, pictures: dict[str, bytes]) -> str:
    members = [(f"{key}.{kind}", data) for key, picture in pictures.items() for kind, data in (("png", picture),)]
    return str(write_tar(path, members))


def test_a_signature_is_the_cosine_transform_of_a_wave() -> None:
    """cos(3 π x) has one coefficient; added to grey it leaves only that, and the brightness of a blank picture."""
    x = (torch.arange(SIDE) + 0.5) / SIDE
    grey = 127.5 + 100 * torch.cos(3 * math.pi * x)
    picture = grey.round().byte().expand(1, 3, SIDE, SIDE)
    signature = signatures(picture)[0]
    assert signature.argmax() == 3
    assert float(signature[3]) > 0.97
    assert float(signature[:64].square().sum() - signature[3] ** 2) < 1e-4
    assert float(signature[64:96].abs().max()) < 1e-4, "grey has no colour"


def test_a_view_is_the_signature_of_the_mirrored_or_cropped_picture() -> None:
    image = photo(0, 320)
    plain = thumbnails(image)
    torch.testing.assert_close(signatures(plain, mirror=True), signatures(plain.flip(-1)))
    cut = thumbnails(image.crop((0, 16, 304, 320)))
    view = signatures(plain, part=(0.0, 0.05, 0.95))
    assert float((view * signatures(cut)).sum()) > 0.998
    assert float((signatures(plain) * signatures(cut)).sum()) < 0.99
    assert len(views()) == 20
    assert torch.equal(views()[0](plain), signatures(plain))


@pytest.mark.parametrize("kind", COPIES)
def test_copies_are_found_in_other_shards(tmp_path: Path, kind: str) -> None:
    own = write(tmp_path / "own.tar", {str(k): saved(photo(k)) for k in range(8)})
    other = write(tmp_path / "other.tar", {"a": COPIES[kind](photo(5)), "b": saved(photo(100))})
    found = find_duplicates(DataConfig(shards=own), tmp_path / "out.jsonl", other, 0.98, SILENT)
    assert [(pair["first"], pair["second"]) for pair in found["most_similar"]] == [("other/a", "own/5")]
    assert (found["samples"], found["pairs"], found["shared_pairs"], found["left_out"]) == (8, 0, 1, 1)


def test_the_written_list_is_a_quarantine_that_leaves_the_first_of_each_group(tmp_path: Path) -> None:
    pictures = {str(k): saved(photo(k)) for k in range(4)}
    pictures |= {kind: copy(photo(2)) for kind, copy in COPIES.items() if "crop" not in kind}
    shards, file = write(tmp_path / "a.tar", {**pictures, "broken": b"no picture"}), tmp_path / "out.jsonl"
    found = find_duplicates(DataConfig(shards=shards), file, None, 0.98, SILENT)
    assert (found["groups"], found["left_out"], found["shared"], found["recall"]) == (1, 3, 0, 1.0)
    assert found["pairs"] == 6, "each of four with each"
    config = DataConfig(shards=shards, quarantine=str(file))
    kept = open_shards(shards, config, SILENT)
    assert [kept.indexes[0].key(number) for number in range(kept.num_samples)] == ["0", "1", "2", "3", "broken"]
    assert find_duplicates(config, tmp_path / "again.jsonl", None, 0.98, SILENT)["pairs"] == 0
    with pytest.raises(OutputError, match="exists already"):
        find_duplicates(config, file, None, 0.98, SILENT)


def test_blank_pictures_of_one_brightness_are_duplicates_and_colours_count(tmp_path: Path) -> None:
    blank = {"white": png((255, 255, 255)), "white2": png((255, 255, 255), (30, 30)), "black": png((0, 0, 0))}
    colours = {"red": png((220, 30, 30)), "blue": png((30, 30, 220))}
    shards = write(tmp_path / "a.tar", blank | colours)
    found = find_duplicates(DataConfig(shards=shards), tmp_path / "out.jsonl", None, 0.98, SILENT)
    assert [(pair["first"], pair["second"]) for pair in found["most_similar"]] == [("a/white", "a/white2")]
    broken = write(tmp_path / "b.tar", {"0": b"x"})
    with pytest.raises(InputNotFoundError, match="none can be decoded"):
        find_duplicates(DataConfig(shards=broken), tmp_path / "out2.jsonl", None, 0.98, SILENT)


def test_a_chain_keeps_what_is_near_to_nothing_kept(tmp_path: Path) -> None:
    """0–1, 1–2, 2–3: 1 goes because of 0, so 2 stays, and 3 goes because of 2."""
    first, second = torch.tensor([0, 1, 2]), torch.tensor([1, 2, 3])
    pairs = Pairs(first, second, torch.tensor([0.99, 0.98, 0.985]), None)
    found = report_duplicates("s/{}".format, (0, 4), pairs, 0.98, tmp_path / "a.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [(line["shard"], line["key"], line["reason"]) for line in lines] == [
        ("s.tar", "1", "duplicate"),
        ("s.tar", "3", "duplicate"),
    ]
    assert (found["groups"], found["most_similar"][0]["cosine"]) == (2, pytest.approx(0.99))
    shared = report_duplicates("s/{}".format, (2, 2), pairs, 0.98, tmp_path / "b.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "b.jsonl").read_text().splitlines()]
    assert [(line["key"], line["reason"]) for line in lines] == [("2", "in the other set")]
    assert (shared["samples"], shared["pairs"], shared["shared_pairs"], shared["shared"]) == (2, 1, 1, 1)


@pytest.fixture
def vectors() -> Tensor:
    """1200 around 20 themes, of which 60 copy others."""
    generator = torch.Generator().manual_seed(0)
    themes = torch.randn(20, 24, generator=generator)[torch.arange(1200) % 20]
    rows = themes + 0.7 * torch.randn(1200, 24, generator=generator)
    rows[-60:] = 3 * (rows[:60] + 0.1 * torch.randn(60, 24, generator=generator))
    return rows


def exact(vectors: Tensor, threshold: float) -> dict[tuple[int, int], float]:
    unit = F.normalize(vectors.double(), dim=1)
    cosines = (unit @ unit.T).triu(1)
    return {(int(i), int(j)): float(cosines[i, j]) for i, j in (cosines >= threshold).nonzero()}


def test_few_vectors_are_compared_all_with_all(vectors: Tensor) -> None:
    pairs = near_pairs(vectors, [vectors.__getitem__], 0.9, SILENT)
    found = dict(
        zip(zip(pairs.first.tolist(), pairs.second.tolist(), strict=True), pairs.similarity.tolist(), strict=True)
    )
    assert found == pytest.approx(exact(vectors, 0.9))
    assert list(found) == sorted(found, key=lambda pair: pair[::-1])
    assert pairs.recall == 1.0


def test_many_vectors_are_compared_within_cells_and_the_recall_is_measured(
    vectors: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "_FEW", 100)
    monkeypatch.setattr(search, "_ROWS", 500)
    monkeypatch.setattr(search, "_NUM_CHECKED", 1200)
    monkeypatch.setattr(search, "_BLOCK", 4000)
    truth = exact(vectors, 0.9)
    for num_probes, least in ((8, 0.97), (1, 0.5)):
        monkeypatch.setattr(search, "_NUM_PROBES", num_probes)
        pairs = near_pairs(vectors.half(), [vectors.__getitem__], 0.9, SILENT)
        found = set(zip(pairs.first.tolist(), pairs.second.tolist(), strict=True))
        assert len(found & set(truth)) / len(truth) >= least
        assert pairs.recall == pytest.approx(len(found & set(truth)) / len(truth), abs=0.02)
    assert pairs.recall is not None
    assert pairs.recall < 1


def test_thousands_of_equal_vectors_take_little_memory_and_one_stays(tmp_path: Path) -> None:
    pairs = near_pairs(torch.ones(3000, 4), [lambda rows: torch.ones(rows.stop - rows.start, 4)], 0.98, SILENT)
    assert len(pairs.first) < 3000 * 101
    found = report_duplicates("s/{}".format, (0, 3000), pairs, 0.98, tmp_path / "a.jsonl")
    assert (found["groups"], found["left_out"]) == (1, 2999)


def test_check_tells_of_duplicates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    members = [
        (f"{k}.{kind}", saved(photo(k % 3)) if kind == "png" else b"a text")
        for k in range(4)
        for kind in ("png", "txt")
    ]
    write_tar(tmp_path / "a.tar", members)
    write_tar(tmp_path / "v.tar", members[2:4])
    assert ldm(["data", "check", "a.tar", "--duplicates", "out.jsonl", "--against", "v.tar", "--json"]) == 0
    result = json.loads(capfd.readouterr().out)["duplicates"]
    assert (result["pairs"], result["shared"], result["left_out"]) == (1, 1, 2)
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 2
