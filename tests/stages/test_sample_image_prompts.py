"""`ldm sample` with image prompts: what they change, what is recorded, what repeats, what is refused."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ldm_cli.cli.app import run as ldm
from ldm_cli.core.models.clip_config import CLIPVisionConfig
from ldm_cli.core.models.clip_image_processor import CLIPImageProcessor
from ldm_cli.core.models.clip_vision import CLIPVisionModelWithProjection
from ldm_cli.core.models.ip_adapter import ImageProjection, IPAdapter, Resampler, cross_attentions
from ldm_cli.errors import CheckpointError, DataError, InputNotFoundError, UsageError
from ldm_cli.families.clip_image_encoder import CLIPImageEncoder
from ldm_cli.families.ip_adapter import write_ip_adapter
from ldm_cli.families.open_family import open_family
from ldm_cli.formats.pipeline_folder import IMAGE_ENCODER
from ldm_cli.formats.png_metadata import read_provenance
from ldm_cli.pictures.images import read_image, save_image
from ldm_cli.reporting import SilentReporter
from ldm_cli.stages import convert
from tests.sampling.tiny import randomize, tiny_pipeline
from tests.sampling.tiny_ar import save_tiny_model
from tests.stages.test_sample import draw, repeat

VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
    "projection_dim": 12,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_pipeline().family.save(folder)
    return folder


@pytest.fixture(scope="module")
def files(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A `base` and a `plus` adapter beside their image encoder, and two pictures."""
    folder = tmp_path_factory.mktemp("adapters")
    tower = randomize(CLIPVisionModelWithProjection(CLIPVisionConfig(**VISION)), 1)
    CLIPImageEncoder(tower, CLIPImageProcessor.for_side(16)).save(folder, IMAGE_ENCODER)
    unet: Any = open_family(model).denoiser  # type: ignore[attr-defined]
    layers, dim = cross_attentions(unet), unet.config.cross_attention_dim
    for name, image_proj in (("base", ImageProjection(12, dim, 4)), ("plus", Resampler(16, dim, 5, 64, 1))):
        write_ip_adapter(folder / f"{name}.safetensors", randomize(IPAdapter(image_proj, layers), 2).state_dict())
    generator = torch.Generator().manual_seed(0)
    for name, size in (("one", (16, 16)), ("two", (20, 33))):
        save_image(folder / f"{name}.png", torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator))
    return {file.stem: str(file) for file in folder.iterdir()}


def entry(files: dict[str, str], image: str = "one", adapter: str = "base", scale: float = 1.0) -> dict[str, Any]:
    return {"image": files[image], "adapter": files[adapter], "scale": scale}


def pictures(result: dict[str, Any]) -> list[bytes]:
    return [read_image(Path(image["file"])).numpy().tobytes() for image in result["images"]]


def test_a_scale_of_zero_and_two_that_cancel_are_the_text_alone(
    model: Path, files: dict[str, str], tmp_path: Path
) -> None:
    plain = pictures(draw(model, tmp_path / "plain"))
    assert pictures(draw(model, tmp_path / "zero", image_prompts=[entry(files, scale=0.0)])) == plain
    both = [entry(files, scale=0.5), entry(files, scale=-0.5)]
    assert pictures(draw(model, tmp_path / "cancelled", image_prompts=both)) == plain
    found = [
        pictures(draw(model, tmp_path / f"{image} {adapter}", image_prompts=[entry(files, image, adapter)]))[0]
        for image in ("one", "two")
        for adapter in ("base", "plus")
    ]
    assert len({*found, *plain}) == 5


def test_a_picture_is_the_same_whatever_its_batch(model: Path, files: dict[str, str], tmp_path: Path) -> None:
    given = [entry(files, scale=0.8), entry(files, "two", "plus", 0.3)]
    prompts = ["a red circle", "a blue square"]
    found = []
    for size in (1, 3, 8):
        fields = {"prompts": prompts, "sampling": {"images_per_prompt": 4, "batch_size": size}}
        found.append(pictures(draw(model, tmp_path / str(size), image_prompts=given, **fields)))
    assert found[0] == found[1] == found[2]
    assert len({*found[0]}) == 8
    alone = draw(model, tmp_path / "alone", image_prompts=given, prompts=prompts[1:], sampling={"seed": 2})
    assert pictures(alone) == [found[0][6]]


def test_a_grid_over_the_scale_has_the_pictures_of_a_job_each(
    model: Path, files: dict[str, str], tmp_path: Path
) -> None:
    given = [entry(files, scale=0.5)]
    grid = pictures(draw(model, tmp_path / "grid", image_prompts=given, xy=["image_scale=0,1,2"]))
    expected = [
        pictures(draw(model, tmp_path / str(scale), image_prompts=[entry(files, scale=scale)]))[0]
        for scale in (0.0, 0.5, 1.0)
    ]
    assert grid == expected


