"""`train-vae` with a codebook: it learns and is used, runs go on exactly, its folder is diffusers'."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm_cli.core.codebook import grid_codes
from ldm_cli.core.models.vq_model import VQModel
from ldm_cli.core.pixels import to_signed
from ldm_cli.data.loader import sequential_batches
from ldm_cli.data.open_shards import open_shards
from ldm_cli.errors import CheckpointError, RecipeError
from ldm_cli.formats.model_folder import load_model
from ldm_cli.formats.save_model import save_model
from ldm_cli.formats.weight_files import read_tensors
from ldm_cli.recipe.load import load_recipe
from ldm_cli.recipe.schema import EvalRecipe, TrainVaeRecipe
from ldm_cli.reporting import SilentReporter
from ldm_cli.stages import convert, evaluate
from ldm_cli.stages.convert import ConvertOptions
from ldm_cli.stages.dry_run import dry_run
from ldm_cli.stages.support.options import RunOptions

from ..faults.runs import metrics, tensors
from .test_train_vae import make_task
from .tiny import assert_resumes, losses, trained, unet_recipe, vq_recipe

CPU = torch.device("cpu")
WEIGHT = "quantize.embedding.weight"


@pytest.fixture(scope="module")
def vq_run(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "vq"
    trained(vq_recipe(scenes, steps=60, lr=1e-2, log_every=10, ema_decay=0.9, validation_samples=24), out)
    return out


def test_the_loss_falls_the_codes_are_used_and_figures_say_so(vq_run: Path) -> None:
    first, *_, last = metrics(vq_run)
    assert losses(vq_run)[-1] < 0.6 * losses(vq_run)[0]
    assert {"reconstruction", "commitment", "perplexity", "codes_used", "dead_codes", "grad_norm"} <= first.keys()
    assert "codebook" not in first, "running means have no term of the loss"
    assert last["val_codes_used"] >= 0.75
    assert 4 < last["val_perplexity"] <= 16
    assert last["val_dead_codes"] == 16 - 16 * last["val_codes_used"]
    assert {"val_psnr", "val_psnr_ema", "val_codes_used_ema"} <= last.keys()
    assert (vq_run / "samples/step-00000060/grid.png").is_file()


def test_diffusers_opens_the_model_and_agrees_in_indices_and_pictures(vq_run: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.VQModel.from_pretrained(vq_run / "model").double().eval()
    ours = load_model(VQModel, vq_run / "model").double().eval()
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)).double() * 2 - 1
    with torch.no_grad():
        z = theirs.encode(images).latents
        assert torch.equal(theirs.quantize(z)[2][2].view(2, 16, 16), ours.encode_indices(images))
        torch.testing.assert_close(ours.reconstruct(images), theirs(images).sample, rtol=0, atol=1e-9)


def test_the_deviation_of_the_latents_is_measured_and_stored(vq_run: Path, scenes: Path) -> None:
    model = load_model(VQModel, vq_run / "model").eval()
    recipe = TrainVaeRecipe.from_mapping(vq_recipe(scenes))
    shards = open_shards(recipe.data.shards, recipe.data, SilentReporter())
    with torch.no_grad():
        latents = [
            model.encode(to_signed(batch.images, CPU))
            for batch in sequential_batches(shards, recipe.data, 16, with_captions=False)
        ]
    assert torch.cat(latents).std().item() == pytest.approx(1, abs=1e-3)
    assert latents[0].shape[1:] == (4, 16, 16)


def test_eval_measures_the_reconstructions_that_validation_measured(vq_run: Path, scenes: Path) -> None:
    data = {"shards": str(scenes / "val-*.tar"), "image_size": 32}
    section = {"vae": str(vq_run / "model"), "metrics": ["reconstruction"]}
    recipe = EvalRecipe.from_mapping({"command": "eval", "data": data, "eval": section})
    found = evaluate.run(recipe, RunOptions(device="cpu"), SilentReporter())["metrics"]["reconstruction"]
    assert found["psnr"] == pytest.approx(metrics(vq_run)[-1]["val_psnr_ema"], rel=1e-4)
    assert 0 < found["ssim"] < 1


def test_a_folder_is_converted_to_half_precision_and_read_again(vq_run: Path, tmp_path: Path) -> None:
    convert.run(vq_run / "model", tmp_path / "half", ConvertOptions(dtype="fp16"), SilentReporter())
    half, whole = load_model(VQModel, tmp_path / "half"), load_model(VQModel, vq_run / "model")
    assert torch.equal(half.quantize.embedding.weight, whole.quantize.embedding.weight.half().float())


@pytest.mark.parametrize("kind", ["ema", "gradient", pytest.param("fsq", marks=pytest.mark.exhaustive)])
def test_a_run_that_is_lost_ends_in_the_same_bits(scenes: Path, tmp_path: Path, kind: str) -> None:
    codebook: dict[str, Any] = {"kind": kind}
    codebook |= {"levels": [2, 2, 2, 2]} if kind == "fsq" else {"restart_below": 0.6} if kind == "ema" else {}
    loss = {"adversarial_weight": 0.5, "discriminator_channels": 8, "discriminator_layers": 2}
    recipe = vq_recipe(scenes, codebook, loss=loss, steps=7, save_every=2, log_every=3, ema_decay=0.9, micro_batch=4)
    assert_resumes(recipe, tmp_path, 2, 4)
    state = tensors(tmp_path / "whole", 7)
    model = read_tensors(tmp_path / "whole/model/diffusion_pytorch_model.safetensors")
    statistics = [name for name in state if "auxiliary.codebook." in name]
    assert len(statistics) == (3 if kind == "ema" else 0)
    assert ("codebook" in metrics(tmp_path / "whole")[0]) == (kind == "gradient")
    assert torch.equal(model[WEIGHT], grid_codes([2, 2, 2, 2])) == (kind == "fsq")


@pytest.mark.parametrize("num_parts", [2, 4])
def test_a_batch_in_parts_restarts_codes_at_the_vectors_of_the_whole_batch(
    scenes: Path, tmp_path: Path, num_parts: int
) -> None:
    task, loader = make_task(tmp_path, vq_recipe(scenes))
    batch = next(loader.batches(0, 1))
    codebook = task.auxiliary["codebook"]
    found = []
    for parts in (1, num_parts):
        given = []
        for part in task.parts(batch, parts):
            task.loss(part, 1)
            given.append(codebook.candidates.clone())
        found.append(torch.stack(given).mean(dim=0))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)
    vectors = task.vae.encode_z(to_signed(batch.images, CPU)).permute(0, 2, 3, 1).flatten(0, 2).detach()
    distances = torch.cdist(found[0], vectors, compute_mode="donot_use_mm_for_euclid_dist")
    assert distances.min(dim=1).values.max() < 1e-5, "each is a vector of the batch"
    assert len(found[0].unique(dim=0)) > 12


def test_training_goes_on_from_its_own_and_from_the_folders_of_diffusers(
    vq_run: Path, scenes: Path, tmp_path: Path
) -> None:
    """The codes of `start_from` count as used: the first step does not throw them away."""
    recipe = vq_recipe(scenes, {"decay": 0.999}, steps=1) | {"vq": None, "start_from": str(vq_run)}
    trained(recipe, tmp_path / "run")
    before, after = (
        load_model(VQModel, folder / "model").state_dict()[WEIGHT] for folder in (vq_run, tmp_path / "run")
    )
    torch.testing.assert_close(after, before, rtol=0.01, atol=0.01)
    assert not torch.equal(after, before)


def test_a_frozen_codebook_and_encoder_keep_every_index(vq_run: Path, scenes: Path, tmp_path: Path) -> None:
    freeze = ["encoder.*", "quant_conv.*", "quantize.*"]
    recipe = vq_recipe(scenes, steps=2) | {"vq": None, "start_from": str(vq_run), "freeze": freeze}
    result = trained(recipe, tmp_path / "run")
    before, after = (load_model(VQModel, folder / "model") for folder in (vq_run, tmp_path / "run"))
    assert result["figures"]["scaling_factor"] == before.config.scaling_factor
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        assert torch.equal(before.encode_indices(images), after.encode_indices(images))
    assert not torch.equal(before.decoder.conv_in.weight, after.decoder.conv_in.weight)


def test_a_denoiser_learns_and_samples_in_its_latents(
    vq_run: Path, clip_run: Path, scenes: Path, tmp_path: Path
) -> None:
    recipe = unet_recipe(scenes, clip_run / "model", vq_run / "model", steps=2)
    recipe["unet"] |= {"in_channels": 4, "out_channels": 4}
    trained(recipe, tmp_path / "run")
    index = json.loads((tmp_path / "run/model/model_index.json").read_text())
    assert index["vae"] == ["diffusers", "VQModel"]
    assert list((tmp_path / "run/samples").glob("*/*.png"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["vae.norm_num_groups=4"], "vae and vq are both given"),
        (["vq=null"], "vae: missing"),
        (["loss.kl_weight=0.1"], "loss.kl_weight has no meaning with vq"),
        (["codebook.kind=fsq", "codebook.levels=[4, 3]"], "are 12 codes of 2 channels, vq has 16 of 4"),
        (["data.image_size=33"], "no multiple of the autoencoder's factor 2"),
        (["train.strategy=sharded"], "no whole codebook for vq"),
    ],
)
def test_what_cannot_work_is_a_fault_of_the_recipe(
    scenes: Path, tmp_path: Path, overrides: list[str], message: str
) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(vq_recipe(scenes)))
    with pytest.raises(RecipeError) as caught:
        load_recipe(str(file), overrides, expected_command="train-vae")
    assert message in "\n".join([str(caught.value), *caught.value.problems])


def test_a_start_with_another_kind_of_latent_is_refused(
    vq_run: Path, vae_run: Path, scenes: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match="vae and vq are both given"):
        dry_run(TrainVaeRecipe.from_mapping(vq_recipe(scenes) | {"start_from": str(vae_run)}), SilentReporter())
    other = vq_recipe(scenes) | {"start_from": str(vq_run)}
    other["vq"]["num_vq_embeddings"] = 32
    with pytest.raises(RecipeError, match=r"vq.num_vq_embeddings=32, but .* has 16"):
        dry_run(TrainVaeRecipe.from_mapping(other), SilentReporter())


def test_a_checkpoint_whose_codebook_is_not_finite_is_refused(vq_run: Path, scenes: Path, tmp_path: Path) -> None:
    model = load_model(VQModel, vq_run / "model")
    with torch.no_grad():
        model.quantize.embedding.weight[3, 1] = torch.nan
    save_model(tmp_path / "nan", model.state_dict(), model.config.to_hugging_face())
    recipe = vq_recipe(scenes, steps=1) | {"vq": None, "start_from": str(tmp_path / "nan")}
    with pytest.raises(CheckpointError, match="are not finite"):
        trained(recipe, tmp_path / "run")
