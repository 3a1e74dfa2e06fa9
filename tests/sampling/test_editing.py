"""What editing must reduce to: the plain path, the round trip, the picture itself."""

from dataclasses import replace

import pytest
import torch

from ldm_cli.core.models.unet_2d_condition import UNet2DConditionModel
from ldm_cli.core.models.unet_2d_condition_config import UNet2DConditionConfig
from ldm_cli.errors import UsageError
from ldm_cli.sampling.config import SamplingConfig
from ldm_cli.sampling.edit_input import EditInput, latent_mask
from ldm_cli.sampling.pipeline import Pipeline
from ldm_cli.sampling.pixels import decode_pixels, encode_pixels
from ldm_cli.sampling.request import Blend, ImageRequest
from ldm_cli.sampling.sample_options import SampleOptions
from tests.sampling.tiny import UNET, randomize, tiny_pipeline

REQUESTS = [ImageRequest("a red circle", 3), ImageRequest("a blue square", 4)]
SAMPLERS = ("ddim", "euler_ancestral", "dpmpp_2m", "heun", "unipc", "dpmpp_2m_sde")


@pytest.fixture(scope="module")
def pipeline():
    return tiny_pipeline()


def image(seed=0, height=16, width=16):
    coarse = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return (torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")[0] * 255).to(torch.uint8)


def half_mask(height=16, width=16):
    mask = torch.zeros(height, width, dtype=torch.bool)
    mask[:, : width // 2] = True
    return mask


def draw(pipeline, requests=REQUESTS, options=None, **fields):
    config = SamplingConfig(**({"steps": 4, "guidance": 3.0} | fields))
    return [picture.pixels for picture in pipeline.generate(requests, config, options=options or SampleOptions())]


def edited(strength, mask=None, **fields):
    return SampleOptions(edit_input=EditInput(image(), mask, (16, 16), strength, **fields))


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_strength_0_gives_the_picture_as_the_autoencoder_sees_it_and_1_forgets_it(pipeline, sampler):
    codec, device = pipeline.family.codec, pipeline.family.device
    (round_trip,) = decode_pixels(codec, encode_pixels(codec, image(), device))
    assert same(draw(pipeline, options=edited(0.0), sampler=sampler), [round_trip, round_trip])
    plain = draw(pipeline, sampler=sampler)
    assert same(draw(pipeline, options=edited(1.0), sampler=sampler), plain)
    between = draw(pipeline, options=edited(0.5), sampler=sampler)
    assert not same(between, plain)
    assert not torch.equal(between[0], round_trip)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_inpainting_changes_the_mask_and_nothing_else(pipeline, sampler, strength):
    mask = half_mask()
    for pixels in draw(pipeline, options=edited(strength, mask), sampler=sampler):
        assert torch.equal(pixels[:, ~mask], image()[:, ~mask])
        assert not torch.equal(pixels[:, mask], image()[:, mask])


def test_a_mask_of_everything_is_no_mask(pipeline):
    everything = torch.ones(16, 16, dtype=torch.bool)
    assert same(draw(pipeline, options=edited(1.0, everything)), draw(pipeline))
    assert same(draw(pipeline, options=edited(0.5, everything)), draw(pipeline, options=edited(0.5)))


def test_what_is_drawn_in_the_mask_depends_on_what_is_around_it(pipeline):
    mask = half_mask()
    one = draw(pipeline, options=edited(1.0, mask))
    other = draw(pipeline, options=SampleOptions(edit_input=EditInput(image(9), mask, (16, 16), 1.0)))
    assert not torch.equal(one[0][:, mask], other[0][:, mask])


def test_style_of_no_strength_or_of_the_picture_itself_changes_nothing(pipeline):
    plain = draw(pipeline, options=edited(0.5))
    assert same(draw(pipeline, options=edited(0.5, style=image(9), style_strength=0.0)), plain)
    own = draw(pipeline, options=edited(0.5, style=image()))
    assert max(int((a.int() - b.int()).abs().max()) for a, b in zip(own, plain, strict=True)) <= 2
    assert not same(draw(pipeline, options=edited(0.5, style=image(9))), plain)


def test_guidance_1_is_conditional_0_unconditional_and_an_empty_negative_prompt_plain(pipeline):
    empty = [ImageRequest("", request.seed) for request in REQUESTS]
    assert same(draw(pipeline, guidance=0.0), draw(pipeline, empty, guidance=1.0))
    assert same(draw(pipeline, negative=""), draw(pipeline))
    assert not same(draw(pipeline, negative="green"), draw(pipeline))


@pytest.mark.parametrize("guidance", [{"scale": 3.0, "rescale": 0.0}, {"scale": 3.0, "interval": [0.0, 1e9]}])
def test_no_rescaling_and_an_interval_of_everything_are_plain_guidance(pipeline, guidance):
    config = SamplingConfig.from_mapping({"steps": 4, "guidance": guidance})
    pictures = [picture.pixels for picture in pipeline.generate(REQUESTS, config)]
    assert same(pictures, draw(pipeline))


def test_the_ends_of_a_blend_are_the_pictures_it_joins(pipeline):
    a, b = REQUESTS
    ends = [ImageRequest(a.prompt, a.seed, Blend(prompt=b.prompt, seed=b.seed, weight=w)) for w in (0.0, 1.0)]
    for sampler in ("ddim", "euler_ancestral"):
        assert same(draw(pipeline, ends, sampler=sampler), draw(pipeline, sampler=sampler))


def test_a_window_as_large_as_the_picture_changes_nothing_and_smaller_ones_draw_larger_pictures(pipeline):
    assert same(draw(pipeline, options=SampleOptions(window=8)), draw(pipeline))
    large = draw(pipeline, options=SampleOptions(window=8), width=40, height=24)
    assert large[0].shape == (3, 24, 40)
    assert not same(large, draw(pipeline, width=40, height=24))


@pytest.mark.parametrize("window", [None, 8])
def test_edited_and_tiled_pictures_are_the_same_in_any_company(pipeline, window):
    requests = [ImageRequest("a red circle", seed) for seed in range(5)]
    mask = half_mask(16, 24)
    options = SampleOptions(edit_input=EditInput(image(0, 16, 24), mask, (15, 23), 0.7), window=window)
    fields = {"sampler": "euler_ancestral", "width": 24, "height": 16}
    together = draw(pipeline, requests, options, **fields)
    assert together[0].shape == (3, 15, 23)
    alone = [draw(pipeline, [request], options, **fields)[0] for request in reversed(requests)]
    assert same(alone[::-1], together)


def test_a_unet_for_inpainting_is_given_mask_and_masked_latents_and_nothing_else_works(pipeline):
    denoiser = randomize(UNet2DConditionModel(UNet2DConditionConfig(**UNET, in_channels=9)), 4)
    inpainting = Pipeline(replace(pipeline.family, denoiser=denoiser))
    mask = half_mask()
    pixels = draw(inpainting, options=edited(1.0, mask))[0]
    assert torch.equal(pixels[:, ~mask], image()[:, ~mask])
    other = draw(inpainting, options=SampleOptions(edit_input=EditInput(image(9), mask, (16, 16), 1.0)))[0]
    assert not torch.equal(pixels[:, mask], other[:, mask])
    with pytest.raises(UsageError, match="fills masks"):
        draw(inpainting)


def test_windows_of_a_unet_for_inpainting_see_their_own_part_of_the_mask(pipeline):
    denoiser = randomize(UNet2DConditionModel(UNet2DConditionConfig(**UNET, in_channels=9)), 4)
    inpainting = Pipeline(replace(pipeline.family, denoiser=denoiser))
    mask, seen = half_mask(16, 24), []
    denoiser.conv_in.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    options = SampleOptions(edit_input=EditInput(image(0, 16, 24), mask, (16, 24), 1.0), window=8)
    draw(inpainting, options=options, width=24, height=16, steps=1)
    expected = latent_mask(mask, 2)[0, 0]
    found = [part[0, 4] for part in seen]
    assert len({part.shape for part in found}) == 1
    for part, start in zip(found[-2:], (0, 4), strict=True):
        assert torch.equal(part, expected[:, start : start + 8])


def test_previews_show_each_group_on_its_way(pipeline):
    seen = []
    options = SampleOptions(preview_every=2, on_preview=seen.append)
    drawn = draw(pipeline, options=options)
    assert [tuple(preview.shape) for preview in seen] == [(2, 3, 16, 16)] * 2
    assert not torch.equal(seen[0], seen[1])
    assert same(draw(pipeline), drawn), "looking changes nothing"
