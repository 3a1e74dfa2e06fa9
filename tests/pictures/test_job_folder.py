import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from ldm_cli.errors import CheckpointError, InputNotFoundError, OutputError, UsageError
from ldm_cli.pictures.images import read_image
from ldm_cli.recipe.sample_recipe import SampleRecipe
from ldm_cli.reporting import SilentReporter
from ldm_cli.sampling.config import SamplingConfig
from ldm_cli.sampling.edit_config import EditConfig
from ldm_cli.stages.sample import Latents, run
from ldm_cli.stages.support.options import RunOptions
from tests.sampling.tiny import tiny_pipeline

PROMPTS = ("a red circle", "../é/\x1b[31m a blue\nsquare, 猫")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_pipeline().family.save(folder)
    return folder


def recipe(model, **fields):
    sampling = SamplingConfig(**({"steps": 2, "images_per_prompt": 2, "negative": "green"} | fields))
    return SampleRecipe(command="sample", model=str(model), prompts=PROMPTS, sampling=sampling)


def draw(model, out, overwrite=False, latents=None, **fields):
    options = RunOptions(out=out, device="cpu", overwrite=overwrite)
    return run(recipe(model, **fields), options, SilentReporter(), latents and Latents(latents))


def contents(folder):
    """Name → bytes; lines of images.sha256 sorted, as they come in the order of writing."""
    found = {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != ".lock"}
    return found | {n: b"".join(sorted(found[n].splitlines(True))) for n in found if n == "images.sha256"}


def test_files_have_safe_sortable_names_and_say_how_to_draw_them_again(model, tmp_path):
    out = tmp_path / "deep" / "out"
    result = draw(model, out, seed=5)
    names = ["00000-a-red-circle-5.png", "00001-a-red-circle-6.png"]
    names += ["00002-e-31m-a-blue-square-5.png", "00003-e-31m-a-blue-square-6.png"]
    assert sorted(contents(out)) == [*names, "grid.png", "images.json", "images.sha256"]
    assert [image["file"] for image in result["images"]] == [str(out / name) for name in names]
    assert result["generated"] == 4
    assert read_image(out / "grid.png").shape == (3, 2 * 128 + 4, 2 * 128 + 4)
    record = json.loads((out / "images.json").read_text())
    assert record["images"][3]["prompt"] == PROMPTS[1]
    assert record["job"]["sampling"]["width"] == 16
    assert record["sources"] == {"model": str(model)}
    with Image.open(out / names[3]) as picture:
        text = picture.text
    own = json.loads(text["ldm_cli"])
    assert own["prompt"] == PROMPTS[1]
    assert own["seed"] == 6
    assert own["sampling"] == record["job"]["sampling"]
    assert own["weights"] == record["job"]["weights"]
    first, negative, last = text["parameters"].rpartition(PROMPTS[1])[2].split("\n")
    assert first == ""
    assert negative == "Negative prompt: green"
    assert last.startswith("Steps: 2, Sampler: DDIM, CFG scale: 7.5, Seed: 6, Size: 16x16, Model hash: ")


def test_the_same_job_draws_only_what_is_missing_with_the_same_bytes(model, tmp_path):
    draw(model, tmp_path, batch_size=8)
    before = contents(tmp_path)
    names = [name for name in before if name[0].isdigit()]
    for name in names[1:3]:
        (tmp_path / name).unlink()
    (tmp_path / "grid.png").unlink()
    untouched = (tmp_path / names[0]).stat().st_mtime_ns
    assert draw(model, tmp_path, batch_size=1)["generated"] == 2
    assert contents(tmp_path) == before
    assert (tmp_path / names[0]).stat().st_mtime_ns == untouched
    assert draw(model, tmp_path)["generated"] == 0
    assert contents(tmp_path) == before


def another_picture(path):
    Image.new("RGB", (16, 16)).save(path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:200]),
        lambda path: path.write_bytes(b""),
        lambda path: (path.unlink(), os.mkfifo(path))[0],
        another_picture,
    ],
)
def test_a_damaged_or_foreign_picture_is_generated_again(model, tmp_path, damage):
    draw(model, tmp_path)
    before = contents(tmp_path)
    name = next(name for name in before if name[0] == "0")
    damage(tmp_path / name)
    reporter = SilentReporter()
    result = run(recipe(model), RunOptions(out=tmp_path, device="cpu"), reporter)
    assert result["generated"] == 1
    assert [m for m in reporter.messages if name in m] == [
        f"warning: '{tmp_path / name}' is not as it was written: it is deleted, to be generated again"
    ]
    assert contents(tmp_path) == before


