"""img2img and inpainting against the pipelines of diffusers: same latents, same noise, same picture to work on."""

import pytest
import torch

from ldm_cli.sampling.config import SamplingConfig
from ldm_cli.sampling.edit_input import EditInput
from ldm_cli.sampling.request import ImageRequest
from ldm_cli.sampling.sample_options import SampleOptions
from tests.parity.their_pipeline import NEGATIVE, PROMPTS, latents, scheduler, their_folder
from tests.sampling.tiny import loaded_pipeline

diffusers = pytest.importorskip("diffusers")

STEPS = 6


def picture():
    coarse = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    return (torch.nn.functional.interpolate(coarse, (16, 16), mode="bilinear")[0] * 255).to(torch.uint8)


def mask():
    hole = torch.zeros(16, 16, dtype=torch.bool)
    hole[4:12, 2:10] = True
    return hole


def ours(folder, sampler, strength, hole, noise=None):
    config = SamplingConfig(sampler=sampler, steps=STEPS, guidance=4.0, negative=NEGATIVE)
    options = SampleOptions(edit_input=EditInput(picture(), hole, (16, 16), strength))
    requests = [ImageRequest(prompt, 0) for prompt in PROMPTS]
    images = loaded_pipeline(folder).generate(requests, config, latents() if noise is None else noise, options=options)
    return torch.stack([image.pixels for image in images])


def theirs(kind, folder, monkeypatch, module, sampler, strength, safety_checker=True, **given):
    pipeline = kind.from_pretrained(folder, **({"safety_checker": None} if safety_checker else {}))
    monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: latents())
    mode = lambda output, **_: output.latents if hasattr(output, "latents") else output.latent_dist.mode()  # noqa: E731
    monkeypatch.setattr(module, "retrieve_latents", mode)
    # Stable Diffusion's own file says clip_sample: false for the sake of DDIM; the others have no such key.
    extra = {"clip_sample": False} if sampler == "ddim" else {}
    pipeline.scheduler = type(scheduler(sampler)).from_config(pipeline.scheduler.config, **extra)
    pipeline.set_progress_bar_config(disable=True)
    result = pipeline(
        PROMPTS,
        negative_prompt=[NEGATIVE] * 2,
        image=(picture()[None].float() / 127.5 - 1).expand(2, -1, -1, -1),
        strength=strength,
        num_inference_steps=STEPS,
        guidance_scale=4.0,
        output_type="np",
        **given,
    )
    return (torch.from_numpy(result.images).permute(0, 3, 1, 2) * 255).round().to(torch.uint8)


def assert_filled_alike(kind, folder, monkeypatch, module, sampler, strength, **given):
    """The hole, as by a pipeline of diffusers; returns our pictures."""
    hole = mask()
    given |= {"mask_image": hole[None, None].float(), "height": 16, "width": 16}
    expected = theirs(kind, folder, monkeypatch, module, sampler, strength, **given)
    found = ours(folder, sampler, strength, hole)
    assert expected[:, :, hole].float().std() > 10, "flat pictures prove nothing"
    assert (found.int() - expected.int())[:, :, hole].abs().max() <= 2
    return found


@pytest.mark.parametrize("strength", [0.3, 0.99])
@pytest.mark.parametrize("sampler", ["ddim", "euler", "dpmpp_2m"])
def test_img2img_is_that_of_diffusers(tmp_path, monkeypatch, sampler, strength):
    module = diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img
    folder = their_folder(tmp_path, scheduler("ddim"))
    expected = theirs(diffusers.StableDiffusionImg2ImgPipeline, folder, monkeypatch, module, sampler, strength)
    found = ours(folder, sampler, strength, None)
    assert expected.float().std() > 10, "flat pictures prove nothing"
    assert (found.int() - expected.int()).abs().max() <= 2


@pytest.mark.parametrize("in_channels", [4, 9])
@pytest.mark.parametrize("strength", [0.5, 1.0])
@pytest.mark.parametrize("sampler", ["ddim", pytest.param("euler", marks=pytest.mark.exhaustive), "dpmpp_2m"])
def test_inpainting_is_that_of_diffusers_inside_of_the_mask(tmp_path, monkeypatch, sampler, strength, in_channels):
    module = diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_inpaint
    folder, kept = their_folder(tmp_path, scheduler("ddim"), in_channels=in_channels), ~mask()
    kind = diffusers.StableDiffusionInpaintPipeline
    found = assert_filled_alike(kind, folder, monkeypatch, module, sampler, strength)
    assert torch.equal(found[:, :, kept], picture()[:, kept].expand(2, -1, -1))
