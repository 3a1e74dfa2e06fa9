"""Group norms that share their statistics between parts of a picture."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ldm_cli.core.condition import Condition
from ldm_cli.core.models.unet_2d_condition import UNet2DConditionModel
from ldm_cli.core.models.unet_2d_condition_config import UNet2DConditionConfig
from ldm_cli.core.shared_statistics import SharedStatistics
from tests.sampling.tiny import UNET, randomize


def pictures(*shape: int) -> Tensor:
    """Brighter and livelier towards the right, so that parts have unlike statistics."""
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(shape, generator=generator) + 1) * torch.linspace(0.5, 3, shape[-1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_of_parts_is_that_of_the_whole(dtype: torch.dtype) -> None:
    norm = randomize(nn.GroupNorm(2, 6), 1).to(dtype)
    x = pictures(2, 6, 5, 24).to(dtype)
    parts = x[..., :8], x[..., 8:]
    statistics = SharedStatistics([norm])
    for part in parts:
        with statistics.measured():
            torch.testing.assert_close(norm(part), nn.functional.group_norm(part, 2, norm.weight, norm.bias))
    with torch.no_grad():
        found = []
        for part in parts:
            with statistics.shared():
                found.append(norm(part))
    assert found[0].dtype == dtype
    torch.testing.assert_close(torch.cat(found, dim=-1), norm(x))


def test_a_bright_map_with_little_contrast_is_normed_exactly() -> None:
    norm, x = nn.GroupNorm(2, 4), 30 + 0.003 * pictures(1, 4, 8, 16)
    statistics = SharedStatistics([norm])
    with statistics.measured():
        norm(x)
    with statistics.shared():
        found = norm(x)
    torch.testing.assert_close(found, norm.double()(x.double()).float(), atol=2e-2, rtol=0)


def test_a_part_with_the_statistics_of_the_whole_is_a_part_of_the_whole() -> None:
    fields = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    unet = randomize(UNet2DConditionModel(UNet2DConditionConfig(**UNET | fields, mid_block_type="UNetMidBlock2D")), 2)
    x, t, tokens = pictures(1, 4, 16, 160), torch.tensor([300.0]), torch.zeros(1, 3, 24)

    @torch.no_grad()
    def predicted(part: Tensor) -> Tensor:
        result: Tensor = unet(part, t, Condition(tokens))
        return result

    statistics = SharedStatistics([unet])
    with statistics.measured():
        whole = predicted(x)
    with statistics.shared():
        part = predicted(x[..., 32:128])
    inside = slice(36, -36)  # as far as the padding reaches
    torch.testing.assert_close(part[..., inside], whole[..., 32:128][..., inside], atol=1e-4, rtol=1e-4)
    assert (predicted(x[..., 32:128]) - whole[..., 32:128])[..., inside].abs().max() > 0.1


def test_parts_share_the_mean_of_their_percentiles() -> None:
    statistics, parts = SharedStatistics([]), [torch.tensor([[0.0, -1.0], [4.0, 2.0]]), torch.tensor([[3.0], [0.0]])]
    for part in parts:
        with statistics.measured():
            torch.testing.assert_close(statistics.percentile(part, 0.5), part.abs().mean(1))
    with statistics.shared():
        torch.testing.assert_close(statistics.percentile(parts[0], 0.5), torch.tensor([1.75, 1.5]))
