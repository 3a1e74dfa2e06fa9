"""`ldm convert`: types, shards, pickles, tokenizers, what is refused; and single files where folders are expected."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ldm_cli.core.models.clip import CLIPModel
from ldm_cli.core.models.clip_config import CLIPConfig, ModifiedResNetConfig
from ldm_cli.data.tokenizer import Tokenizer
from ldm_cli.errors import CheckpointError, InputNotFoundError, LdmError, OutputError, UsageError
from ldm_cli.formats.model_source import load_tensors
from ldm_cli.formats.save_model import save_model
from ldm_cli.formats.single_file import CONFIGS_KEY
from ldm_cli.formats.weight_files import TRANSFORMERS_WEIGHTS, read_metadata, write_tensors
from ldm_cli.recipe.schema import TrainUnetRecipe, TrainVaeRecipe
from ldm_cli.reporting import SilentReporter
from ldm_cli.stages import convert
from ldm_cli.stages.convert import ConvertOptions
from ldm_cli.stages.support.batch_encoder import BatchEncoder
from ldm_cli.stages.support.start import resolve_start, start_uses
from tests.evaluation.inception_weights import inception_weights
from tests.evaluation.lpips_weights import lpips_weights
from tests.sampling.tiny import loaded_pipeline, tiny_pipeline

run = partial(convert.run, reporter=SilentReporter())
TRAINED = {
    "name": "x",
    "data": {"shards": "x.tar", "image_size": 16},
    "train": {"steps": 1, "batch_size": 1, "lr": 1.0},
}
PARTS = ("unet", "vae", "text_encoder")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    tiny_pipeline().family.save(folder / "model")
    run(folder / "model", folder / "model.safetensors", ConvertOptions())
    return folder


@pytest.fixture
def home(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model, the same in one file, and its tokenizer."""
    shutil.copytree(saved, tmp_path / "home")
    shutil.copytree(saved / "model" / "tokenizer", tmp_path / "home" / "tokenizer")
    monkeypatch.chdir(tmp_path / "home")
    return tmp_path / "home"


def assert_same_models(a: Path, b: Path, change: Callable[[torch.Tensor], torch.Tensor] = lambda t: t) -> None:
    for part in PARTS:
        ours, theirs = load_tensors(a / part), load_tensors(b / part)
        assert set(ours) == set(theirs)
        assert all(torch.equal(change(ours[name]), theirs[name]) for name in ours)
        assert all(change(ours[name]).dtype == theirs[name].dtype for name in ours)


