"""Whole pictures of upscalers against diffusers, from the same noise; folders in both directions."""

import pytest
import torch

from ldm_cli.core.condition import Condition
from ldm_cli.core.window import Window
from ldm_cli.families.low_resolution import enlarged
from ldm_cli.families.open_family import open_family
from ldm_cli.sampling.config import SamplingConfig
from ldm_cli.sampling.request import ImageRequest
from ldm_cli.sampling.upscaling import Upscaling, upscale
from tests.parity.their_pipeline import NEGATIVE, PROMPTS
from tests.sampling.tiny import TEXT, UNET, VAE, randomize, special_ids, tiny_tokenizer

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

SIZE = 12
NOISE = torch.randn(16, 2, 4, 24, 24, generator=torch.Generator().manual_seed(7))
SMALL = torch.randint(0, 256, (2, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(9), dtype=torch.uint8)


def text_parts(folder, length):
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = length
    tokenizer.save(folder / "own_tokenizer")
    config = transformers.CLIPTextConfig(**TEXT, **special_ids(tokenizer), max_position_embeddings=length)
    tower = randomize(transformers.CLIPTextModel(config), 2)
    return {"text_encoder": tower, "tokenizer": transformers.CLIPTokenizer.from_pretrained(folder / "own_tokenizer")}


def latent_folder(folder, scheduler, **unet):
    """A published upscaler: its autoencoder's own scale is another one than the pipeline's."""
    vae = {"block_out_channels": (16, 16), "scaling_factor": 0.18215}
    pipeline = diffusers.StableDiffusionUpscalePipeline(
        vae=randomize(diffusers.AutoencoderKL(**VAE | vae), 1),
        unet=randomize(diffusers.UNet2DConditionModel(**UNET | {"in_channels": 7, "num_class_embeds": 400} | unet), 3),
        low_res_scheduler=diffusers.DDPMScheduler(beta_schedule="scaled_linear"),
        scheduler=scheduler,
        **text_parts(folder, 40),
    )
    pipeline.save_pretrained(folder / "pipeline")
    return folder / "pipeline"


def pixel_folder(folder, **unet):
    fields = {"in_channels": 6, "out_channels": 6, "class_embed_type": "timestep", "sample_size": 24}
    pipeline = diffusers.IFSuperResolutionPipeline(
        unet=randomize(diffusers.UNet2DConditionModel(**UNET | fields | unet), 3),
        scheduler=diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2", thresholding=True, sample_max_value=1.5),
        image_noising_scheduler=diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        safety_checker=None,
        feature_extractor=None,
        watermarker=None,
        requires_safety_checker=False,
        **text_parts(folder, 77),
    )
    pipeline.save_pretrained(folder / "pipeline")
    return folder / "pipeline"


@pytest.fixture
def same_noise(monkeypatch):
    """Ours is that of the test: the first is what sampling begins with, the second is on the small picture."""

    def noise(seeds, purpose, shape, window, device):
        rows, place = [seed - 5 for seed in seeds], (..., *window.area[1:])
        first = {"upscaling: initial noise": 0, "upscaling: noise on the small picture": 1}.get(purpose, 2)
        return lambda step: NOISE[first + step][rows, : shape[0], : shape[1], : shape[2]][place]

    monkeypatch.setattr("ldm_cli.sampling.upscaling.noise_of_window", noise)


def our_images(folder, noise_level, **fields):
    family = open_family(folder)
    config = SamplingConfig.from_mapping({"steps": 4, "negative": NEGATIVE} | fields)
    requests = [ImageRequest(prompt, 5 + i) for i, prompt in enumerate(PROMPTS)]
    found = list(upscale(Upscaling(family, config, noise_level), list(SMALL), requests))
    return torch.stack([image.pixels for image in found])


def as_bytes(images):
    return (torch.from_numpy(images).permute(0, 3, 1, 2) * 255).round().to(torch.uint8)


def assert_equal_pictures(ours, theirs):
    assert ours.shape == theirs.shape == (2, 3, 24, 24)
    assert ours.float().std() > 10, "flat pictures prove nothing"
    assert (ours.int() - theirs.int()).abs().max() <= 2


SCHEDULER = {"beta_schedule": "scaled_linear", "beta_start": 0.0001, "clip_sample": False, "set_alpha_to_one": False}


@pytest.mark.parametrize(
    ("fields", "unet", "guidance", "level"),
    [
        ({"steps_offset": 1, "prediction_type": "v_prediction"}, {}, 9.0, 20),
        ({"steps_offset": 0}, {"block_out_channels": (8, 24), "use_linear_projection": True}, 1.0, 0),
        ({"timestep_spacing": "trailing"}, {"layers_per_block": 2, "only_cross_attention": [True, False]}, 3.0, 350),
    ],
)
def test_latents_are_enlarged_as_by_diffusers(tmp_path, same_noise, monkeypatch, fields, unet, guidance, level):
    folder = latent_folder(tmp_path, diffusers.DDIMScheduler(**SCHEDULER | fields), **unet)
    ours = our_images(folder, level, guidance=guidance)
    pipeline = diffusers.StableDiffusionUpscalePipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    module = diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_upscale
    monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: NOISE[1][:, :3, :SIZE, :SIZE])
    given = {"image": SMALL.float() / 255, "negative_prompt": [NEGATIVE] * 2, "latents": NOISE[0][..., :SIZE, :SIZE]}
    result = pipeline(
        PROMPTS, **given, num_inference_steps=4, guidance_scale=guidance, noise_level=level, output_type="np"
    )
    assert_equal_pictures(ours, as_bytes(result.images))


