"""`train-unet` on drawn scenes: it learns, its folder is a pipeline's, what is frozen stays so."""

from __future__ import annotations

import json
import math
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm_cli.core.condition import Condition
from ldm_cli.data.batch import Batch
from ldm_cli.data.loader import Loader
from ldm_cli.data.open_shards import open_shards
from ldm_cli.data.scenes import write_scenes
from ldm_cli.errors import CheckpointError, Preempted, RecipeError
from ldm_cli.formats.model_source import load_tensors
from ldm_cli.recipe.schema import TrainUnetRecipe
from ldm_cli.reporting import SilentReporter
from ldm_cli.sampling.config import SamplingConfig
from ldm_cli.sampling.request import ImageRequest
from ldm_cli.stages.train_unet import DenoiserTask
from ldm_cli.training.distributed import joined

from ..faults.runs import assert_same_run, metrics, status
from ..sampling.tiny import loaded_pipeline
from ..training.forked import ForkedRanks
from .tiny import assert_resumes, lose_after, losses, trained, unet_recipe, vae_recipe, workbench

CPU = torch.device("cpu")


@pytest.fixture
def parts(scenes: Path, clip_run: Path, vae_run: Path) -> tuple[Path, Path, Path]:
    """What every recipe needs: scenes, CLIP, autoencoder."""
    return scenes, clip_run / "model", vae_run / "model"


def make_task(parts: tuple[Path, Path, Path], path: Path, **changes: Any) -> tuple[DenoiserTask, Loader]:
    recipe = TrainUnetRecipe.from_mapping(unet_recipe(*parts, **changes))
    shards = open_shards(recipe.data.shards, recipe.data, SilentReporter())
    bench = workbench(recipe, path, tuple(Loader(shards, recipe.data, seed=5, batch_size=4).batches(0, 2)))
    with torch.random.fork_rng():
        torch.manual_seed(1)
        task = DenoiserTask(recipe, bench)
    return task, Loader(shards, recipe.data, seed=0, batch_size=8)


def backward(task: DenoiserTask, batch: Batch, num_parts: int) -> tuple[float, dict[str, Tensor]]:
    task.family.denoiser.zero_grad()
    total = 0.0
    for part in task.parts(task.prepare(batch), num_parts):
        loss, _ = task.loss(part, 1)
        (loss / num_parts).backward()  # type: ignore[no-untyped-call]
        total += loss.item() / num_parts
    return total, {n: p.grad.clone() for n, p in task.family.denoiser.named_parameters() if p.grad is not None}


def test_the_loss_falls_and_every_level_is_validated(unet_run: Path) -> None:
    logged = losses(unet_run)
    assert logged[-1] < 0.9 * logged[0]
    last = metrics(unet_run)[-1]
    levels = [last[f"val_loss/level{i}"] for i in range(5)]
    assert last["val_loss"] == pytest.approx(sum(levels) / 5)
    assert {"val_loss_ema", "val_loss/level0_ema", "grad_norm", "lr"} <= last.keys()
    samples = unet_run / "samples/step-00000040"
    assert len(json.loads((samples / "prompts.json").read_text())) == 2
    assert (samples / "grid.png").is_file()


def test_diffusers_opens_the_model_and_draws_the_same_pictures(unet_run: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(unet_run / "model", safety_checker=None)
    theirs.set_progress_bar_config(disable=True)
    prompts = ["a small red circle at the top left", "a blue square right of a green star " * 5]
    latents = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(7))
    config = SamplingConfig(steps=5, guidance=4.0, negative="green")
    requests = [ImageRequest(prompt, 0) for prompt in prompts]
    ours = torch.stack([i.pixels for i in loaded_pipeline(unet_run / "model").generate(requests, config, latents)])
    images = theirs(
        prompts, negative_prompt=["green"] * 2, num_inference_steps=5, guidance_scale=4.0, latents=latents,
        output_type="np",
    ).images  # fmt: skip
    expected = (torch.from_numpy(images).permute(0, 3, 1, 2) * 255).round()
    assert ours.float().std() > 5, "flat pictures prove nothing"
    assert (ours.float() - expected).abs().max() <= 2


