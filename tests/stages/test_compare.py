"""`ldm compare` on small folders and shards: numbers, statistics files, and what cannot be compared."""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from ldm_cli.cli.app import run as run_program
from ldm_cli.core.models.dinov2 import Dinov2Model
from ldm_cli.core.models.dinov2_config import Dinov2Config
from ldm_cli.data.tokenizer import Tokenizer
from ldm_cli.data.tokenizer_config import TokenizerConfig
from ldm_cli.errors import DataError, InputNotFoundError, OutputError, UsageError
from ldm_cli.evaluation.config import PICTURE_METRICS
from ldm_cli.evaluation.dinov2_features import DINOv2Features
from ldm_cli.evaluation.frechet import Moments, frechet_distance
from ldm_cli.evaluation.kernel_distances import clip_maximum_mean_discrepancy, kernel_inception_distance
from ldm_cli.formats.npz import read_npz, write_npz
from ldm_cli.formats.save_model import save_model
from ldm_cli.reporting import SilentReporter
from ldm_cli.stages.compare import CompareOptions, run
from tests.evaluation.inception_weights import inception_weights

from ..training.forked import ForkedRanks
from .tiny import save_random_clip

SIDE = 24


def write_pictures(folder: Path, count: int, seed: int) -> Path:
    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    for i in range(count):
        coarse = torch.rand(1, 3, 3, 3, generator=generator) * 200 + 20 * seed
        pixels = F.interpolate(coarse, (SIDE, SIDE), mode="bilinear")[0].to(torch.uint8).permute(1, 2, 0)
        Image.fromarray(pixels.numpy()).save(folder / f"{i:03d}.png")
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the pictures `a` (30) and `b` (40), `inception.safetensors` and a CLIP in `clip`."""
    home = tmp_path_factory.mktemp("compare")
    write_pictures(home / "a", 30, 0)
    write_pictures(home / "b", 40, 1)
    save_file(inception_weights(), home / "inception.safetensors")
    tokenizer = Tokenizer.train(["a red circle"], TokenizerConfig())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_random_clip(home / "clip", tokenizer)
        dinov2 = Dinov2Model(Dinov2Config(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=28))
    save_model(home / "dinov2", dinov2.state_dict(), dinov2.config.to_hugging_face())
    return home


def options(home: Path, *metrics: Any, **changes: Any) -> CompareOptions:
    return replace(CompareOptions(metrics or ("fid",), home / "inception.safetensors", device="cpu"), **changes)


def compare(home: Path, a: str, b: str | None, *metrics: Any, **changes: Any) -> dict[str, Any]:
    second = None if b is None else str(home / b)
    return run(str(home / a), second, options(home, *metrics, **changes), SilentReporter())


def own_features(home: Path, name: str) -> Tensor:
    pictures = [torch.from_numpy(numpy.asarray(Image.open(file))) for file in sorted((home / name).iterdir())]
    pixels = torch.stack(pictures).permute(0, 3, 1, 2).float() / 255 * 2 - 1
    large = F.interpolate(pixels, (299, 299), mode="bilinear", align_corners=False)
    return F.adaptive_avg_pool2d(large, 2).flatten(1)


def networks_of(home: Path) -> dict[str, Path]:
    return {"clip": home / "clip", "dinov2": home / "dinov2"}


def dinov2_distance(home: Path) -> float:
    features = DINOv2Features(home / "dinov2", torch.device("cpu"))
    pictures = [
        [torch.from_numpy(numpy.array(Image.open(file))).permute(2, 0, 1) for file in sorted((home / name).iterdir())]
        for name in ("a", "b")
    ]
    a, b = (Moments.of(features(one)).gaussian for one in pictures)
    return frechet_distance(a, b)


@pytest.mark.usefixtures("small_inception")
def test_every_metric_is_that_of_the_pictures_features(home: Path) -> None:
    found = compare(home, "a", "b", *PICTURE_METRICS, preprocessing="pytorch-fid", batch_size=7, **networks_of(home))
    a, b = own_features(home, "a"), own_features(home, "b")
    assert found["fid"] == pytest.approx(frechet_distance(Moments.of(a).gaussian, Moments.of(b).gaussian), rel=1e-4)
    assert found["kid"] == pytest.approx(kernel_inception_distance(a, b)["kid"], rel=1e-4)
    low, high = found["fid_interval"]
    assert low < found["fid"] < high
    assert found["fid_infinity"] < found["fid"]
    assert all(0 <= found[name] <= 1 for name in ("precision", "recall", "coverage"))
    assert 1 < found["inception_score"] < 4
    assert found["cmmd"] > 0
    assert found["fd_dinov2"] == pytest.approx(dinov2_distance(home), rel=1e-6)
    provenance = found["provenance"]
    assert (provenance["generated"]["num_pictures"], provenance["real"]["num_pictures"]) == (30, 40)
    assert provenance["networks"]["inception"]["preprocessing"] == "pytorch-fid"
    assert len(provenance["networks"]["inception"]["sha256"]) == len(provenance["networks"]["clip"]["sha256"]) == 64


@pytest.mark.usefixtures("small_inception")
def test_the_preprocessing_changes_the_number_and_the_batch_size_does_not(home: Path) -> None:
    first, *others = (compare(home, "a", "b", preprocessing=name)["fid"] for name in ("torch-fidelity", "clean"))
    assert first != pytest.approx(others[0], rel=1e-5)
    assert compare(home, "a", "b", batch_size=3)["fid"] == pytest.approx(first, rel=1e-9)


@pytest.mark.usefixtures("small_inception")
def test_shards_and_a_folder_of_the_same_pictures_are_one_set(home: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        for file in sorted((home / "b").iterdir()):
            tar.add(file, file.name)
    found = compare(home, "b", str(tmp_path / "shard.tar"), "fid", "kid")
    assert found["fid"] == pytest.approx(0, abs=1e-6)
    assert found["provenance"]["generated"]["sha256"] == found["provenance"]["real"]["sha256"]


@pytest.mark.usefixtures("small_inception")
def test_of_a_folder_of_ours_the_grid_is_no_picture(home: Path, tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "job", 5, 2)
    (folder / "004.png").rename(folder / "grid.png")
    job = {"sampling": {"steps": 3}}
    listed = [{"file": f"{i:03d}.png", "seed": i} for i in range(4)]
    (folder / "images.json").write_text(json.dumps({"job": job, "images": listed}))
    about = compare(home, str(folder), "b")["provenance"]["generated"]
    assert (about["num_pictures"], about["job"]) == (4, job)
    (folder / "images.json").write_text(json.dumps({"images": [{"file_name": "000.png"}]}))  # of another program
    assert compare(home, str(folder), "b")["provenance"]["generated"]["num_pictures"] == 5


@pytest.mark.usefixtures("small_inception")
def test_saved_statistics_stand_for_the_pictures(home: Path, tmp_path: Path) -> None:
    file = tmp_path / "b.npz"
    found = compare(home, "a", "b", save_statistics=file, preprocessing="pytorch-fid")
    expected = Moments.of(own_features(home, "b")).gaussian
    with numpy.load(file) as arrays:
        assert numpy.allclose(arrays["mu"], expected.mean.numpy(), atol=1e-6)
        assert numpy.allclose(arrays["sigma"], expected.covariance.numpy(), atol=1e-6)
        assert int(arrays["n"]) == 40
    again = compare(home, "a", str(file), preprocessing="pytorch-fid")
    assert again["fid"] == pytest.approx(found["fid"], rel=1e-9)
    assert again["provenance"]["real"] == {**found["provenance"]["real"], "source": str(file)}
    alone = tmp_path / "alone.npz"
    assert set(compare(home, "b", None, save_statistics=alone, preprocessing="pytorch-fid")) == {"provenance"}
    assert compare(home, str(alone), str(file), inception=None)["fid"] == pytest.approx(0, abs=1e-9)
    with pytest.raises(OutputError, match=r"b\.npz' exists already"):
        compare(home, "a", "b", save_statistics=file)


@pytest.mark.usefixtures("small_inception")
def test_statistics_that_were_measured_otherwise_are_not_compared(home: Path, tmp_path: Path) -> None:
    file = tmp_path / "b.npz"
    compare(home, "b", None, save_statistics=file, preprocessing="clean")
    with pytest.raises(DataError, match="their preprocessing differ: torch-fidelity and clean"):
        compare(home, "a", str(file))
    arrays = {name: value for name, value in read_npz(file).items() if name in ("mu", "sigma")}
    write_npz(file, arrays)
    reporter = SilentReporter()
    few = write_pictures(tmp_path / "few", 5, 0)
    run(str(few), str(file), options(home), reporter)
    assert any("fid: 5 generated pictures for 12 features" in message for message in reporter.messages)
    assert any("does not say with which preprocessing" in message for message in reporter.messages)
    write_npz(file, {"mu": torch.zeros(3), "sigma": torch.zeros(3, 3)})
    with pytest.raises(DataError, match=r"mu is \[3\], sigma \[3, 3\], but FID takes 12 features"):
        compare(home, "a", str(file))
    write_npz(file, {"feats": torch.zeros(3)})
    with pytest.raises(DataError, match="it lacks mu or sigma"):
        compare(home, "a", str(file))


@pytest.mark.usefixtures("small_inception")
def test_the_score_of_one_set_needs_no_other(home: Path) -> None:
    assert set(compare(home, "a", None, "is")) == {"inception_score", "inception_score_std", "provenance"}


@pytest.mark.usefixtures("small_inception")
@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.exhaustive)])
def test_several_ranks_measure_what_one_measures(home: Path, tmp_path: Path, world_size: int) -> None:
    def work(rank: int) -> int:
        found = compare(home, "a", "b", *PICTURE_METRICS, batch_size=7, **networks_of(home))
        if rank == 0:
            (tmp_path / "found.json").write_text(json.dumps(found))
        return int((not found) != (rank > 0))

    with ForkedRanks(work, tmp_path, world_size) as job:
        assert job.wait() == [0] * world_size, job.words()
    one = compare(home, "a", "b", *PICTURE_METRICS, batch_size=7, **networks_of(home))
    several = json.loads((tmp_path / "found.json").read_text())
    assert several["provenance"]["generated"] == one["provenance"]["generated"]
    assert {name: value for name, value in several.items() if name != "provenance"} == {
        name: value for name, value in one.items() if name != "provenance"
    }


def test_cmmd_takes_the_central_squares(home: Path, tmp_path: Path) -> None:
    folder = tmp_path / "wide"
    folder.mkdir()
    for file in (home / "a").iterdir():
        wide = Image.new("RGB", (SIDE + 10, SIDE), "red")
        wide.paste(Image.open(file), (5, 0))
        wide.save(folder / file.name)
    found = compare(home, str(folder), "a", "cmmd", clip=home / "clip", inception=None)
    assert found["cmmd"] == pytest.approx(clip_maximum_mean_discrepancy(torch.eye(2), torch.eye(2))["cmmd"], abs=1e-6)
    assert "inception" not in found["provenance"]["networks"]


@pytest.mark.parametrize(
    ("a", "b", "metrics", "changes", "message"),
    [
        ("a", "b", ["fid"], {"inception": None}, "fid needs --inception FILE.*ldm convert"),
        ("a", "b", ["cmmd"], {}, "cmmd needs --clip DIR"),
        ("a", "b", ["fd_dinov2"], {}, "fd_dinov2 needs --dinov2 DIR"),
        ("a", None, ["fid", "is"], {}, "fid compares two sets: only '.*a' is given"),
        ("a", "b.npz", ["kid"], {}, r"kid cannot be measured: '.*b\.npz' is statistics"),
        ("a.npz", "b", ["is", "fid"], {}, r"is cannot be measured: '.*a\.npz' is statistics"),
        ("a", "b.npz", ["fid"], {"save_statistics": Path("x.npz")}, r"cannot save statistics as 'x\.npz'"),
        ("a", "b", ["kid"], {"save_statistics": Path("x.npz")}, r"cannot save statistics as 'x\.npz'"),
        ("a", "b", ["fid"], {"save_statistics": Path("x.txt")}, r"cannot save statistics as 'x\.txt'"),
    ],
)  # fmt: skip
def test_what_cannot_be_measured_is_refused_before_anything_is_read(
    home: Path, a: str, b: str | None, metrics: list[str], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        compare(home, a, b, *metrics, **changes)


@pytest.mark.usefixtures("small_inception")
def test_sets_that_are_missing_damaged_or_too_small_are_named(home: Path, tmp_path: Path) -> None:
    with pytest.raises(InputNotFoundError, match="there are no pictures in"):
        compare(home, str(tmp_path), "b")
    write_pictures(tmp_path / "few", 5, 0)
    with pytest.raises(DataError, match="prdc cannot be measured: 5 generated pictures, but at least 6 are needed"):
        compare(home, str(tmp_path / "few"), "b", "prdc")
    whole = (tmp_path / "few" / "003.png").read_bytes()
    for damaged in (b"no picture", whole[: len(whole) // 2]):
        (tmp_path / "few" / "003.png").write_bytes(damaged)
        with pytest.raises(DataError, match=r"cannot read picture '003\.png' of '.*few'"):
            compare(home, str(tmp_path / "few"), "b")


def test_pictures_of_every_mode_are_read_as_rgb(home: Path, tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "modes", 1, 0)
    for mode in ("L", "RGBA", "P"):
        Image.open(folder / "000.png").convert(mode).save(folder / f"{mode}.png")
    buffer = io.BytesIO()
    Image.open(folder / "000.png").save(buffer, "JPEG", quality=95)
    (folder / "sub").mkdir()
    (folder / "sub" / "x.JPG").write_bytes(buffer.getvalue())
    found = compare(home, str(folder), "a", "cmmd", clip=home / "clip", inception=None)
    assert found["provenance"]["generated"]["num_pictures"] == 5


def test_the_command_prints_the_distance_of_the_network(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [str(write_pictures(tmp_path / name, 3, seed)) for seed, name in enumerate("xy")]
    asked = ["--metrics", "kid", "--inception", str(home / "inception.safetensors"), "--device", "cpu", "--json"]
    assert run_program(["compare", *names, *asked]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["kid"] > 0, found["kid_subset_size"]) == (True, 3)
    assert run_program(["compare", *names, names[0]]) == 2
    assert "3 sets are given" in capsys.readouterr().err
    for wrong in (["--metrics", "fid,lpips"], ["--preprocessing", "tf"]):
        assert run_program(["compare", *names, *wrong]) == 2
        assert f"unknown {wrong[0]} '{wrong[1].split(',')[-1]}'" in capsys.readouterr().err