@pytest.mark.parametrize(("unet", "guidance", "level"), [({}, 4.0, 250), ({"layers_per_block": 2}, 1.0, 0)])
def test_pixels_are_enlarged_as_by_diffusers(tmp_path, same_noise, monkeypatch, unet, guidance, level):
    folder = pixel_folder(tmp_path, **unet)
    family = open_family(folder)
    assert family.low_resolution.factor == 4  # no file says it
    monkeypatch.setattr(
        "ldm_cli.families.pixel_upscale._SETTINGS", {"upscale_factor": 2, "max_noise_level": 999, "noise_level": 250}
    )
    ours = our_images(folder, level, guidance=guidance)
    pipeline = diffusers.IFSuperResolutionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    drawn = iter(NOISE[:, :, :3])
    for module in (diffusers.pipelines.deepfloyd_if.pipeline_if_superresolution, diffusers.schedulers.scheduling_ddpm):
        monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: next(drawn))
    given = {"image": SMALL.float() / 127.5 - 1, "negative_prompt": [NEGATIVE] * 2, "clean_caption": False}
    size = {"height": 24, "width": 24, "num_inference_steps": 4, "output_type": "np"}
    result = pipeline(PROMPTS, **given, **size, guidance_scale=guidance, noise_level=level)
    assert_equal_pictures(ours, as_bytes(result.images))


