"""Image prompt adapters: the sizes and names of the published files, and where they are added."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ldm_cli.core.condition import Condition
from ldm_cli.core.image_prompt import ImagePrompts
from ldm_cli.core.models.ip_adapter import ImageProjection, IPAdapter, Resampler, cross_attentions
from ldm_cli.core.models.unet_2d_condition import UNet2DConditionModel
from ldm_cli.core.models.unet_2d_condition_config import UNet2DConditionConfig
from ldm_cli.formats.model_folder import without_weights
from ldm_cli.recipe.load import load_recipe
from tests.sampling.tiny import UNET, randomize

PUBLISHED = {  # bytes of all tensors in half precision, and the last number
    ("unet/sd15", "base"): (44_639_232, 31),
    ("unet/sd15", "plus"): (98_174_976, 31),
    ("unet/sdxl", "base"): (702_570_496, 139),
}


@pytest.mark.parametrize(("name", "kind"), PUBLISHED)
def test_adapters_have_the_sizes_of_the_published_files(name: str, kind: str) -> None:
    config: Any = load_recipe(name).recipe
    with without_weights():
        layers = cross_attentions(UNet2DConditionModel(config.unet))
        dim = config.unet.cross_attention_dim
        image_dim = 1024 if (name, kind) == ("unet/sd15", "base") else 1280
        projection = ImageProjection(image_dim, dim, 4) if kind == "base" else Resampler(image_dim, dim, 16, 768, 12)
        adapter = IPAdapter(projection, layers)
    num_bytes, last = PUBLISHED[name, kind]
    assert sum(2 * parameter.numel() for parameter in adapter.parameters()) == num_bytes
    assert list(layers) == list(range(1, last + 1, 2))
    assert adapter.state_dict()[f"ip_adapter.{last}.to_k_ip.weight"].shape == (1280, dim)


def tiny() -> tuple[UNet2DConditionModel, IPAdapter]:
    unet = randomize(UNet2DConditionModel(UNet2DConditionConfig(**UNET)), 1)
    return unet, randomize(IPAdapter(ImageProjection(6, 24, 4), cross_attentions(unet)), 2)


def test_tokens_of_the_text_as_those_of_a_picture_count_twice() -> None:
    """With the keys and values of the text, attention to the same tokens doubles what goes into each projection."""
    unet, adapter = tiny()
    adapter.begin_as_text(cross_attentions(unet))
    tokens = torch.randn(1, 4, 24, generator=torch.Generator().manual_seed(0))
    x, t = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([300.0])
    doubled = UNet2DConditionModel(UNet2DConditionConfig(**UNET))
    doubled.load_state_dict(unet.state_dict())
    with torch.inference_mode():
        for layer in cross_attentions(doubled).values():
            layer.to_v.weight.mul_(2)
        ImagePrompts(unet, [(adapter, 1.0)])
        found = unet(x, t, Condition(tokens=tokens, image_tokens=tokens))
        expected = doubled(x, t, Condition(tokens=tokens))
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_the_state_dict_of_a_unet_stays_as_it_is() -> None:
    unet, adapter = tiny()
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    ImagePrompts(unet, [(adapter, 1.0)])
    after = unet.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_unet_without_an_adapter_refuses_image_tokens() -> None:
    unet, _ = tiny()
    tokens = torch.zeros(1, 4, 24)
    with pytest.raises(ValueError, match="no image adapter"):
        unet(torch.zeros(1, 4, 8, 8), torch.tensor([1.0]), Condition(tokens=tokens, image_tokens=tokens))
