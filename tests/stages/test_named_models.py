"""Commands on models by hub name: the same as on their folders, and recorded so that they can be found again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ldm_cli.cli.app import run as ldm
from ldm_cli.pictures.images import read_image
from ldm_cli.recipe.sample_recipe import SampleRecipe
from ldm_cli.recipe.schema import EvalRecipe, TrainClipRecipe, TrainUnetRecipe, TrainVaeRecipe
from ldm_cli.reporting import SilentReporter
from ldm_cli.stages.dry_run import dry_run
from ldm_cli.stages.support.named_models import with_model_folders
from ldm_cli.training.run_folder import RunFolder
from tests.hub_server import Hub, ask_only, served
from tests.sampling.tiny import tiny_pipeline

from .tiny import clip_recipe, unet_recipe, vae_recipe

UNET = "unet/diffusion_pytorch_model.safetensors"
PICTURE = "00000-a-red-circle-0.png"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_pipeline().family.save(folder)
    return folder


@pytest.fixture
def hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """It has `org/tiny`, and the working folder is an empty one."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with served(Hub({"org/tiny": {"main": folder}})) as hub:
        ask_only(hub, tmp_path / "cache", monkeypatch)
        yield hub


def sampled(out: str, *arguments: str) -> torch.Tensor:
    """The picture of a command that succeeds."""
    quick = ["-p", "a red circle", "-n", "1", "--steps", "2", "--guidance", "3", "--device", "cpu", "--out", out]
    assert ldm(["sample", *arguments, *(quick if "--repeat" not in arguments else quick[-4:])]) == 0
    return read_image(Path(out) / PICTURE)


def other_weights(folder: Path, to: Path, scale: float, name: str = UNET) -> None:
    """A copy of the model with a file of weights beside or in place of the U-Net's."""
    shutil.copytree(folder, to)
    save_file({key: scale * value for key, value in load_file(folder / UNET).items()}, to / name)