@pytest.mark.parametrize("kind", [{"num_class_embeds": 400}, {"class_embed_type": "timestep"}])
@pytest.mark.parametrize("level", [0, 17, 350])
def test_the_level_of_the_noise_is_embedded_as_by_diffusers(kind, level):
    from ldm_cli.core.models.unet_2d_condition import UNet2DConditionModel
    from ldm_cli.core.models.unet_2d_condition_config import UNet2DConditionConfig

    fields = UNET | {"in_channels": 7} | kind
    theirs = randomize(diffusers.UNet2DConditionModel(**fields), 3)
    ours = UNet2DConditionModel(UNet2DConditionConfig.from_hugging_face(dict(theirs.config)))
    ours.load_state_dict(theirs.state_dict())
    x, levels, text = torch.randn(2, 7, 8, 8), torch.full((2,), level), torch.randn(2, 5, 24)
    with torch.no_grad():
        expected = theirs(x, 30, encoder_hidden_states=text, class_labels=levels).sample
        found = ours(x[:, :4], torch.tensor([30.0]), Condition(text, levels, concat=x[:, 4:]))
        embedded = ours.class_embedding(levels if "num_class_embeds" in kind else ours._sinusoids(levels, 16, x))
        emb = theirs.get_class_embed(sample=x, class_labels=levels)
    assert torch.equal(embedded, emb)
    assert (found - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("kind", ["latents", "pixels"])
def test_a_folder_of_ours_opens_in_diffusers_with_the_same_weights_and_levels(tmp_path, kind):
    if kind == "latents":
        theirs = latent_folder(tmp_path, diffusers.DDIMScheduler(**SCHEDULER, steps_offset=1))
        pipeline_class, name = diffusers.StableDiffusionUpscalePipeline, "low_res_scheduler"
    else:
        theirs = pixel_folder(tmp_path)
        pipeline_class, name = diffusers.IFSuperResolutionPipeline, "image_noising_scheduler"
    family = open_family(theirs)
    family.save(tmp_path / "ours")
    before, after = (pipeline_class.from_pretrained(folder) for folder in (theirs, tmp_path / "ours"))
    assert torch.equal(getattr(before, name).alphas_cumprod, getattr(after, name).alphas_cumprod)
    assert torch.equal(before.scheduler.alphas_cumprod, after.scheduler.alphas_cumprod)
    for part in ("unet", "text_encoder", *(["vae"] if kind == "latents" else [])):
        states = getattr(before, part).state_dict(), getattr(after, part).state_dict()
        assert states[0].keys() == states[1].keys()
        assert all(torch.allclose(tensor, states[1][key], atol=1e-7) for key, tensor in states[0].items()), part
    assert open_family(tmp_path / "ours").low_resolution == family.low_resolution


def test_latents_of_another_unit_are_saved_in_that_of_the_pipeline(tmp_path):
    family = open_family(latent_folder(tmp_path, diffusers.DDIMScheduler(**SCHEDULER, steps_offset=1)))
    family.codec.config = family.codec.config.model_copy(update={"scaling_factor": 0.7, "shift_factor": 0.4})
    family.save(tmp_path / "ours")
    vae = diffusers.StableDiffusionUpscalePipeline.from_pretrained(tmp_path / "ours").vae
    saved = open_family(tmp_path / "ours").codec
    assert vae.config.scaling_factor == saved.config.scaling_factor == 0.08333
    images = SMALL.float() / 127.5 - 1
    latents, noise = family.codec.encode(images), NOISE[0, :, :, :6, :6]
    with torch.no_grad():
        assert (saved.encode(images) - latents).abs().max() < 1e-5
        assert (saved.decode(latents) - family.codec.decode(latents)).abs().max() < 1e-5
        assert (vae.decode(latents / 0.08333).sample - family.codec.decode(latents)).abs().max() < 1e-5
        sampled = [codec.latents(codec.moments(images), noise) for codec in (family.codec, saved)]
    assert (sampled[0] - sampled[1]).abs().max() < 1e-5


def test_a_part_is_enlarged_as_in_the_whole():
    pictures = torch.randn(2, 3, 9, 13, generator=torch.Generator().manual_seed(0))
    whole = torch.nn.functional.interpolate(pictures, (27, 39), mode="bilinear", align_corners=True)
    for window in (Window(0, 0, 27, 39), Window(5, 20, 8, 19), Window(26, 0, 1, 39)):
        assert (enlarged(pictures, (27, 39), window) - whole[window.area]).abs().max() < 1e-5
    assert torch.equal(enlarged(pictures, (9, 13), Window(2, 3, 4, 5)), pictures[..., 2:6, 3:8])
