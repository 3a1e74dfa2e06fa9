"""unCLIP against diffusers: its folders in ours, ours in its pipelines, the prior's whole trajectory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from ldm_cli.errors import CheckpointError, UsageError
from ldm_cli.families.clip_image_encoder import CLIPImageEncoder
from ldm_cli.families.open_family import open_family, outline_family
from ldm_cli.families.prior import open_prior
from ldm_cli.families.prompt_chunks import PromptReading
from ldm_cli.families.unclip import UnCLIP
from ldm_cli.sampling.config import PriorConfig, SamplingConfig
from ldm_cli.sampling.embedded_pictures import embedded_pictures
from ldm_cli.sampling.noise import initial_noise, step_noise
from ldm_cli.sampling.pipeline_of import pipeline_of
from ldm_cli.sampling.prior_sampler import embeddings_of
from ldm_cli.sampling.request import Blend, ImageRequest
from ldm_cli.sampling.sample_options import PLAIN, SampleOptions, TextDifference
from tests.parity.test_xl import assert_alike
from tests.parity.their_pipeline import NEGATIVE, PROMPTS, latents
from tests.parity.unclip_pipeline import REQUESTS, their_unclip_folder, their_variation_folder, theirs, yielding
from tests.parity.xl_pipeline import change

diffusers = pytest.importorskip("diffusers")
PRIOR = {"steps": 4, "scale": 4.0}
VARIATIONS = "StableUnCLIPImg2ImgPipeline"


def opened(folder: Path) -> UnCLIP:
    family = open_family(folder)
    assert isinstance(family, UnCLIP)
    return family


def ours(
    folder: Path,
    options: SampleOptions = PLAIN,
    requests: list[ImageRequest] = REQUESTS,
    noise: Tensor | None = None,
    **fields: Any,
) -> Tensor:
    config = SamplingConfig.from_mapping({"steps": 5, "guidance": 3.0, "prior": PRIOR} | fields)
    noise = latents() if noise is None else noise
    generated = pipeline_of(opened(folder)).generate(requests, config, noise, options=options)
    return torch.stack([image.pixels for image in generated])


def picture(folder: Path, seed: int) -> Path:
    pixels = torch.randint(0, 256, (16, 16, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(folder / f"{seed}.png")
    return folder / f"{seed}.png"


@pytest.mark.parametrize("level", [0, 400])
@pytest.mark.parametrize("seed", range(4))
def test_their_folder_is_sampled_as_their_pipeline_samples_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int, level: int
) -> None:
    folder = their_unclip_folder(tmp_path, seed)
    expected = theirs(folder, monkeypatch, noise_level=level, negative_prompt=[NEGATIVE] * 2)
    found = ours(folder, negative=NEGATIVE, prior=PRIOR | {"noise_level": level})
    assert_alike(found, expected)
    assert not torch.equal(found, ours(folder, negative=NEGATIVE, prior=PRIOR | {"noise_level": 500 - level}))


@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("seed", range(3))
def test_the_priors_trajectory_ends_where_theirs_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int, scale: float
) -> None:
    folder = their_unclip_folder(tmp_path, seed)
    found: list[Tensor] = []
    noising = diffusers.StableUnCLIPPipeline.noise_image_embeddings

    def remembered(self: Any, image_embeds: Tensor, **given: Any) -> Tensor:
        found.append(image_embeds)
        embeddings: Tensor = noising(self, image_embeds, **given)
        return embeddings

    monkeypatch.setattr(diffusers.StableUnCLIPPipeline, "noise_image_embeddings", remembered)
    theirs(folder, monkeypatch, prior_guidance_scale=scale, num_inference_steps=1)
    prior = open_prior(folder, "cpu", "fp32", "prior_")
    embeddings = embeddings_of(prior, REQUESTS, PriorConfig(steps=4, scale=scale), PromptReading(), lambda _: None)
    torch.testing.assert_close(embeddings, found[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_variations_are_those_of_their_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    folder, file = their_variation_folder(tmp_path, seed), picture(tmp_path, seed)
    expected = theirs(folder, monkeypatch, VARIATIONS, image=[Image.open(file)] * 2, prompt=PROMPTS, noise_level=100)
    options = SampleOptions(image_embeds=embedded_pictures(opened(folder), [str(file)]))
    assert_alike(ours(folder, options, prior={"noise_level": 100}), expected)


def test_a_folder_that_we_write_opens_in_both_pipelines_and_gives_the_same_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "one").mkdir()
    given, variation = their_unclip_folder(tmp_path / "one"), their_variation_folder(tmp_path)
    whole = replace(opened(given), image_encoder=CLIPImageEncoder.load(variation / "image_encoder"))
    whole.save(tmp_path / "ours")
    assert torch.equal(ours(tmp_path / "ours"), ours(given))
    assert_alike(ours(tmp_path / "ours"), theirs(tmp_path / "ours", monkeypatch))
    file = picture(tmp_path, 1)
    options = SampleOptions(image_embeds=embedded_pictures(whole, [str(file)]))
    expected = theirs(tmp_path / "ours", monkeypatch, VARIATIONS, image=[Image.open(file)] * 2, prompt=PROMPTS)
    assert_alike(ours(tmp_path / "ours", options), expected)


def test_the_outline_has_the_networks_of_the_model(tmp_path: Path) -> None:
    folder = their_unclip_folder(tmp_path)
    family = opened(folder)
    assert outline_family(folder).keys() == {"unet", "vae", "text_encoder", "prior", "prior_text_encoder"}
    assert family.networks.keys() == outline_family(folder).keys()
    assert family.weights_sha256.keys() == {*outline_family(folder), "image_normalizer"}


def test_a_prior_by_itself_opens_in_the_pipeline_of_kandinsky(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "one").mkdir()
    prior = open_prior(their_unclip_folder(tmp_path / "one", 1), "cpu", "fp32", "prior_")
    prior.codec.image_encoder = CLIPImageEncoder.load(their_variation_folder(tmp_path, 1) / "image_encoder")
    settings = replace(prior.settings, timestep_spacing="linspace")
    prior = replace(prior, settings=settings, limit=3.0)
    prior.save(tmp_path / "ours")
    pipeline = diffusers.KandinskyV22PriorPipeline.from_pretrained(tmp_path / "ours")
    pipeline.set_progress_bar_config(disable=True)
    # Theirs lose three digits of 1 − ᾱ_0 in float32.
    pipeline.scheduler.alphas = 1 - pipeline.scheduler.betas.double()
    pipeline.scheduler.alphas_cumprod = pipeline.scheduler.alphas.cumprod(0)
    shape, cpu = (prior.codec.channels,), torch.device("cpu")
    noise = yielding(step_noise(REQUESTS, shape, cpu, "prior"))
    monkeypatch.setattr(diffusers.schedulers.scheduling_unclip, "randn_tensor", noise)
    first = initial_noise(REQUESTS, shape, cpu, "prior")
    expected = pipeline(PROMPTS, latents=first, num_inference_steps=6, guidance_scale=2.0).image_embeds
    reopened = open_prior(tmp_path / "ours", "cpu", "fp32")
    found = embeddings_of(reopened, REQUESTS, PriorConfig(steps=6, scale=2.0), PromptReading(), lambda _: None)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_between_two_pictures_the_embedding_lies_on_their_arc(tmp_path: Path) -> None:
    folder = their_variation_folder(tmp_path)
    embeds = embedded_pictures(opened(folder), [str(picture(tmp_path, seed)) for seed in (1, 2)])
    ends = [ours(folder, SampleOptions(image_embeds=embeds[:, i : i + 1]), REQUESTS[:1], latents()[:1]) for i in (0, 1)]

    def at(weight: float) -> Tensor:
        request = replace(REQUESTS[0], blend=Blend(prompt=REQUESTS[0].prompt, seed=REQUESTS[0].seed, weight=weight))
        return ours(folder, SampleOptions(image_embeds=embeds), [request], latents()[:1])

    assert torch.equal(at(0.0), ends[0])
    assert torch.equal(at(1.0), ends[1])
    assert not torch.equal(at(0.5), ends[0])
    assert not torch.equal(at(0.5), ends[1])


def test_a_difference_of_texts_moves_a_picture_by_its_amount(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    images = CLIPImageEncoder.load(their_variation_folder(tmp_path / "one") / "image_encoder")
    replace(opened(their_unclip_folder(tmp_path)), image_encoder=images).save(tmp_path / "ours")
    embeds = embedded_pictures(opened(tmp_path / "ours"), [str(picture(tmp_path, 1))])

    def moved(amount: float, target: str = "blue") -> Tensor:
        difference = TextDifference("red", target, amount)
        return ours(tmp_path / "ours", SampleOptions(image_embeds=embeds, text_difference=difference))

    plain = ours(tmp_path / "ours", SampleOptions(image_embeds=embeds))
    assert torch.equal(moved(0.0), plain)
    assert not torch.equal(moved(0.4), plain)
    with pytest.raises(UsageError, match="mean the same"):
        moved(0.4, "red")


def test_a_decoder_alone_asks_for_a_picture(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no picture is given: this model has no prior"):
        ours(their_variation_folder(tmp_path))


def test_a_picture_does_not_depend_on_the_others_of_its_job(tmp_path: Path) -> None:
    folder = their_unclip_folder(tmp_path)
    requests = [*REQUESTS, ImageRequest("a green star", 9)] * 3
    config = SamplingConfig.from_mapping({"steps": 3, "guidance": 3.0, "prior": PRIOR, "height": 16, "width": 16})
    pipeline = pipeline_of(opened(folder))
    together = [image.pixels for image in pipeline.generate(requests, config)]
    [alone] = pipeline.generate(requests[2:3], config)
    assert torch.equal(alone.pixels, together[2])
    assert torch.equal(together[5], together[2])


@pytest.mark.parametrize(
    ("place", "values", "message"),
    [
        ("prior_scheduler", {"thresholding": True}, "thresholding=True is not supported"),
        ("prior_scheduler", {"_class_name": "DDIMScheduler"}, "scheduler 'DDIMScheduler' is not supported"),
        ("prior_scheduler", {"variance_type": "learned"}, "variance_type='learned' is not supported"),
        ("prior", {"norm_in_type": "layer"}, "norm_in_type"),
        ("scheduler", {"clip_sample": True}, "clip_sample=True is not supported"),
    ],
)
def test_what_is_not_supported_is_named(tmp_path: Path, place: str, values: dict[str, Any], message: str) -> None:
    folder = their_unclip_folder(tmp_path)
    name = "scheduler_config.json" if place.endswith("scheduler") else "config.json"
    change(folder / place / name, **values)
    with pytest.raises(CheckpointError, match=message):
        open_family(folder)