@pytest.mark.parametrize("edit", ["init", "tile", "perturb", "best_of"])
def test_image_prompts_go_with(edit: str, model: Path, files: dict[str, str], tmp_path: Path) -> None:
    fields: dict[str, Any] = {
        "init": {"edit": {"image": files["one"], "strength": 0.7}},
        "tile": {"tile": 16, "sampling": {"width": 24, "height": 24}},
        "perturb": {"sampling": {"guidance": {"perturb": {"kind": "layer"}}}},
        "best_of": {"sampling": {"guidance": 1.0}},
    }[edit]
    with_it = pictures(draw(model, tmp_path / "with", image_prompts=[entry(files)], **fields))
    assert with_it != pictures(draw(model, tmp_path / "without", **fields))


def test_a_picture_says_what_it_is_made_of_and_repeats(model: Path, files: dict[str, str], tmp_path: Path) -> None:
    names = ("one", "two", "base", "plus")
    own = {name: str(shutil.copy(files[name], tmp_path)) for name in names}
    shutil.copytree(files[IMAGE_ENCODER], tmp_path / IMAGE_ENCODER)
    given = [entry(own, scale=0.8), entry(own, "two", "plus", 0.3)]
    found = draw(model, tmp_path / "out", image_prompts=given, sampling={"image_scale": 0.9})
    record = read_provenance(Path(found["images"][0]["file"]))
    assert [one["scale"] for one in record["image_prompts"]] == [0.8, 0.3]
    assert record["sources"]["image prompt 2: image"] == "two.png"
    again, messages = repeat(found["images"][0]["file"], tmp_path / "again")
    assert messages == []
    assert read_image(Path(again)).equal(read_image(Path(found["images"][0]["file"])))
    shutil.copy(files["two"], own["one"])
    with pytest.raises(DataError, match="the image of image prompt 1 has changed since"):
        repeat(found["images"][0]["file"], tmp_path / "other picture")
    shutil.copy(files["one"], own["one"])
    tensors = load_file(own["plus"])
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, own["plus"])
    with pytest.raises(CheckpointError, match="the adapter of image prompt 2 has changed since"):
        repeat(found["images"][0]["file"], tmp_path / "other adapter")


def test_a_pickle_is_named_and_converted(model: Path, files: dict[str, str], tmp_path: Path) -> None:
    flat = load_file(files["plus"])
    nested = {
        part: {name.removeprefix(f"{part}."): tensor for name, tensor in flat.items() if name.startswith(f"{part}.")}
        for part in ("image_proj", "ip_adapter")
    }
    file = tmp_path / "ip-adapter-plus.bin"
    torch.save(nested, file)
    shutil.copytree(files[IMAGE_ENCODER], tmp_path / IMAGE_ENCODER)
    given = {"image": files["one"], "adapter": str(file)}
    with pytest.raises(CheckpointError, match="it is a pickle") as caught:
        draw(model, tmp_path / "out", image_prompts=[given])
    assert "--allow-pickle" in caught.value.remedy
    options = convert.ConvertOptions(allow_pickle=True)
    result = convert.run(file, tmp_path / "plus.safetensors", options, SilentReporter())
    assert result["models"] == {"model": "IP-Adapter"}
    converted = load_file(tmp_path / "plus.safetensors")
    assert all(torch.equal(converted[name], tensor) for name, tensor in flat.items())
    given["adapter"] = str(tmp_path / "plus.safetensors")
    found = pictures(draw(model, tmp_path / "converted", image_prompts=[given]))
    assert found == pictures(draw(model, tmp_path / "plain", image_prompts=[entry(files, adapter="plus")]))


