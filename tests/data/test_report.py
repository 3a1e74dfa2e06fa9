"""What `ldm data` tells of shards."""

from __future__ import annotations

from pathlib import Path

import pytest

from ldm_cli.data import report
from ldm_cli.data.bad_samples import read_bad_samples
from ldm_cli.data.config import DataConfig
from ldm_cli.data.sample_decoder import Draw, SampleDecoder, Wanted
from ldm_cli.errors import DataError, InputNotFoundError
from ldm_cli.reporting import SilentReporter
from ldm_cli.stages.data import check

from .tars import numbered_sample, opened, png, write_tar


def test_stats_reads_headers_and_check_decodes(tmp_path: Path) -> None:
    cut = [("cut.png", png(size=(90, 70))[:60]), ("cut.txt", b"a cut picture"), ("cut.cls", b"1")]
    shards, config = opened(write_tar(tmp_path / "a.tar", [*numbered_sample(0), *cut]))
    counted = report.stats(shards, config, SilentReporter())
    assert (counted["unusable"], counted["formats"], counted["width"]["max"]) == ({}, {"png": 2}, 90)
    assert report.check(shards, config, SilentReporter())["bad"] == {"damaged image": 1}


@pytest.mark.parametrize(
    ("keys", "hidden"),
    [
        (["7", "7.25"], ["a/7.25"]),
        (["v1.final", "v1.draft"], ["a/v1.final", "a/v1.draft"]),
        (["d/1", "d/1.a.b", "d/1.c"], ["a/d/1.a.b", "a/d/1.c"]),
    ],
)
@pytest.mark.parametrize("text", ["txt", "caption"])
def test_samples_hidden_by_a_dot_in_their_keys_are_named(
    tmp_path: Path, keys: list[str], hidden: list[str], text: str
) -> None:
    members = [(f"{key}.{kind}", png() if kind == "png" else b"x") for key in keys for kind in ("png", text)]
    shards, config = opened(write_tar(tmp_path / "a.tar", members), label=None, caption=text)
    result = report.check(shards, config, SilentReporter())
    assert (result["ok"], result["hidden_samples"]) == (False, hidden)
    # webdataset's rule is the reference: the key ends at the first dot of the name
    names = {name for key in keys for name in (f"{key}.png", f"{key}.{text}")}
    assert set(result["first_not_used"]) == {f"a/{name}" for name in names if name.rpartition("/")[2].count(".") > 1}


@pytest.mark.parametrize("image", ["input.png", "EDITED.png", "depth.map.png"])
def test_a_setting_names_the_members_of_image_and_caption(tmp_path: Path, image: str) -> None:
    kinds = ("input.png", "edited.png", "depth.map.png")
    members = [(f"s.{kind}", png((number, 0, 0))) for number, kind in enumerate(kinds)]
    members += [("s.input.txt", b"before"), ("s.prompt.txt", b"make it red")]
    shards, config = opened(
        write_tar(tmp_path / "a.tar", members), label=None, image=image, caption="prompt.txt", background=[0, 0, 0]
    )
    decoder = SampleDecoder(shards, config, Wanted())
    assert report.check(shards, config, SilentReporter())["ok"]
    sample = decoder.decode(0, 0, Draw())
    assert sample.image is not None
    assert (sample.caption, int(sample.image[0].max())) == ("make it red", kinds.index(image.lower()))
    unset, usual = opened(tmp_path / "a.tar", label=None, caption="prompt.txt")
    bad = report.check(unset, usual, SilentReporter())["bad_samples"]
    assert "data.image" in bad[0]["detail"]


def test_members_that_no_setting_reads_are_counted_and_sound(tmp_path: Path) -> None:
    shards, config = opened(write_tar(tmp_path / "a.tar", [*numbered_sample(0), *numbered_sample(1)]), label=None)
    result = report.check(shards, config, SilentReporter())
    assert result["ok"]
    assert result["not_used"] == {"cls": 2, "json": 2}
    assert result["first_not_used"] == ["a/0000.cls", "a/0000.json"]


def test_of_many_bad_samples_the_first_are_shown_and_a_file_has_all(tmp_path: Path) -> None:
    members = [(f"{number:04d}.png", b"no picture") for number in range(50)]
    shards, config = opened(write_tar(tmp_path / "a.tar", members), label=None, missing_caption="empty")
    result = report.check(shards, config, SilentReporter())
    file = Path(result["bad_samples_file"])
    assert len(result["bad_samples"]) == 20
    assert [bad.key for bad in read_bad_samples(file)] == [f"{number:04d}" for number in range(50)]
    file.unlink()


def test_shards_without_a_whole_sample_are_damaged_data(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", numbered_sample(0))
    data = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(data[:600])
    with pytest.raises(DataError, match="there are no samples"):
        check(DataConfig(shards=str(tmp_path / "a.tar")), SilentReporter())


def test_a_list_of_samples_to_leave_out_that_is_a_folder_is_an_input_error(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", numbered_sample(0))
    with pytest.raises(InputNotFoundError, match="it is a folder"):
        check(DataConfig(shards=str(tmp_path / "a.tar"), quarantine=str(tmp_path)), SilentReporter())