def test_sample_draws_by_name_what_it_draws_from_the_folder_cold_and_offline(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    expected = sampled("local", "--model", str(folder))
    assert torch.equal(sampled("cold", "--model", "org/tiny"), expected)
    content = json.loads(Path("cold/images.json").read_text())
    assert content["sources"] == {"model": f"org/tiny@{hub.commit('org/tiny', 'main')}"}
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert torch.equal(sampled("warm", "--model", "org/tiny"), expected)
    assert hub.requests == []


def test_a_picture_is_repeated_with_the_commit_that_made_it_though_the_branch_has_moved(
    hub: Hub, folder: Path, tmp_path: Path
) -> None:
    first = sampled("first", "--model", "org/tiny")
    other_weights(folder, tmp_path / "v2", 0.5)
    hub.models["org/tiny"] = {"v1": folder, "main": tmp_path / "v2"}
    assert not torch.equal(sampled("moved", "--model", "org/tiny"), first)
    assert torch.equal(sampled("pinned", "--model", "org/tiny@v1"), first)
    shutil.rmtree(tmp_path / "cache")
    assert torch.equal(sampled("again", "--repeat", f"first/{PICTURE}"), first)


def test_a_variant_is_drawn_with_and_repeated(hub: Hub, folder: Path, tmp_path: Path) -> None:
    plain = sampled("plain", "--model", "org/tiny")
    other_weights(folder, tmp_path / "both", 0.5, UNET.replace(".safe", ".fp16.safe"))
    hub.models["org/tiny"] = {"main": tmp_path / "both"}
    assert torch.equal(sampled("full", "--model", "org/tiny"), plain)
    half = sampled("half", "--model", "org/tiny", "--variant", "fp16")
    assert not torch.equal(half, plain)
    assert torch.equal(sampled("again", "--repeat", f"half/{PICTURE}"), half)


def test_a_missing_component_and_a_missing_model_are_one_line_each(
    hub: Hub, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder, tmp_path / "cut")
    (tmp_path / "cut/vae/diffusion_pytorch_model.safetensors").unlink()
    hub.models["org/cut"] = {"main": tmp_path / "cut"}
    for model, line in (
        ("org/cut", "ldm: error: no weights in 'org/cut/vae' [E-NOINPUT]"),
        ("org/none", "ldm: error: no model 'org/none': "),
    ):
        assert ldm(["sample", "--model", model, "-p", "x"]) == 66
        assert capfd.readouterr().err.splitlines()[-1].startswith(line)


def test_pull_prints_the_folder_and_sample_then_downloads_nothing(hub: Hub, capfd: pytest.CaptureFixture[str]) -> None:
    assert ldm(["pull", "org/tiny", "--component", "vae", "--component", "unet"]) == 0
    printed = Path(capfd.readouterr().out.strip())
    assert {path.name for path in printed.iterdir()} == {"model_index.json", "vae", "unet"}
    assert ldm(["pull", "org/tiny@main", "--json"]) == 0
    commit = hub.commit("org/tiny", "main")
    assert json.loads(capfd.readouterr().out) == {"model": f"org/tiny@{commit}", "folder": str(printed)}
    hub.requests.clear()
    sampled("out", "--model", "org/tiny")
    assert hub.requests == ["GET /api/models/org/tiny/revision/main"]


def test_convert_takes_a_model_and_a_tokenizer_by_name(hub: Hub, folder: Path, tmp_path: Path) -> None:
    other_weights(folder, tmp_path / "both", 0.5, UNET.replace(".safe", ".fp16.safe"))
    hub.models["org/both"] = {"main": tmp_path / "both"}
    assert ldm(["convert", "org/both", "full.safetensors"]) == 0
    assert ldm(["convert", "org/both", "half.safetensors", "--variant", "fp16"]) == 0
    full, half = load_file("full.safetensors"), load_file("half.safetensors")
    assert {name for name in full if not torch.equal(full[name], half[name])} == {n for n in full if "model.diff" in n}
    assert ldm(["convert", "full.safetensors", "back", "--tokenizer", "org/tiny"]) == 0
    assert torch.equal(sampled("converted", "--model", "back"), sampled("named", "--model", "org/both"))
    snapshot = tmp_path / "cache/models--org--tiny/snapshots" / str(hub.commit("org/tiny", "main"))
    assert {path.name for path in snapshot.iterdir()} == {"model_index.json", "tokenizer"}


@pytest.mark.parametrize(
    ("arguments", "code"), [(["org/tiny", "--variant", "fp8"], 2), (["runs/x"], 2), (["a/b/c"], 2), (["org/none"], 66)]
)
def test_pull_refuses_what_is_no_model(hub: Hub, arguments: list[str], code: int) -> None:
    assert ldm(["pull", *arguments]) == code


def recipes(scenes: Path) -> dict[str, tuple[Any, dict[str, Any]]]:
    """A recipe for each field that names a model, by field."""
    unet, evaluated = unet_recipe(scenes, Path("clip"), Path("vae")), {"metrics": ["reconstruction"], "vae": "vae"}
    evaluation = {"command": "eval", "data": {"shards": "x", "image_size": 32}}
    sample = {"command": "sample", "model": "model"}
    return {
        "model": (SampleRecipe, sample | {"model": "org/tiny"}),
        "sampling.guidance.model": (SampleRecipe, sample | {"sampling": {"guidance": {"model": "org/tiny"}}}),
        "vae": (TrainUnetRecipe, unet | {"vae": "org/tiny"}),
        "text_encoder": (TrainUnetRecipe, unet | {"text_encoder": "org/tiny"}),
        "start_from": (TrainVaeRecipe, vae_recipe(scenes) | {"start_from": "org/tiny"}),
        "tokenizer.path": (TrainClipRecipe, clip_recipe(scenes) | {"tokenizer": {"path": "org/tiny"}}),
        "eval.vae": (EvalRecipe, evaluation | {"eval": evaluated | {"vae": "org/tiny"}}),
        "eval.pipeline": (
            EvalRecipe,
            evaluation | {"eval": {"metrics": ["attribute_accuracy"], "vae": "org/unused", "pipeline": "org/tiny"}},
        ),
    }


@pytest.mark.parametrize(
    ("field", "inner", "downloaded"),
    [
        ("model", "", {"unet", "vae", "text_encoder", "tokenizer", "scheduler"}),
        ("sampling.guidance.model", "unet", {"unet"}),
        ("vae", "vae", {"vae"}),
        ("text_encoder", "text_encoder", {"text_encoder", "tokenizer"}),
        ("start_from", "vae", {"vae"}),
        ("tokenizer.path", "tokenizer", {"tokenizer"}),
        ("eval.vae", "vae", {"vae"}),
        ("eval.pipeline", "", {"unet", "vae", "text_encoder", "tokenizer", "scheduler"}),
    ],
)
def test_each_field_that_names_a_model_becomes_the_folder_of_what_it_needs(
    hub: Hub, tmp_path: Path, field: str, inner: str, downloaded: set[str]
) -> None:
    schema, content = recipes(tmp_path)[field]
    recipe = schema.from_mapping(content)
    fetched = with_model_folders(recipe, SilentReporter())
    snapshot = tmp_path / "cache/models--org--tiny/snapshots" / str(hub.commit("org/tiny", "main"))
    assert {path.name for path in snapshot.iterdir()} == {"model_index.json", *downloaded}
    mapping = fetched.to_mapping()
    *sections, last = field.split(".")
    section = mapping
    for name in sections:
        section = section[name]
    assert Path(section[last]) == snapshot / inner
    section[last] = "org/tiny"
    assert mapping == recipe.to_mapping()


def test_of_a_pipeline_in_a_folder_a_field_means_the_part_it_needs(folder: Path, tmp_path: Path) -> None:
    recipe = TrainUnetRecipe.from_mapping(unet_recipe(tmp_path, folder, folder))
    found = with_model_folders(recipe, SilentReporter())
    assert (found.vae, found.text_encoder) == (str(folder / "vae"), str(folder / "text_encoder"))


def test_a_recipe_of_folders_stays_the_object_that_it_is(tmp_path: Path) -> None:
    recipe = TrainUnetRecipe.from_mapping(unet_recipe(tmp_path, tmp_path / "clip", tmp_path / "vae"))
    assert with_model_folders(recipe, SilentReporter()) is recipe


def test_a_dry_run_counts_the_parameters_of_a_model_by_name(hub: Hub, folder: Path) -> None:
    found = [
        dry_run(SampleRecipe.from_mapping({"command": "sample", "model": model}), SilentReporter())
        for model in ("org/tiny", str(folder))
    ]
    assert found[0]["parameters"] == found[1]["parameters"] != {}


def test_the_environment_of_a_run_names_model_and_commit(hub: Hub, tmp_path: Path) -> None:
    recipe = TrainUnetRecipe.from_mapping(unet_recipe(tmp_path, tmp_path / "clip", Path("org/tiny")))
    resolved = with_model_folders(recipe, SilentReporter()).to_mapping()
    with RunFolder(tmp_path / "run", SilentReporter()) as run:
        run.claim(resolved, "", {}, torch.device("cpu"))
    models = json.loads((tmp_path / "run/env.json").read_text())["models"]
    assert models == {"vae": f"org/tiny@{hub.commit('org/tiny', 'main')}"}
