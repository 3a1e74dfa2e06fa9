from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from ldm_cli.core.condition import Condition
from ldm_cli.core.diffusion.config import CLIPGuidanceConfig, GuidanceConfig, PerturbationConfig
from ldm_cli.core.models.attention import BasicTransformerBlock
from ldm_cli.core.models.clip import CLIPModel
from ldm_cli.core.models.clip_config import CLIPConfig
from ldm_cli.core.models.unet_2d_condition import UNet2DConditionModel
from ldm_cli.core.models.unet_2d_condition_config import UNet2DConditionConfig
from ldm_cli.errors import CheckpointError, UsageError
from ldm_cli.formats.save_model import save_model
from ldm_cli.formats.weight_files import TRANSFORMERS_WEIGHTS
from ldm_cli.sampling.config import SamplingConfig
from ldm_cli.sampling.guidance_models import GuidanceModels, guidance_folders, perturbed_layers
from ldm_cli.sampling.request import ImageRequest
from tests.sampling.tiny import TEXT, UNET, randomize, special_ids, tiny_pipeline, tiny_tokenizer

VISION = {
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}


@pytest.fixture(scope="module")
def pipeline():
    return tiny_pipeline()


def tiny_clip_folder(folder):
    tokenizer = tiny_tokenizer()
    text = {**TEXT, **special_ids(tokenizer), "max_position_embeddings": 40}
    config = CLIPConfig.from_hugging_face({"text_config": text, "vision_config": VISION, "projection_dim": 16})
    clip = randomize(CLIPModel(config), 9)
    save_model(folder, clip.state_dict(), config.to_hugging_face(), TRANSFORMERS_WEIGHTS)
    tokenizer.save(folder)
    return folder


def inputs():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(2, 5, 24, generator=generator)
    return torch.randn(2, 4, 8, 8, generator=generator), torch.full((2,), 500.0), Condition(tokens=tokens)


def test_a_block_attends_to_itself_alone_only_within(pipeline):
    x, t, context = inputs()
    block = next(m for m in pipeline.family.denoiser.modules() if isinstance(m, BasicTransformerBlock))
    name = next(n for n, m in pipeline.family.denoiser.named_modules() if m is block)
    with torch.inference_mode():
        before = pipeline.family.denoiser(x, t, context)
        tokens = torch.randn(1, 6, block.norm1.normalized_shape[0])
        with perturbed_layers(pipeline.family.denoiser, PerturbationConfig(layers=(name,))):
            perturbed = block.attn1(tokens)
            alone = torch.cat([block.attn1(tokens[:, i : i + 1]) for i in range(6)], dim=1)
            whole = pipeline.family.denoiser(x, t, context)
        # A token that sees only itself gives what it gives alone, where the map of attention is 1.
        torch.testing.assert_close(perturbed, torch.cat([block.attn1(tokens[:, i : i + 1]) for i in range(6)], dim=1))
        torch.testing.assert_close(perturbed, alone)
        assert not torch.allclose(perturbed, block.attn1(tokens))
        assert not torch.allclose(whole, before)
        assert torch.equal(pipeline.family.denoiser(x, t, context), before)


def test_a_layer_that_is_left_out_passes_its_input_on(pipeline):
    block = next(m for m in pipeline.family.denoiser.modules() if isinstance(m, BasicTransformerBlock))
    name = next(n for n, m in pipeline.family.denoiser.named_modules() if m is block)
    tokens, context = torch.randn(1, 6, block.norm1.normalized_shape[0]), torch.randn(1, 5, 24)
    with (
        torch.inference_mode(),
        perturbed_layers(pipeline.family.denoiser, PerturbationConfig(kind="layer", layers=(name,))),
    ):
        assert torch.equal(block(tokens, context), tokens)
    assert not torch.equal(block(tokens, context), tokens)


def test_layers_are_named_by_whole_beginnings_and_a_name_of_none_is_refused(pipeline):
    with (
        pytest.raises(UsageError, match=r"down_blocks\.0\.attentions\.0"),
        perturbed_layers(pipeline.family.denoiser, PerturbationConfig(layers=("down_block",))),
    ):
        pass
    with perturbed_layers(pipeline.family.denoiser, PerturbationConfig(layers=("down_blocks",))):
        pass


def load_for(config, family):
    return GuidanceModels.load(guidance_folders(config, family), family)


def test_a_weaker_network_is_read_from_a_pipeline_folder_and_must_fit(pipeline, tmp_path):
    pipeline.family.save(tmp_path / "good")
    models = load_for(GuidanceConfig(model=str(tmp_path / "good")), pipeline.family)
    assert models.weaker is not None
    assert torch.equal(models.weaker.conv_in.weight, pipeline.family.denoiser.conv_in.weight)
    assert models.clip is None
    wider = UNet2DConditionModel(UNet2DConditionConfig(**(UNET | {"cross_attention_dim": 32})))
    with pytest.raises(CheckpointError, match=r"its cross_attention_dim is 24, the guided model's 32"):
        load_for(GuidanceConfig(model=str(tmp_path / "good" / "unet")), replace(pipeline.family, denoiser=wider))


def test_the_denoiser_of_another_family_is_found_in_its_own_subfolder(pipeline, tmp_path):
    pipeline.family.save(tmp_path)
    (tmp_path / "unet").rename(tmp_path / "transformer")
    family = SimpleNamespace(components=("transformer", "vae"))
    assert guidance_folders(GuidanceConfig(model=str(tmp_path)), family) == {"model": tmp_path / "transformer"}


def test_networks_of_the_guidance_are_loaded_once(pipeline, tmp_path, monkeypatch):
    load = mock.Mock(side_effect=GuidanceModels.load)
    monkeypatch.setattr(GuidanceModels, "load", load)
    for name in ("a", "b"):
        pipeline.family.save(tmp_path / name)
    for name in ("a", "b", "a"):
        config = SamplingConfig(steps=1, guidance=GuidanceConfig(scale=2.0, model=str(tmp_path / name)))
        assert len(list(pipeline.generate([ImageRequest("a red circle", 0)], config))) == 1
    assert [call.args[0]["model"].parent.name for call in load.call_args_list] == ["a", "b"]


def test_clip_score_is_the_cosine_of_the_embeddings_and_its_gradient_raises_it(pipeline, tmp_path):
    clip = CLIPGuidanceConfig(model=str(tiny_clip_folder(tmp_path)))
    models = load_for(GuidanceConfig(clip=clip), pipeline.family)
    assert models.clip is not None

    score = models.clip.of(["a red circle", "a blue square"], lambda z: torch.tanh(z[:, :3]))
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1), requires_grad=True)
    before = score(latents)
    assert before.shape == (2,)
    assert bool((before.abs() <= 1).all())
    (gradient,) = torch.autograd.grad(before.sum(), latents)
    assert bool((score(latents + 0.5 * gradient / gradient.norm()) > before).all())
    swapped = models.clip.of(["a blue square", "a red circle"], lambda z: torch.tanh(z[:, :3]))(latents)
    assert not torch.allclose(swapped, before)
    off = GuidanceConfig(clip=CLIPGuidanceConfig(model="nowhere", scale=0.0))
    assert load_for(off, pipeline.family) == GuidanceModels()