def test_autoencoder_and_text_encoder_are_passed_on_bit_for_bit(unet_run: Path, parts: tuple[Path, Path, Path]) -> None:
    _, clip, vae = parts
    for step in ("model", "checkpoints/step-00000040/ema", "checkpoints/step-00000040/model"):
        passed = load_tensors(unet_run / step / "vae")
        given = load_tensors(vae)
        assert passed.keys() == given.keys()
        assert all(torch.equal(passed[name], given[name]) for name in given)
        text, tower = load_tensors(unet_run / step / "text_encoder"), load_tensors(clip)
        assert text
        assert all(torch.equal(value, tower[name]) for name, value in text.items())


def test_frozen_parts_get_no_gradient_and_do_not_change(parts: tuple[Path, Path, Path], tmp_path: Path) -> None:
    task, loader = make_task(parts, tmp_path)
    codec, text_encoder = task.family.codec, task.family.encoder.model
    frozen = [*codec.parameters(), *text_encoder.parameters()]
    before = [p.detach().clone() for p in frozen]
    _, gradients = backward(task, next(loader.batches(0, 1)), 2)
    assert gradients.keys() == dict(task.family.denoiser.named_parameters()).keys()
    assert all(p.grad is None and not p.requires_grad for p in frozen)
    assert all(torch.equal(p, q) for p, q in zip(frozen, before, strict=True))
    assert not codec.training
    assert not text_encoder.training


@pytest.mark.parametrize("num_parts", [2, 4])
def test_a_batch_in_parts_has_the_gradient_of_the_whole_batch(
    parts: tuple[Path, Path, Path], tmp_path: Path, num_parts: int
) -> None:
    task, loader = make_task(parts, tmp_path)
    batch = next(loader.batches(0, 1))
    loss, whole = backward(task, batch, 1)
    same_loss, split = backward(task, batch, num_parts)
    assert same_loss == pytest.approx(loss, abs=1e-6)
    for name in whole:
        torch.testing.assert_close(split[name], whole[name], rtol=1e-4, atol=1e-6, msg=name)


