"""Pipeline folders against diffusers and transformers, in both directions, from the same initial latents."""

import json

import pytest
import torch

from ldm_cli.core.diffusion.config import DiffusionConfig
from ldm_cli.sampling.config import SamplingConfig
from ldm_cli.sampling.pipeline import Pipeline
from ldm_cli.sampling.request import ImageRequest
from tests.sampling.tiny import TEXT, UNET, VAE, randomize, special_ids, tiny_pipeline, tiny_tokenizer

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

PROMPTS = ["a small red circle at the top left", "a blue square"]
NEGATIVE = "green"


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def scheduler(name, **fields):
    stable = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    extra = {"ddim": {"clip_sample": False, "set_alpha_to_one": False}, "pndm": {"skip_prk_steps": True}}
    classes = {
        "ddim": diffusers.DDIMScheduler,
        "pndm": diffusers.PNDMScheduler,
        "euler": diffusers.EulerDiscreteScheduler,
        "dpmpp_2m": diffusers.DPMSolverMultistepScheduler,
    }
    return classes[name](**(stable | extra.get(name, {}) | fields))


def their_folder(folder, tokenizer, the_scheduler):
    tokenizer.save(folder / "own_tokenizer")
    text = transformers.CLIPTextConfig(**TEXT, **special_ids(tokenizer))
    pipeline = diffusers.StableDiffusionPipeline(
        vae=randomize(diffusers.AutoencoderKL(**VAE), 1),
        text_encoder=randomize(transformers.CLIPTextModel(text), 2),
        tokenizer=transformers.CLIPTokenizer.from_pretrained(folder / "own_tokenizer"),
        unet=randomize(diffusers.UNet2DConditionModel(**UNET), 3),
        scheduler=the_scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder / "pipeline")
    return folder / "pipeline"


def latents():
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(7))


def our_images(pipeline, **fields):
    config = SamplingConfig(steps=5, guidance=7.5, negative=NEGATIVE, **fields)
    requests = [ImageRequest(prompt, 0) for prompt in PROMPTS]
    return torch.stack([image.pixels for image in pipeline.generate(requests, config, latents())])


def their_images(folder, sampler=None):
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    if sampler is not None:
        # Stable Diffusion's own file says clip_sample: false for the sake of DDIM; PNDM has no such key.
        extra = {"clip_sample": False} if sampler == "ddim" else {}
        pipeline.scheduler = type(scheduler(sampler)).from_config(pipeline.scheduler.config, **extra)
    result = pipeline(
        PROMPTS,
        negative_prompt=[NEGATIVE] * 2,
        num_inference_steps=5,
        guidance_scale=7.5,
        latents=latents(),
        output_type="np",
    )
    return (torch.from_numpy(result.images).permute(0, 3, 1, 2) * 255).round().to(torch.uint8)


def assert_equal_pictures(ours, theirs):
    assert ours.shape == theirs.shape == (2, 3, 16, 16)
    assert ours.float().std() > 10, "flat pictures prove nothing"
    assert (ours.int() - theirs.int()).abs().max() <= 2


@pytest.mark.parametrize("sampler", ["ddim", "euler", "dpmpp_2m"])
def test_pndm_folder_written_by_diffusers_is_sampled_as_diffusers_samples_it(tmp_path, tokenizer, sampler):
    folder = their_folder(tmp_path, tokenizer, scheduler("pndm"))
    assert_equal_pictures(our_images(Pipeline.load(folder), sampler=sampler), their_images(folder, sampler))


@pytest.mark.parametrize("name", ["ddim", "euler", "dpmpp_2m"])
def test_folder_with_the_sampler_of_the_same_name_gives_the_same_pictures(tmp_path, tokenizer, name):
    folder = their_folder(tmp_path, tokenizer, scheduler(name))
    assert_equal_pictures(our_images(Pipeline.load(folder), sampler=name), their_images(folder))


def test_file_of_stable_diffusion_1_is_read_with_each_samplers_own_spacing(tmp_path, tokenizer):
    folder = their_folder(tmp_path, tokenizer, scheduler("pndm"))
    file = folder / "scheduler" / "scheduler_config.json"
    content = json.loads(file.read_text())
    for absent in ("timestep_spacing", "prediction_type", "trained_betas"):
        del content[absent]
    file.write_text(json.dumps(content))
    for sampler in ("ddim", "euler"):
        assert_equal_pictures(our_images(Pipeline.load(folder), sampler=sampler), their_images(folder, sampler))


@pytest.mark.parametrize(
    "diffusion",
    [
        DiffusionConfig(),
        DiffusionConfig(prediction_type="v_prediction", rescale_betas_zero_snr=True),
    ],
    ids=["epsilon", "zero-snr"],
)
def test_folder_that_we_write_opens_in_diffusers_and_gives_the_same_pictures(tmp_path, diffusion):
    pipeline = tiny_pipeline(diffusion, scaling_factor=0.7, shift_factor=0.3)
    before = our_images(pipeline)
    pipeline.save(tmp_path)
    expected = their_images(tmp_path)
    assert_equal_pictures(before, expected)
    assert_equal_pictures(our_images(Pipeline.load(tmp_path)), expected)
