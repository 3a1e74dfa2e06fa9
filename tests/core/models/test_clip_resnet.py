from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F

from ldm_cli.core.models.clip import CLIPModel
from ldm_cli.core.models.clip_config import CLIPConfig, ModifiedResNetConfig
from ldm_cli.core.models.clip_resnet import AttentionPool2d, Bottleneck, ModifiedResNet

from .weights import num_parameters, randomise

SMALL = ModifiedResNetConfig(layers=(1, 2, 1, 1), width=8, heads=4, image_size=64)


def small() -> ModifiedResNet:
    model = ModifiedResNet(SMALL, output_dim=16)
    randomise(model)
    return model


def test_rn50_has_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        model = CLIPModel(CLIPConfig(vision_config=ModifiedResNetConfig(), projection_dim=1024))
    assert num_parameters(model.vision_model) == 38_316_896
    assert num_parameters(model) == 102_007_137


def test_parameter_names_are_those_of_openai() -> None:
    names = small().state_dict().keys()
    for name in (
        "conv1.weight",
        "bn3.running_var",
        "layer1.0.downsample.0.weight",
        "layer1.0.downsample.1.num_batches_tracked",
        "layer2.1.conv3.weight",
        "attnpool.positional_embedding",
        "attnpool.c_proj.bias",
    ):
        assert name in names


def test_stages_halve_the_size_and_double_the_channels() -> None:
    output = small().eval()(torch.randn(2, 3, 64, 64), output_hidden_states=True)
    assert output.pooled.shape == (2, 16)
    sizes = [tuple(state.shape[1:]) for state in output.hidden_states]
    assert sizes == [(8, 16, 16), (32, 16, 16), (64, 8, 8), (128, 4, 4), (256, 2, 2)]


def test_the_attention_pool_equals_pytorchs_multi_head_attention() -> None:
    pool = AttentionPool2d(num_pixels=6, dim=16, num_heads=4, output_dim=10)
    x = torch.randn(2, 16, 2, 3)
    tokens = x.flatten(2).permute(2, 0, 1)
    tokens = torch.cat((tokens.mean(dim=0, keepdim=True), tokens)) + pool.positional_embedding[:, None]
    expected, _ = F.multi_head_attention_forward(
        query=tokens[:1],
        key=tokens,
        value=tokens,
        embed_dim_to_check=16,
        num_heads=4,
        in_proj_weight=None,
        in_proj_bias=torch.cat((pool.q_proj.bias, pool.k_proj.bias, pool.v_proj.bias)),
        bias_k=None,
        bias_v=None,
        add_zero_attn=False,
        dropout_p=0.0,
        out_proj_weight=pool.c_proj.weight,
        out_proj_bias=pool.c_proj.bias,
        use_separate_proj_weight=True,
        q_proj_weight=pool.q_proj.weight,
        k_proj_weight=pool.k_proj.weight,
        v_proj_weight=pool.v_proj.weight,
    )
    torch.testing.assert_close(pool(x), expected[0])


def mean_of_squares(x: torch.Tensor) -> torch.Tensor:
    """Average of each 2×2 pixels."""
    return x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).mean(dim=(3, 5))


@torch.no_grad()
def test_the_tower_is_the_published_sequence_of_layers() -> None:
    model = small().eval()
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.uniform_(-0.2, 0.2)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
    w = model.state_dict()

    def layer(x: torch.Tensor, conv: str, norm: str, **kwargs: int) -> torch.Tensor:
        x = F.conv2d(x, w[f"{conv}.weight"], **kwargs)
        mean, var, gain, bias = (w[f"{norm}.{n}"] for n in ("running_mean", "running_var", "weight", "bias"))
        view = (-1, 1, 1)
        return (x - mean.view(view)) / (var.view(view) + 1e-5).sqrt() * gain.view(view) + bias.view(view)

    def block(x: torch.Tensor, name: str, halve: bool) -> torch.Tensor:
        hidden = layer(x, f"{name}.conv1", f"{name}.bn1").relu()
        hidden = layer(hidden, f"{name}.conv2", f"{name}.bn2", padding=1).relu()
        if halve:
            hidden, x = mean_of_squares(hidden), mean_of_squares(x)
        if f"{name}.downsample.0.weight" in w:
            x = layer(x, f"{name}.downsample.0", f"{name}.downsample.1")
        return (layer(hidden, f"{name}.conv3", f"{name}.bn3") + x).relu()

    images = torch.randn(2, 3, 64, 64)
    x = layer(images, "conv1", "bn1", stride=2, padding=1).relu()
    x = layer(x, "conv2", "bn2", padding=1).relu()
    expected = [mean_of_squares(layer(x, "conv3", "bn3", padding=1).relu())]
    for stage, num_blocks in enumerate(SMALL.layers, start=1):
        x = expected[-1]
        for i in range(num_blocks):
            x = block(x, f"layer{stage}.{i}", halve=stage > 1 and i == 0)
        expected.append(x)
    actual = model(images, output_hidden_states=True)
    for mine, other in zip(actual.hidden_states, expected, strict=True):
        torch.testing.assert_close(mine, other, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(actual.pooled, model.attnpool(x), atol=2e-5, rtol=1e-5)


def test_a_new_block_is_its_shortcut() -> None:
    block = ModifiedResNet(SMALL, output_dim=16).layer2[1]
    assert isinstance(block, Bottleneck)
    x = torch.randn(2, 64, 4, 4).relu()
    assert torch.equal(block(x), x)


def test_gradient_checkpointing_leaves_gradients_and_running_statistics_as_they_are() -> None:
    plain = small()
    checkpointed = copy.deepcopy(plain)
    checkpointed.gradient_checkpointing = True
    images = torch.randn(4, 3, 64, 64)
    for model in (plain, checkpointed):
        loss = model(images).pooled.square().mean()
        # Twice, as adaptive loss weights need it: the first pass must leave the second one intact.
        loss.backward(retain_graph=True)
        loss.backward()
    for (name, expected), actual in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        assert torch.equal(actual.grad, expected.grad), name
    for (name, expected), actual in zip(plain.named_buffers(), checkpointed.buffers(), strict=True):
        assert torch.equal(actual, expected), name


@torch.no_grad()
def test_in_evaluation_samples_do_not_see_one_another() -> None:
    model = small().eval()
    images = torch.randn(2, 3, 64, 64)
    together = model(images).pooled
    torch.testing.assert_close(model(images[1:]).pooled, together[1:], atol=1e-5, rtol=0)


def test_a_wrong_image_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"image of \(32, 32\) px, expected image_size=64"):
        small()(torch.zeros(1, 3, 32, 32))