class Spy(torch.nn.Module):
    """In place of the U-Net: keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, noised: Tensor, t: Tensor, condition: Condition) -> Tensor:
        assert condition.tokens is not None
        self.seen.append((t, condition.tokens))
        return torch.zeros_like(noised, requires_grad=True)


@pytest.mark.parametrize(("fraction", "num_steps"), [(0.0, 4), (0.25, 50), (1.0, 4)])
def test_caption_dropout_drops_its_fraction_and_leaves_the_rest_alone(
    parts: tuple[Path, Path, Path], tmp_path: Path, fraction: float, num_steps: int
) -> None:
    task, loader = make_task(parts, tmp_path, diffusion={"caption_dropout": fraction})
    spy = Spy()
    task.denoising.family = replace(task.family, denoiser=spy)  # type: ignore[type-var]
    captions = []
    for batch in loader.batches(0, num_steps):
        captions += batch.captions
        task.loss(task.prepare(batch), 1)
    given = torch.cat([tokens for _, tokens in spy.seen])
    dropped = (given == task.denoising.empty.tokens).flatten(1).all(dim=1)
    sigma = math.sqrt(fraction * (1 - fraction) / (8 * num_steps))
    assert abs(dropped.float().mean() - fraction) <= 4 * sigma
    expected = task.encoder.condition(captions).tokens
    assert expected is not None
    assert torch.equal(given[~dropped], expected[~dropped])
    levels = torch.cat([t for t, _ in spy.seen])
    assert 0 <= levels.min() < 250
    assert 750 <= levels.max() < 1000


def test_min_snr_weights_each_sample_by_its_level(parts: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """ε-prediction: the plain loss times min(SNR, γ) / SNR, sample by sample."""
    plain, loader = make_task(parts, tmp_path, diffusion={"caption_dropout": 0.0})
    weighted, _ = make_task(parts, tmp_path, diffusion={"caption_dropout": 0.0, "snr_gamma": 5.0})
    batch = next(loader.batches(0, 1))
    spy = Spy()
    for task in (plain, weighted):
        task.denoising.family = replace(task.family, denoiser=spy)  # type: ignore[type-var]
    for i in range(8):
        one = replace(
            batch, images=batch.images[i : i + 1], captions=batch.captions[i : i + 1],
            keys=batch.keys[i : i + 1], epoch=batch.epoch[i : i + 1], position=batch.position[i : i + 1],
        )  # fmt: skip
        (a, _), (b, _) = (task.loss(task.prepare(one), 1) for task in (plain, weighted))
        alpha = plain.family.process.alphas_cumprod[spy.seen[-1][0].long()].double()
        snr = alpha / (1 - alpha)
        assert (b / a).item() == pytest.approx((snr.clamp(max=5.0) / snr).item(), rel=1e-5)


def test_validation_is_the_same_in_two_calls_and_needs_no_global_generator(
    parts: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    task, loader = make_task(parts, tmp_path)
    with torch.no_grad():
        first = task.validate()
        torch.manual_seed(123)
        assert task.validate() == first
    assert set(first) == {"val_loss", *(f"val_loss/level{i}" for i in range(5))}
    state = torch.random.get_rng_state()
    backward(task, next(loader.batches(0, 1)), 1)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_ranks_that_share_validation_and_pictures_get_the_figures_and_pictures_of_one(
    parts: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    """Three ranks for two held-out batches: one of them has nothing to validate."""
    task, _ = make_task(parts, tmp_path / "run")

    def results(folder: Path | None) -> dict[str, float]:
        with torch.no_grad():
            task.picture(folder)
            return task.validate()

    folders = [tmp_path / "one", tmp_path / "several"]
    for folder in folders:
        folder.mkdir()
    expected = results(folders[0])

    def work(rank: int) -> int:
        with joined(CPU, 60.0) as ranks:
            task.bench = replace(task.bench, sharing=ranks)
            assert results(folders[1] if ranks.is_first else None) == expected
        return 0

    with ForkedRanks(work, tmp_path, 3) as job:
        assert job.wait() == [0, 0, 0], job.words()
    for name in ("grid.png", "prompts.json"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()


def test_the_loss_of_a_sample_does_not_depend_on_its_neighbours(parts: tuple[Path, Path, Path], tmp_path: Path) -> None:
    task, loader = make_task(parts, tmp_path)
    batch = task.prepare(next(loader.batches(0, 1)))
    together = [task.loss(part, 1)[0].item() for part in task.parts(batch, 8)]
    whole, _ = task.loss(batch, 1)
    assert sum(together) / 8 == pytest.approx(whole.item(), rel=1e-5)
    assert len({round(value, 6) for value in together}) == 8, "each sample has its own noise and level"


@pytest.mark.parametrize("precision", [pytest.param("fp32", marks=pytest.mark.exhaustive), "bf16"])
def test_a_run_that_is_lost_and_continued_ends_the_same(
    parts: tuple[Path, Path, Path], tmp_path: Path, precision: str
) -> None:
    recipe = unet_recipe(*parts, steps=7, save_every=3, ema_decay=0.9, precision=precision)
    assert_resumes(recipe, tmp_path, 3)


@pytest.mark.slow
def test_the_worker_count_changes_nothing(parts: tuple[Path, Path, Path], tmp_path: Path) -> None:
    recipe = unet_recipe(*parts, steps=5, save_every=2)
    trained(recipe, tmp_path / "none")
    recipe["data"]["num_workers"] = 2
    lose_after(2, recipe, tmp_path / "two")
    trained(recipe, tmp_path / "two")
    assert_same_run(tmp_path / "none", tmp_path / "two", 5)


def test_a_signal_before_the_first_step_ends_the_run_at_once_and_loses_nothing(
    parts: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = unet_recipe(*parts, steps=3)
    build = DenoiserTask.__init__

    def signalled(self: DenoiserTask, *arguments: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        build(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(DenoiserTask, "__init__", signalled)
        with pytest.raises(Preempted):
            trained(recipe, tmp_path / "run")
    assert status(tmp_path / "run")["state"] == "preempted"
    assert not list((tmp_path / "run/checkpoints").glob("step-*"))
    assert trained(recipe, tmp_path / "run")["step"] == 3


def test_another_autoencoder_under_the_same_path_is_another_run(scenes: Path, clip_run: Path, tmp_path: Path) -> None:
    for seed, name in ((0, "one"), (1, "two")):
        trained(vae_recipe(scenes, steps=1) | {"seed": seed}, tmp_path / name)
    recipe = unet_recipe(scenes, clip_run / "model", tmp_path / "one/model", steps=1)
    trained(recipe, tmp_path / "unet")
    (tmp_path / "one/model").rename(tmp_path / "moved")
    trained(recipe | {"vae": str(tmp_path / "moved")}, tmp_path / "unet")
    with pytest.raises(CheckpointError, match="the fingerprint of vae"):
        trained(recipe | {"vae": str(tmp_path / "two/model")}, tmp_path / "unet")


def test_prompts_are_optional_and_pictures_then_left_out(
    scenes: Path, clip_run: Path, vae_run: Path, tmp_path: Path
) -> None:
    recipe = unet_recipe(scenes, clip_run / "model", vae_run / "model", steps=2, sample_every=1)
    recipe["data"]["val_shards"] = None
    trained(recipe, tmp_path / "run")
    assert not list((tmp_path / "run").glob("samples/*"))
    assert (tmp_path / "run/model/model_index.json").is_file()


def test_pictures_that_overflow_while_training_are_named_and_left_out(
    scenes: Path, clip_run: Path, vae_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ldm_cli.sampling.pixels.is_sound", lambda images: torch.zeros(len(images), dtype=torch.bool))
    recipe = unet_recipe(scenes, clip_run / "model", vae_run / "model", steps=2, sample_every=2)
    assert trained(recipe, tmp_path / "run")["state"] == "finished"
    assert not list((tmp_path / "run").rglob("grid.png"))
    assert "with seed 0 is not finite: the autoencoder gives values" in (tmp_path / "run/log.txt").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"in_channels": 4, "out_channels": 4}, "have 3 channels"),
        ({"cross_attention_dim": 32}, "gives 16"),
        ({"cross_attention_dim": [16, 24]}, "gives 16"),
        ({"num_class_embeds": 10}, "asks for a condition that train-unet does not have"),
        ({"class_embed_type": "timestep"}, "asks for a condition that train-unet does not have"),
    ],
)
def test_parts_that_do_not_fit_are_named(
    parts: tuple[Path, Path, Path], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    recipe = unet_recipe(*parts)
    recipe["unet"] |= change
    with pytest.raises(RecipeError, match=message):
        trained(recipe, tmp_path / "run")


def test_other_data_under_the_same_path_is_another_run(clip_run: Path, vae_run: Path, tmp_path: Path) -> None:
    recipe = unet_recipe(tmp_path / "scenes", clip_run / "model", vae_run / "model", steps=1)
    write_scenes(tmp_path / "scenes", 8, 32, 0, SilentReporter(), val_samples=4)
    trained(recipe, tmp_path / "run")
    write_scenes(tmp_path / "scenes", 8, 32, 1, SilentReporter(), val_samples=4, overwrite=True)
    with pytest.raises(CheckpointError, match="the fingerprint of data"):
        trained(recipe, tmp_path / "run")