def test_folder_to_file_to_folder_is_the_same_folder(home: Path) -> None:
    result = run(home / "model.safetensors", home / "back", ConvertOptions())
    assert_same_models(home / "model", home / "back")
    files = {p.relative_to(home / "model") for p in (home / "model").rglob("*.json")}
    assert files == {p.relative_to(home / "back") for p in (home / "back").rglob("*.json")}
    assert all((home / "model" / p).read_text() == (home / "back" / p).read_text() for p in files if "config" in p.name)
    assert result["opens_in"] == ["ldm", "diffusers StableDiffusionPipeline.from_pretrained"]
    assert result["models"] == {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel"}
    assert result["bytes"] == 4 * result["parameters"]
    assert len(result["recognised_by"]) == 5


def test_a_single_file_generates_the_pictures_of_its_folder(home: Path) -> None:
    ours, theirs = (loaded_pipeline(home / name).family for name in ("model.safetensors", "model"))
    assert ours.weights_sha256 == theirs.weights_sha256
    assert ours.settings == theirs.settings
    assert ours.sample_size == theirs.sample_size
    assert ours.encoder.key == theirs.encoder.key


def test_a_single_file_stands_where_a_recipe_names_folders(home: Path) -> None:
    recipe = TrainUnetRecipe.from_mapping({"command": "train-unet", **TRAINED, "start_from": "model.safetensors"})
    filled = resolve_start(recipe, lambda message: None)
    assert (filled.vae, filled.text_encoder) == ("model.safetensors/vae", "model.safetensors/text_encoder")
    assert filled.unet is not None
    assert filled.unet.block_out_channels == (16, 32)
    assert start_uses(filled) == {"start_from": "model.safetensors/unet"}
    encoder = BatchEncoder(filled, torch.device("cpu"), lambda message: None)
    assert encoder.condition(["a red circle"]).tokens is not None
    vae = TrainVaeRecipe.from_mapping({"command": "train-vae", **TRAINED, "start_from": "model.safetensors/vae"})
    assert resolve_start(vae, lambda message: None).vae.block_out_channels == (16, 32)  # type: ignore[union-attr]


def test_types_and_shards_are_those_that_were_asked_for(home: Path) -> None:
    run(home / "model", home / "half.safetensors", ConvertOptions(dtype="fp16"))
    run(home / "half.safetensors", home / "sharded", ConvertOptions(shard_bytes=100_000))
    assert_same_models(home / "model", home / "sharded", lambda tensor: tensor.half())
    shards = sorted((home / "sharded" / "unet").glob("*.safetensors"))
    assert len(shards) > 2
    assert all(sum(t.nbytes for t in load_file(shard).values()) <= 100_000 for shard in shards)
    assert json.loads((home / "sharded" / "text_encoder" / "config.json").read_text())["torch_dtype"] == "float16"
    run(home / "sharded", home / "whole", ConvertOptions(dtype="bf16"))
    assert_same_models(home / "model", home / "whole", lambda tensor: tensor.half().bfloat16())
    assert json.loads((home / "whole" / "text_encoder" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_metadata_is_kept_and_told_and_says_what_the_file_is(home: Path) -> None:
    tensors, metadata = load_file(home / "model.safetensors"), read_metadata(home / "model.safetensors")
    write_tensors(home / "x.safetensors", tensors, metadata | {"modelspec.author": "A", "modelspec.title": "T"})
    result = run(home / "x.safetensors", home / "folder", ConvertOptions(prediction_type="v_prediction"))
    assert result["metadata"]["modelspec.author"] == "A"
    assert (
        json.loads((home / "folder/scheduler/scheduler_config.json").read_text())["prediction_type"] == "v_prediction"
    )
    run(home / "folder", home / "again", ConvertOptions())
    result = run(home / "again", home / "y.safetensors", ConvertOptions())
    found = read_metadata(home / "y.safetensors")
    assert (found["modelspec.author"], found["modelspec.title"]) == ("A", "T")
    assert found["modelspec.prediction_type"] == "v"
    assert found["modelspec.architecture"] == "ldm-cli-unet-v1"
    assert result["metadata"] == {name: value for name, value in found.items() if name not in ("format", CONFIGS_KEY)}
    assert "ComfyUI" not in result["opens_in"]


def test_a_part_of_a_file_becomes_a_file_of_its_own(home: Path) -> None:
    run(home / "model.safetensors" / "vae", home / "vae.safetensors", ConvertOptions())
    run(home / "vae.safetensors", home / "vae", ConvertOptions())
    ours, theirs = load_tensors(home / "vae"), load_tensors(home / "model" / "vae")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    with pytest.raises(InputNotFoundError, match=r"no 'safety' in 'model.safetensors': it holds unet, vae"):
        run(Path("model.safetensors/safety"), home / "x", ConvertOptions())


def test_configurations_of_a_folder_are_those_of_a_file_without_any(home: Path) -> None:
    save_file(load_file(home / "model.safetensors"), home / "bare.safetensors")
    with pytest.raises(CheckpointError, match=r"norm_num_groups=32 does not divide 16 of block_out_channels"):
        run(home / "bare.safetensors", home / "x", ConvertOptions())
    run(home / "bare.safetensors", home / "back", ConvertOptions(config=home / "model"))
    ours, theirs = ((home / name / "unet" / "config.json").read_text() for name in ("back", "model"))
    assert json.loads(ours) == json.loads(theirs)
    with pytest.raises(InputNotFoundError, match="no configuration of a model"):
        run(home / "bare.safetensors", home / "x", ConvertOptions(config=home / "tokenizer"))


def as_lightning(home: Path) -> Path:
    tensors = load_file(home / "model.safetensors")
    torch.save({"state_dict": tensors, "global_step": 7, "epoch": 1}, home / "x.ckpt")
    return home / "x.ckpt"


def as_plain(home: Path) -> Path:
    torch.save(load_file(home / "model.safetensors"), home / "x.bin", _use_new_zipfile_serialization=False)
    return home / "x.bin"


def as_misnamed(home: Path) -> Path:
    return as_lightning(home).rename(home / "x.safetensors")


def as_folder(home: Path) -> Path:
    shutil.copytree(home / "model", home / "pickled")
    for part in PARTS:
        for file in list((home / "pickled" / part).glob("*.safetensors")):
            name = "pytorch_model.bin" if part == "text_encoder" else "diffusion_pytorch_model.bin"
            torch.save(load_file(file), file.with_name(name))
            file.unlink()
    return home / "pickled"


@pytest.mark.parametrize("write", [as_lightning, as_plain, as_misnamed, as_folder])
def test_pickles_are_read_only_where_they_are_allowed(write: Callable[[Path], Path], home: Path) -> None:
    source = write(home)
    with pytest.raises(CheckpointError, match=r"could run any program.*--allow-pickle"):
        run(source, home / "x", ConvertOptions())
    config = None if source.is_dir() else home / "model"
    run(source, home / "y", ConvertOptions(allow_pickle=True, config=config))
    assert_same_models(home / "model", home / "y")


class Program:
    """What a pickle could run."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return print, ("run",)


def test_a_pickle_that_holds_more_than_tensors_is_refused_and_runs_nothing(
    home: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    torch.save({"state_dict": {}, "callbacks": Program()}, home / "x.ckpt")
    message = r"cannot read '.*x.ckpt': it asks for print, which is no tensor; convert"
    with pytest.raises(CheckpointError, match=message):
        run(home / "x.ckpt", home / "y", ConvertOptions(allow_pickle=True))
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"state_dict": None}, "a table of tensors expected, NoneType found"),
        ([1], "a table of tensors expected, list found"),
        ({"global_step": "seven"}, "cannot tell the architecture"),
    ],
)
def test_a_pickle_without_tensors_is_refused(content: Any, message: str, home: Path) -> None:
    torch.save(content, home / "x.ckpt")
    with pytest.raises(CheckpointError, match=message):
        run(home / "x.ckpt", home / "y", ConvertOptions(allow_pickle=True))


def test_a_pickle_is_cut(home: Path) -> None:
    file = as_lightning(home)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"it is damaged, or not of torch.save; convert"):
        run(file, home / "y", ConvertOptions(allow_pickle=True))


def test_averages_become_the_weights_where_asked_for(home: Path) -> None:
    tensors = load_file(home / "model.safetensors")
    flat = {
        "model_ema." + n.removeprefix("model.").replace(".", ""): t + 1
        for n, t in tensors.items()
        if n.startswith("model.diffusion_model.")
    }
    write_tensors(home / "both.safetensors", tensors | flat, read_metadata(home / "model.safetensors"))
    result = run(home / "both.safetensors", home / "plain", ConvertOptions())
    assert result["left_out"].startswith("model_ema.")
    assert result["left_out"].endswith(f"and {len(flat) - 5} more")
    run(home / "both.safetensors", home / "averaged", ConvertOptions(ema=True))
    assert_same_models(home / "model", home / "plain")
    before, after = load_tensors(home / "plain" / "unet"), load_tensors(home / "averaged" / "unet")
    assert all(torch.equal(before[name] + 1, after[name]) for name in before)


def test_a_pipeline_needs_its_tokenizer(home: Path) -> None:
    shutil.move(home / "tokenizer", home / "elsewhere")
    file = (home / "model.safetensors").rename(home / "other.safetensors")
    message = r"no tokenizer for .*: there is no folder '.*/other/tokenizer' or '.*/home/tokenizer'; .* --tokenizer DIR"
    with pytest.raises(InputNotFoundError, match=message):
        run(file, home / "x", ConvertOptions())
    assert not (home / "x").exists()
    for place in (home / "elsewhere", home / "model"):
        run(file, home / "x", ConvertOptions(tokenizer=place, overwrite=True))
        assert Tokenizer.load(home / "x" / "tokenizer").fingerprint == Tokenizer.load(home / "elsewhere").fingerprint


def float8(home: Path) -> None:
    tensors = {n: t.to(torch.float8_e4m3fn) for n, t in load_file(home / "model.safetensors").items()}
    write_tensors(home / "x.safetensors", tensors, read_metadata(home / "model.safetensors"))


def scaled_float8(home: Path) -> None:
    float8(home)
    tensors = load_file(home / "x.safetensors") | {"model.diffusion_model.out.2.scale_weight": torch.ones(1)}
    write_tensors(home / "x.safetensors", tensors, read_metadata(home / "model.safetensors"))


def too_large(home: Path) -> None:
    tensors = load_file(home / "model.safetensors")
    tensors["model.diffusion_model.out.2.bias"] *= 1e9
    write_tensors(home / "x.safetensors", tensors, read_metadata(home / "model.safetensors"))


def misshapen(home: Path) -> None:
    tensors = load_file(home / "model.safetensors")
    tensors["first_stage_model.decoder.conv_in.weight"] = torch.ones(3)
    write_tensors(home / "x.safetensors", tensors, read_metadata(home / "model.safetensors"))


def with_damaged_configurations(content: str) -> Callable[[Path], None]:
    def damage(home: Path) -> None:
        write_tensors(home / "x.safetensors", load_file(home / "model.safetensors"), {CONFIGS_KEY: content})

    return damage


def cut(home: Path) -> None:
    (home / "x.safetensors").write_bytes((home / "model.safetensors").read_bytes()[:-100])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (float8, "float8 weights: .*; give --dtype fp16, bf16 or fp32"),
        (scaled_float8, "float8 weights with scales are not supported"),
        (misshapen, "cannot use '.*x.safetensors': the shape of a tensor is not that of its name"),
        *(
            (with_damaged_configurations(content), "ldm_cli.configs in its metadata is damaged")
            for content in ("{", "[1]", '{"unet/config.json": 3}', '{"unet/config.json": {}}')
        ),
        (cut, "cannot read '.*x.safetensors': damaged safetensors"),
    ],
)
def test_a_file_that_cannot_be_converted_gives_one_clear_line(
    damage: Callable[[Path], None], message: str, home: Path
) -> None:
    damage(home)
    with pytest.raises(CheckpointError, match=message):
        run(home / "x.safetensors", home / "out", ConvertOptions())
    assert not (home / "out").exists()
    assert not list(home.glob(".tmp-*"))


def test_numbers_too_large_for_a_type_are_refused(home: Path) -> None:
    too_large(home)
    with pytest.raises(CheckpointError, match=r"not finite in fp16: conv_out.bias; give --dtype bf16 or fp32"):
        run(home / "x.safetensors", home / "out", ConvertOptions(dtype="fp16"))
    run(home / "x.safetensors", home / "out", ConvertOptions(dtype="bf16"))


def test_float8_is_widened_exactly(home: Path) -> None:
    float8(home)
    run(home / "x.safetensors", home / "out", ConvertOptions(dtype="fp32"))
    assert_same_models(home / "model", home / "out", lambda tensor: tensor.to(torch.float8_e4m3fn).float())


@pytest.mark.parametrize(
    ("source", "out", "options", "error"),
    [
        ("model", "new.safetensors", {"shard_bytes": 5}, UsageError("--shard-size is for folders")),
        ("model", "new.ckpt", {}, UsageError("cannot write 'new.ckpt'")),
        ("model", "new", {"ema": True}, UsageError("--ema and --config are for single files")),
        (
            *("model/vae", "new", {"prediction_type": "epsilon"}),
            UsageError("--prediction-type is for whole pipelines with a U-Net"),
        ),
        ("model", "tokenizer", {}, OutputError("'tokenizer' exists")),
        ("model", "tokenizer", {"overwrite": True}, OutputError("'tokenizer' is no model folder")),
        ("model", "folder.safetensors", {"overwrite": True}, OutputError("'folder.safetensors' is no file")),
        ("model", "x.txt", {"overwrite": True}, OutputError("'x.txt' is no model folder")),
        ("gone", "new", {}, InputNotFoundError("model 'gone' not found")),
    ],
)
def test_what_does_not_apply_is_refused(source: str, out: str, options: Any, error: LdmError, home: Path) -> None:
    (home / "folder.safetensors").mkdir()
    (home / "x.txt").touch()
    with pytest.raises(type(error)) as caught:
        run(Path(source), Path(out), ConvertOptions(**options))
    assert caught.value.what == error.what


def test_nothing_is_said_of_what_a_folder_does_not_have(home: Path) -> None:
    result = run(home / "model", home / "x", ConvertOptions())
    assert result.keys() == {"out", "models", "parameters", "bytes", "opens_in"}


def test_a_pipeline_of_another_architecture_is_refused(home: Path) -> None:
    index = json.loads((home / "model" / "model_index.json").read_text())
    index |= {"_class_name": "FluxPipeline", "unet": [None, None]}
    index |= {"transformer": ["diffusers", "FluxTransformer2DModel"]}
    (home / "model" / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="the transformer of its FluxPipeline is of class FluxTransformer2DModel"):
        run(home / "model", home / "x.safetensors", ConvertOptions())


def test_what_a_pipeline_has_beside_its_models_is_left_out_and_told(home: Path) -> None:
    index = json.loads((home / "model" / "model_index.json").read_text())
    index |= {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]}
    (home / "model" / "model_index.json").write_text(json.dumps(index))
    assert run(home / "model", home / "x", ConvertOptions())["left_out"] == "safety_checker"
    assert json.loads((home / "x" / "model_index.json").read_text())["safety_checker"] == [None, None]


def test_a_clip_with_a_resnet_has_no_single_file(home: Path) -> None:
    vision = ModifiedResNetConfig(layers=(1, 1, 1, 1), width=4, heads=2, image_size=32)
    model = CLIPModel(CLIPConfig(vision_config=vision))
    save_model(home / "clip", model.state_dict(), model.config.to_hugging_face(), TRANSFORMERS_WEIGHTS)
    with pytest.raises(CheckpointError, match="'CLIPModelWithModifiedResNet'"):
        run(home / "clip", home / "x.safetensors", ConvertOptions())


def test_the_published_file_of_fids_network_becomes_safetensors(tmp_path: Path) -> None:
    weights = inception_weights()
    counted = weights | {"Mixed_5b.branch1x1.bn.num_batches_tracked": torch.tensor(0)}
    torch.save(counted, tmp_path / "pt_inception.pth")
    result = run(tmp_path / "pt_inception.pth", tmp_path / "x.safetensors", ConvertOptions(allow_pickle=True))
    assert (result["models"], result["opens_in"]) == ({"model": "InceptionV3"}, "ldm compare, ldm eval")
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in weights.items())
    with pytest.raises(CheckpointError):
        run(tmp_path / "pt_inception.pth", tmp_path / "y.safetensors", ConvertOptions())


def test_a_classifier_of_torchvision_and_the_heads_become_lpips(tmp_path: Path) -> None:
    classifier, heads = lpips_weights("alex")
    torch.save(classifier | {"classifier.1.weight": torch.zeros(2, 2)}, tmp_path / "alexnet.pth")
    torch.save(heads, tmp_path / "alex.pth")
    options = ConvertOptions(allow_pickle=True, lpips_heads=tmp_path / "alex.pth")
    result = run(tmp_path / "alexnet.pth", tmp_path / "lpips.safetensors", options)
    assert (result["models"], result["opens_in"]) == ({"model": "LPIPS"}, "ldm eval")
    found, expected = load_file(tmp_path / "lpips.safetensors"), classifier | heads
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
