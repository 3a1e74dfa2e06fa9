"""Pipeline folders against diffusers and transformers, in both directions, from the same initial latents."""

import json

import pytest
import torch

from ldm_cli.core.diffusion.config import DiffusionConfig
from ldm_cli.core.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from ldm_cli.core.models.clip import CLIPTextConfig, CLIPTextModel
from ldm_cli.core.models.unet_2d_condition import UNet2DConditionConfig, UNet2DConditionModel
from ldm_cli.data.tokenizer import Tokenizer, TokenizerConfig
from ldm_cli.formats.pipeline_folder import our_settings
from ldm_cli.sampling.config import SamplingConfig
from ldm_cli.sampling.pipeline import ImageRequest, Pipeline

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

PROMPTS = ["a small red circle at the top left", "a blue square"]
NEGATIVE = "green"
UNET = dict(
    sample_size=8,
    block_out_channels=(16, 32),
    layers_per_block=1,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    cross_attention_dim=24,
    attention_head_dim=2,
    norm_num_groups=8,
)
VAE = dict(
    block_out_channels=(16, 32),
    layers_per_block=1,
    down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2,
    norm_num_groups=8,
    sample_size=16,
)
TEXT = dict(hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, projection_dim=16)


def randomize(module, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            fan = parameter[0].numel() if parameter.ndim > 1 else 100
            parameter.copy_(noise / fan**0.5 + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
    return module.eval()


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([*PROMPTS, "a large green triangle left of a red circle"] * 3, TokenizerConfig(vocab_size=600))


def scheduler(name, **fields):
    stable = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
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
    text = transformers.CLIPTextConfig(
        **TEXT,
        vocab_size=tokenizer.vocab_size,
        bos_token_id=tokenizer.start_id,
        eos_token_id=tokenizer.end_id,
        pad_token_id=tokenizer.pad_id,
    )
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
        # Stable Diffusion's own file says clip_sample: false for the sake of DDIM; PNDM does not know the key.
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


def test_original_stable_diffusion_scheduler_file_is_read_with_each_samplers_own_spacing(tmp_path, tokenizer):
    folder = their_folder(tmp_path, tokenizer, scheduler("pndm"))
    file = folder / "scheduler" / "scheduler_config.json"
    absent = ("timestep_spacing", "prediction_type", "trained_betas")
    content = json.loads(file.read_text())
    file.write_text(json.dumps({name: value for name, value in content.items() if name not in absent}))
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
def test_folder_that_we_write_opens_in_diffusers_and_gives_the_same_pictures(tmp_path, tokenizer, diffusion):
    text = CLIPTextConfig(
        **TEXT,
        vocab_size=tokenizer.vocab_size,
        bos_token_id=tokenizer.start_id,
        eos_token_id=tokenizer.end_id,
        pad_token_id=tokenizer.pad_id,
        max_position_embeddings=40,
    )
    pipeline = Pipeline(
        unet=randomize(UNet2DConditionModel(UNet2DConditionConfig(**UNET)), 4),
        vae=randomize(AutoencoderKL(AutoencoderKLConfig(**VAE, scaling_factor=0.7, shift_factor=0.3)), 5),
        text_encoder=randomize(CLIPTextModel(text), 6),
        tokenizer=tokenizer,
        settings=our_settings(diffusion.to_mapping()),
    )
    before = our_images(pipeline)
    pipeline.save(tmp_path)
    assert_equal_pictures(before, their_images(tmp_path))
    assert_equal_pictures(our_images(Pipeline.load(tmp_path)), their_images(tmp_path))