def test_exchanged_pictures_are_generated_again(model, tmp_path):
    draw(model, tmp_path)
    before = contents(tmp_path)
    one, two = (tmp_path / name for name in before if name.endswith("-0.png"))
    content = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(content)
    assert draw(model, tmp_path)["generated"] == 2
    assert contents(tmp_path) == before


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", bytes(99), None])
def test_a_damaged_list_of_pictures_is_written_again(model, tmp_path, content):
    draw(model, tmp_path)
    before = contents(tmp_path)
    (tmp_path / "images.json").write_bytes(content or before["images.json"].replace(b"a red", b"a bed"))
    reporter = SilentReporter()
    assert run(recipe(model), RunOptions(out=tmp_path, device="cpu"), reporter)["generated"] == 0
    assert any("images.json' was damaged" in message for message in reporter.messages)
    assert contents(tmp_path) == before
    (tmp_path / "images.sha256").write_bytes(content or b"")
    assert draw(model, tmp_path)["generated"] == 4
    assert contents(tmp_path) == before


def test_sha256sum_reads_the_checksums(model, tmp_path):
    draw(model, tmp_path)
    subprocess.run(["sha256sum", "--check", "--strict", "images.sha256"], cwd=tmp_path, check=True)


def test_another_job_is_refused_with_the_difference_and_replaced_when_asked(model, tmp_path):
    draw(model, tmp_path, images_per_prompt=2)
    (tmp_path / "mine.txt").write_text("keep")
    before = contents(tmp_path)
    with pytest.raises(OutputError, match=r"differs in sampling\.steps"):
        draw(model, tmp_path, steps=3)
    assert contents(tmp_path) == before
    draw(model, tmp_path, overwrite=True, images_per_prompt=1)
    after = contents(tmp_path)
    assert len(after) == 6
    assert after["mine.txt"] == b"keep"


def test_a_picture_that_the_job_is_made_of_is_not_overwritten(model, tmp_path):
    first = Path(draw(model, tmp_path)["images"][0]["file"])
    before = contents(tmp_path)
    edited = recipe(model).model_copy(update={"edit": EditConfig(image=str(first), strength=0.5)})
    with pytest.raises(OutputError, match="made of it"):
        run(edited, RunOptions(out=tmp_path, device="cpu", overwrite=True), SilentReporter())
    assert contents(tmp_path) == before


def test_files_of_unknown_origin_are_not_overwritten(model, tmp_path):
    (tmp_path / "grid.png").write_bytes(b"mine")
    with pytest.raises(OutputError, match="another job"):
        draw(model, tmp_path)
    assert contents(tmp_path) == {"grid.png": b"mine"}
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="not a folder"):
        draw(model, tmp_path / "file")


def test_latents_file_gives_the_initial_noise_and_is_checked(model, tmp_path):
    noise = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    file = tmp_path / "latents.safetensors"
    save_file({"latents": noise}, file)
    draw(model, tmp_path / "a", latents=file)
    pictures = contents(tmp_path / "a")
    save_file({"latents": noise[[2, 3, 0, 1]]}, file)
    with pytest.raises(OutputError, match="differs in latents"):
        draw(model, tmp_path / "a", latents=file)
    draw(model, tmp_path / "b", latents=file)
    assert contents(tmp_path / "b").keys() == pictures.keys()
    assert contents(tmp_path / "b") != pictures
    with pytest.raises(UsageError, match=r"\(4, 4, 8, 8\), \(6, 4, 8, 8\) expected"):
        draw(model, tmp_path / "c", latents=file, images_per_prompt=3)
    save_file({"noise": noise}, file)
    with pytest.raises(CheckpointError, match="'latents'"):
        draw(model, tmp_path / "c", latents=file)
    with pytest.raises(InputNotFoundError):
        draw(model, tmp_path / "c", latents=tmp_path / "none")
    assert not (tmp_path / "c").exists()