def without(tensors: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    return {key: tensor for key, tensor in tensors.items() if key != name}


WRONG = {
    "is no image prompt adapter.*lora_unet.weight": lambda t: {"lora_unet.weight": torch.ones(2)},
    "of the kind FaceID, which needs": lambda t: {"image_proj.proj.2.weight": torch.ones(2, 2)},
    "of the kind full-face": lambda t: {"image_proj.proj.3.weight": torch.ones(2)},
    "of the kind FaceID-plus": lambda t: {"image_proj.perceiver_resampler.proj_in.weight": torch.ones(2)},
    "do not fit: missing: ip_adapter.3.to_k_ip.weight": lambda t: without(t, "ip_adapter.3.to_k_ip.weight"),
    "unexpected: ip_adapter.9.to_k_ip.weight": lambda t: t | {"ip_adapter.9.to_k_ip.weight": torch.ones(2, 2)},
    "ip_adapter.1.to_v_ip.weight is .* not": lambda t: t | {"ip_adapter.1.to_v_ip.weight": torch.ones(2, 2)},
    "no known names and shapes": lambda t: without(t, "image_proj.norm.weight"),
    "not finite: image_proj.norm.bias": lambda t: t | {"image_proj.norm.bias": t["image_proj.norm.bias"] / 0},
}


@pytest.mark.parametrize("message", WRONG)
def test_a_wrong_file_is_refused_by_name(message: str, model: Path, files: dict[str, str], tmp_path: Path) -> None:
    save_file(WRONG[message](load_file(files["base"])), tmp_path / "wrong.safetensors")
    shutil.copytree(files[IMAGE_ENCODER], tmp_path / IMAGE_ENCODER)
    given = {"image": files["one"], "adapter": str(tmp_path / "wrong.safetensors")}
    with pytest.raises(CheckpointError) as caught:
        draw(model, tmp_path / "out", image_prompts=[given])
    assert "wrong.safetensors" in str(caught.value)
    assert re.search(message, f"{caught.value.what}: {caught.value.cause}"), str(caught.value)
    assert not (tmp_path / "out").exists()


def test_what_is_missing_or_does_not_fit_is_refused_by_name(model: Path, files: dict[str, str], tmp_path: Path) -> None:
    alone = shutil.copy(files["base"], tmp_path / "alone.safetensors")
    given = {"image": files["one"], "adapter": str(alone)}
    with pytest.raises(InputNotFoundError, match=r"no image encoder beside '.*alone\.safetensors'") as caught:
        draw(model, tmp_path / "out", image_prompts=[given])
    assert "--image-encoder" in caught.value.remedy
    named = draw(model, tmp_path / "named", image_prompts=[given | {"image_encoder": files[IMAGE_ENCODER]}])
    assert pictures(named) == pictures(draw(model, tmp_path / "beside", image_prompts=[entry(files)]))
    tower = randomize(CLIPVisionModelWithProjection(CLIPVisionConfig(**(VISION | {"projection_dim": 13}))), 1)
    CLIPImageEncoder(tower, CLIPImageProcessor.for_side(16)).save(tmp_path, IMAGE_ENCODER)
    with pytest.raises(CheckpointError, match="it gives 13 numbers, and the adapter takes 12"):
        draw(model, tmp_path / "out", image_prompts=[given])
    with pytest.raises(InputNotFoundError, match=r"no image prompt adapter in '.*nowhere'"):
        draw(model, tmp_path / "out", image_prompts=[given | {"adapter": str(tmp_path / "nowhere")}])
    with pytest.raises(InputNotFoundError, match=r"nowhere\.png"):
        draw(model, tmp_path / "out", image_prompts=[entry(files) | {"image": str(tmp_path / "nowhere.png")}])
    with pytest.raises(UsageError, match="image_scale without an image prompt"):
        draw(model, tmp_path / "out", sampling={"image_scale": 0.5})
    sampling = {"guidance": {"scale": 2.0, "model": str(model)}}
    with pytest.raises(UsageError, match=r"image prompts and guidance\.model do not go together"):
        draw(model, tmp_path / "out", image_prompts=[entry(files)], sampling=sampling)
    save_tiny_model(tmp_path / "ar")
    with pytest.raises(UsageError, match="this model takes no image prompts"):
        draw(tmp_path / "ar", tmp_path / "out", image_prompts=[entry(files)])


def test_options_name_pictures_scales_and_adapters(
    model: Path, files: dict[str, str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    base = ["sample", "--model", str(model), "-p", "a red circle", "-n", "1", "--steps", "3", "--guidance", "3"]
    prompts = ["--image-prompt", f"{files['one']}=0.8", "--image-prompt", files["two"]]
    adapters = ["--ip-adapter", files["base"], "--ip-adapter", files["plus"]]
    assert ldm([*base, *prompts, *adapters, "--out", str(tmp_path / "cli")]) == 0
    expected = draw(model, tmp_path / "stage", image_prompts=[entry(files, scale=0.8), entry(files, "two", "plus")])
    found = next((tmp_path / "cli").glob("0*.png"))
    assert read_image(found).numpy().tobytes() == pictures(expected)[0]
    for wrong, message in (
        (["--ip-adapter", files["base"]], "--ip-adapter without --image-prompt"),
        (prompts, "--image-prompt is given 2 times, --ip-adapter 0 times"),
        ([*prompts, *adapters, *adapters[:2]], "--image-prompt is given 2 times, --ip-adapter 3 times"),
    ):
        assert ldm([*base, *wrong]) == 2
        assert message in capfd.readouterr().err
