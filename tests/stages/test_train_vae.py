"""`train-vae` on drawn scenes: it learns, its latent is centred and scaled, its folder is diffusers'."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm_cli import philox
from ldm_cli.core.models.autoencoder_kl import AutoencoderKL
from ldm_cli.core.pixels import to_signed
from ldm_cli.data.loader import Loader, sequential_batches
from ldm_cli.data.open_shards import open_shards
from ldm_cli.data.scenes import write_scenes
from ldm_cli.errors import CheckpointError, DivergedError, Preempted, RecipeError, StuckError
from ldm_cli.formats.model_folder import load_model
from ldm_cli.recipe.load import load_recipe
from ldm_cli.recipe.schema import TrainVaeRecipe
from ldm_cli.reporting import SilentReporter
from ldm_cli.stages.dry_run import dry_run
from ldm_cli.stages.train_vae import VAETask
from ldm_cli.training.failures import MAX_ATTEMPTS

from ..faults.runs import metrics, tensors
from .tiny import RESNET, assert_resumes, clip_recipe, losses, trained, vae_recipe, workbench

CPU = torch.device("cpu")
ADVERSARIAL = {
    "adversarial_weight": 0.5,
    "adversarial_start": 2,
    "discriminator_channels": 8,
    "discriminator_layers": 2,
}


def make_task(path: Path, mapping: dict[str, Any]) -> tuple[VAETask, Loader]:
    recipe = TrainVaeRecipe.from_mapping(mapping)
    bench = workbench(recipe, path)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        task = VAETask(recipe, bench)
    return task, Loader(bench.shards, recipe.data, seed=0, batch_size=8, with_captions=False)


def training_latents(model: Path, scenes: Path) -> Tensor:
    """Scaled latents of all training images, sampled with fresh noise: [64, C, h, w]."""
    vae = load_model(AutoencoderKL, model).eval()
    recipe = TrainVaeRecipe.from_mapping(vae_recipe(scenes))
    shards = open_shards(recipe.data.shards, recipe.data, SilentReporter())
    parts = []
    with torch.no_grad():
        for batch in sequential_batches(shards, recipe.data, 16, with_captions=False):
            posterior = vae.posterior(to_signed(batch.images, CPU))
            noise = philox.normal(philox.key(9, "fresh"), batch.epoch, batch.position, posterior.mean.shape[1:])
            parts.append(vae.latents({"mean": posterior.mean, "logvar": posterior.logvar}, noise))
    return torch.cat(parts)


def test_the_loss_falls_and_figures_are_logged(vae_run: Path) -> None:
    logged = losses(vae_run)
    assert logged[-1] < 0.8 * logged[0]
    last = metrics(vae_run)[-1]
    assert {"reconstruction", "kl", "grad_norm", "lr", "val_psnr", "val_l1", "val_psnr_ema"} <= last.keys()
    assert (vae_run / "samples/step-00000040/grid.png").is_file()


def test_diffusers_opens_the_model_and_agrees(vae_run: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.AutoencoderKL.from_pretrained(vae_run / "model").eval()
    ours = load_model(AutoencoderKL, vae_run / "model").eval()
    assert theirs.config.scaling_factor == ours.config.scaling_factor != 0.18215
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        z = ours.posterior(images).mode()
        torch.testing.assert_close(z, theirs.encode(images).latent_dist.mode(), rtol=0, atol=1e-5)
        torch.testing.assert_close(ours.decode_z(z), theirs.decode(z).sample, rtol=0, atol=1e-5)


def test_scaled_latents_have_mean_0_and_deviation_1_per_channel_and_in_all(scenes: Path, tmp_path: Path) -> None:
    """Measured with other posterior noise than the trainer used: hence the tolerance, and a run so gentle that no
    posterior is wide."""
    trained(vae_recipe(scenes), tmp_path)
    latents = training_latents(tmp_path / "model", scenes)
    assert latents.mean(dim=(0, 2, 3)).abs().max() < 0.02
    assert latents.std().item() == pytest.approx(1, abs=0.01)
    assert load_model(AutoencoderKL, tmp_path / "model").config.shift_factor == 0


def test_without_1x1_convolutions_the_shift_is_stored_instead(scenes: Path, tmp_path: Path) -> None:
    plain = {"use_quant_conv": False, "use_post_quant_conv": False}
    result = trained(vae_recipe(scenes, vae=plain, steps=3), tmp_path / "run")
    config = load_model(AutoencoderKL, tmp_path / "run/model").config
    assert config.shift_factor == result["figures"]["shift_factor"] != 0
    latents = training_latents(tmp_path / "run/model", scenes)
    assert latents.mean().abs() < 0.02
    assert latents.std().item() == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("num_parts", [2, 4])
def test_a_batch_in_parts_has_the_gradient_of_the_whole_batch(scenes: Path, tmp_path: Path, num_parts: int) -> None:
    task, loader = make_task(tmp_path, vae_recipe(scenes, loss={"kl_weight": 0.1}))
    batch = next(loader.batches(0, 1))
    results = []
    for parts in (1, num_parts):
        task.vae.zero_grad()
        for part in task.parts(batch, parts):
            (task.loss(part, 1)[0] / parts).backward()  # type: ignore[no-untyped-call]
        results.append({name: p.grad.clone() for name, p in task.vae.named_parameters() if p.grad is not None})
    whole, split = results
    assert whole.keys() == split.keys() == dict(task.vae.named_parameters()).keys()
    for name in whole:
        torch.testing.assert_close(split[name], whole[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.exhaustive)])
def test_a_perceptual_adversarial_run_that_is_lost_ends_the_same(
    scenes: Path, clip_run: Path, tmp_path: Path, precision: str
) -> None:
    """Killed before the discriminator has started, and once more when it has."""
    loss = {**ADVERSARIAL, "perceptual_weight": 0.3, "perceptual_clip": str(clip_run / "model")}
    recipe = vae_recipe(scenes, loss=loss, steps=7, save_every=2, log_every=3, ema_decay=0.9, precision=precision)
    assert_resumes(recipe, tmp_path, 2, 4)
    first, second, _ = metrics(tmp_path / "whole")
    assert {"perceptual", "adversarial", "discriminator", "adaptive_weight", "grad_norm/discriminator"} <= second.keys()
    # Step 3 alone has the term; hinge losses start about 1, a mean over three steps would be a third of that.
    assert 0.5 < first["discriminator"] < 2
    state = tensors(tmp_path / "whole", 7)
    steps = {n: v.item() for n, v in state.items() if n.endswith(".step")}
    assert {v for n, v in steps.items() if "optimizer.discriminator" in n} == {5.0}
    assert {v for n, v in steps.items() if "optimizer.vae" in n} == {7.0}


def test_the_perceptual_tower_stays_as_it_is(scenes: Path, clip_run: Path, tmp_path: Path) -> None:
    loss = {"perceptual_weight": 1.0, "perceptual_clip": str(clip_run / "model")}
    task, loader = make_task(tmp_path, vae_recipe(scenes, loss=loss))
    assert task.terms.perceptual is not None
    tower = task.terms.perceptual.tower
    for part in task.parts(next(loader.batches(0, 1)), 2):
        value, figures = task.loss(part, 1)
        assert figures["perceptual"] > 0
        value.backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is None for p in tower.parameters())
    assert not tower.training


def test_another_perceptual_clip_under_the_same_path_is_another_run(scenes: Path, tmp_path: Path) -> None:
    for seed, name in ((0, "one"), (1, "two")):
        trained(clip_recipe(scenes, steps=1) | {"seed": seed}, tmp_path / name)
    clip, loss = tmp_path / "clip", {"perceptual_weight": 1.0, "perceptual_clip": str(tmp_path / "clip")}
    clip.symlink_to(tmp_path / "one/model")
    trained(vae_recipe(scenes, loss=loss, steps=1), tmp_path / "vae")
    clip.unlink()
    clip.symlink_to(tmp_path / "two/model")
    with pytest.raises(CheckpointError, match=r"the fingerprint of loss\.perceptual_clip"):
        trained(vae_recipe(scenes, loss=loss, steps=1), tmp_path / "vae")


def test_a_resnet_is_refused_as_perceptual_tower(scenes: Path, tmp_path: Path) -> None:
    trained(clip_recipe(scenes, RESNET, steps=1), tmp_path / "clip")
    recipe = vae_recipe(scenes, loss={"perceptual_weight": 1.0, "perceptual_clip": str(tmp_path / "clip/model")})
    with pytest.raises(RecipeError, match="ResNet"):
        dry_run(TrainVaeRecipe.from_mapping(recipe), SilentReporter())
    with pytest.raises(RecipeError, match="ResNet"):
        trained(recipe, tmp_path / "vae")
    assert not (tmp_path / "vae").exists(), "a corrected recipe would be another run"


def test_the_perceptual_tower_sees_images_as_its_folder_says(scenes: Path, clip_run: Path, tmp_path: Path) -> None:
    clip = Path(shutil.copytree(clip_run / "model", tmp_path / "clip", ignore=shutil.ignore_patterns("manifest.json")))
    recipe = vae_recipe(scenes, loss={"perceptual_weight": 1.0, "perceptual_clip": str(clip)}, steps=1)
    trained(recipe, tmp_path / "vae")
    file = clip / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}))
    with pytest.raises(CheckpointError, match=r"the image processor of loss\.perceptual_clip"):
        trained(recipe, tmp_path / "vae")
    trained(recipe, tmp_path / "other")
    first, second = (metrics(tmp_path / name)[0]["perceptual"] for name in ("vae", "other"))
    assert first != pytest.approx(second, rel=1e-2)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.image_size=33"], "no multiple of the autoencoder's factor 2"),
        (["loss.adversarial_weight=1", "loss.discriminator_layers=4"], "which need 48 px"),
    ],
)
def test_sizes_that_cannot_work_are_faults_of_the_recipe(
    scenes: Path, tmp_path: Path, overrides: list[str], message: str
) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(vae_recipe(scenes)))
    with pytest.raises(RecipeError) as caught:
        load_recipe(str(file), overrides, expected_command="train-vae")
    assert message in "\n".join([str(caught.value), *caught.value.problems])


def test_fewer_samples_than_a_batch_train_over_several_epochs_a_step(tmp_path: Path) -> None:
    write_scenes(tmp_path / "few", 3, 32, 0, SilentReporter(), val_samples=2)
    recipe = vae_recipe(tmp_path / "few", steps=2, save_every=1)
    assert trained(recipe, tmp_path / "run")["figures"]["scaling_factor"] > 0


def test_a_time_limit_that_preparing_takes_up_ends_in_a_word_not_in_a_loop(scenes: Path, tmp_path: Path) -> None:
    recipe, out = vae_recipe(scenes, steps=1), tmp_path / "run"
    for _ in range(MAX_ATTEMPTS):
        with pytest.raises(Preempted, match=r"before the first step: reached --max-time; .*with more time"):
            trained(recipe, out, max_time=1e-9)
    with pytest.raises(StuckError, match="do not requeue"):
        trained(recipe, out, max_time=1e-9)
    (out / "failures.jsonl").unlink()
    trained(recipe, out)
    assert trained(recipe, out, max_time=1e-9)["state"] == "finished", "what is finished takes no time"


@pytest.mark.parametrize(("precision", "warned"), [("bf16", True), ("fp32", False)])
def test_half_precision_on_a_cpu_is_warned_about(scenes: Path, tmp_path: Path, precision: str, warned: bool) -> None:
    reporter = SilentReporter()
    trained(vae_recipe(scenes, steps=1, precision=precision), tmp_path, reporter)
    assert any("bf16 is slower than fp32 on most CPUs" in message for message in reporter.messages) == warned


@pytest.mark.parametrize(("shards", "warned"), [("*.tar", True), ("train-*.tar", False)])
def test_held_out_shards_among_those_of_training_are_warned_of(
    scenes: Path, tmp_path: Path, shards: str, warned: bool
) -> None:
    reporter = SilentReporter()
    data = {"shards": str(scenes / shards), "val_shards": str(scenes / "val-*.tar")}
    trained(vae_recipe(scenes, data=data, steps=1), tmp_path, reporter)
    assert any("warning: data.shards holds 1 of data.val_shards" in line for line in reporter.messages) == warned


def test_reconstructions_that_overflow_give_neither_a_number_nor_a_picture(scenes: Path, tmp_path: Path) -> None:
    for name in ("run", "pictures"):
        (tmp_path / name).mkdir()
    task, loader = make_task(tmp_path / "run", vae_recipe(scenes))
    task.bench = replace(task.bench, held_out=tuple(loader.batches(0, 1)))
    task.picture(tmp_path / "pictures")
    assert (tmp_path / "pictures/grid.png").is_file()
    assert math.isfinite(task.validate()["val_psnr"])
    (tmp_path / "pictures/grid.png").unlink()
    with torch.no_grad():
        task.vae.decoder.conv_out.weight.fill_(3e38)
    task.picture(tmp_path / "pictures")
    assert not (tmp_path / "pictures/grid.png").exists()
    assert math.isnan(task.validate()["val_psnr"])
    with torch.no_grad():
        task.vae.encoder.conv_out.weight.fill_(3e38)
    with pytest.raises(DivergedError, match="the autoencoder's latents are not finite"):
        task.finalize()
