"""Pictures under every sampler and every guidance: what reduces to what, and that company changes nothing."""

from typing import get_args

import pytest
import torch

from ldm_cli.core.models.clip import CLIPModel
from ldm_cli.core.models.clip_config import CLIPConfig
from ldm_cli.formats.save_model import save_model
from ldm_cli.formats.weight_files import TRANSFORMERS_WEIGHTS
from ldm_cli.sampling.config import SamplerName, SamplingConfig
from ldm_cli.sampling.guidance_models import GuidanceModels, guidance_folders
from ldm_cli.sampling.request import ImageRequest
from tests.sampling.test_guidance_models import VISION
from tests.sampling.tiny import TEXT, loaded_pipeline, randomize, special_ids, tiny_pipeline, tiny_tokenizer

REQUESTS = [ImageRequest(prompt, seed) for prompt in ("a red circle", "a blue square") for seed in (0, 7)]
GUIDANCE = {
    "all at once": {
        "scale": 4.0,
        "rescale": 0.7,
        "interval": [0.5, 10.0],
        "threshold": {"limit": 3.0},
        "perturb": {"layers": ["down_blocks"]},
    },
    "projected": {"scale": 4.0, "apg": {}},
    "layer left out": {"scale": 1.0, "perturb": {"kind": "layer", "layers": ["up_blocks.1"]}},
    "weaker model": {"scale": 2.0, "model": "weaker"},
    "clip": {"scale": 3.0, "clip": {"model": "clip", "scale": 20.0}},
    "clip alone": {"scale": 0.0, "clip": {"model": "clip", "scale": 20.0}},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    tiny_pipeline().family.save(folder / "model")
    weaker = tiny_pipeline()
    randomize(weaker.family.denoiser, 40)
    weaker.family.save(folder / "weaker")
    tokenizer = tiny_tokenizer()
    text = {**TEXT, **special_ids(tokenizer), "max_position_embeddings": 40}
    config = CLIPConfig.from_hugging_face({"text_config": text, "vision_config": VISION, "projection_dim": 16})
    save_model(
        folder / "clip", randomize(CLIPModel(config), 9).state_dict(), config.to_hugging_face(), TRANSFORMERS_WEIGHTS
    )
    tokenizer.save(folder / "clip")
    return folder


@pytest.fixture(scope="module")
def pipeline(folder):
    return loaded_pipeline(folder / "model")


def pictures(pipeline, requests=REQUESTS, **fields):
    config = SamplingConfig.from_mapping({"steps": 3, "images_per_prompt": 1} | fields)
    return torch.stack([image.pixels for image in pipeline.generate(requests, config)])


@pytest.mark.parametrize("sampler", get_args(SamplerName))
def test_picture_is_the_same_bit_for_bit_in_any_company_under_every_sampler(pipeline, sampler):
    together = pictures(pipeline, sampler=sampler, guidance=2.0)
    assert len({tuple(p.flatten().tolist()) for p in together}) == len(REQUESTS)
    for chosen in ([2], [3, 0, 1]):
        part = pictures(pipeline, [REQUESTS[i] for i in chosen], sampler=sampler, guidance=2.0)
        assert torch.equal(part, together[chosen])


@pytest.mark.parametrize("name", GUIDANCE)
def test_picture_is_the_same_bit_for_bit_in_any_company_under_every_guidance(pipeline, folder, monkeypatch, name):
    monkeypatch.chdir(folder)
    together = pictures(pipeline, guidance=GUIDANCE[name])
    for chosen in ([2], [3, 0, 1]):
        assert torch.equal(pictures(pipeline, [REQUESTS[i] for i in chosen], guidance=GUIDANCE[name]), together[chosen])
    changed = {k: v for k, v in GUIDANCE[name].items() if k == "scale"}
    assert not torch.equal(pictures(pipeline, guidance=changed), together)


def test_scale_one_forgets_the_negative_prompt_and_scale_zero_the_prompt(pipeline):
    conditional = pictures(pipeline, guidance=1.0)
    assert torch.equal(pictures(pipeline, guidance=1.0, negative="green"), conditional)
    unconditional = pictures(pipeline, guidance=0.0)
    empty = [ImageRequest("", request.seed) for request in REQUESTS]
    assert torch.equal(pictures(pipeline, empty, guidance=1.0), unconditional)
    assert not torch.equal(unconditional, conditional)


def test_settings_that_change_nothing_give_the_plain_pictures(pipeline):
    plain = pictures(pipeline, guidance=3.0)
    for neutral in (
        {"rescale": 0.0},
        {"interval": [0.0, 1e9]},
        {"perturb": {"scale": 0.0, "layers": ["down_blocks"]}},
        {"threshold": {"percentile": 1.0, "limit": 1e4}},
    ):
        assert torch.equal(pictures(pipeline, guidance={"scale": 3.0, **neutral}), plain)


def test_clip_guidance_raises_the_clip_score_of_the_unconditional_model(pipeline, folder, monkeypatch):
    monkeypatch.chdir(folder)
    config = SamplingConfig.from_mapping({"guidance": GUIDANCE["clip alone"]}).guidance
    clip = GuidanceModels.load(guidance_folders(config, pipeline.family), pipeline.family).clip
    score = clip.of([r.prompt for r in REQUESTS], lambda images: images.float() / 127.5 - 1)
    before = score(pictures(pipeline, steps=8, guidance=0.0))
    after = score(pictures(pipeline, steps=8, guidance=GUIDANCE["clip alone"]))
    assert after.mean() > before.mean() + 0.02
