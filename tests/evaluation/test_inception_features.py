"""The preparation of pictures by each program, and the reading of weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from ldm_cli.core.models.inception import InceptionV3
from ldm_cli.errors import CheckpointError, DivergedError
from ldm_cli.evaluation.config import PREPROCESSINGS, Preprocessing
from ldm_cli.evaluation.inception_features import InceptionFeatures, inception_tensors, prepared
from tests.evaluation.inception_weights import inception_weights, uniform


def noise(height: int, width: int) -> Tensor:
    return ((uniform("noise", 3 * height * width) + 1) * 128).to(torch.uint8).view(1, 3, height, width)


@pytest.mark.parametrize(
    ("preprocessing", "middle", "span"),
    [("pytorch-fid", 127.5, 127.5), ("clean", 128, 128), ("torch-fidelity", 128, 128)],
)
def test_pictures_of_the_right_size_are_only_scaled(preprocessing: Preprocessing, middle: float, span: float) -> None:
    images = noise(299, 299)
    assert torch.allclose(prepared(images, preprocessing), (images.float() - middle) / span, atol=1e-6)


def ramp(width: int) -> Tensor:
    return torch.arange(width, dtype=torch.uint8).expand(1, 3, 7, width)


def test_pytorch_fid_places_pixels_by_their_centres() -> None:
    x = ((torch.arange(299) + 0.5) * 100 / 299 - 0.5).clamp(0, 99)
    assert torch.allclose(prepared(ramp(100), "pytorch-fid")[0, 0, 5], x / 127.5 - 1, atol=1e-5)


def test_torch_fidelity_places_pixels_by_their_corners() -> None:
    x = (torch.arange(299) * 100 / 299).clamp(max=99)
    expected = (x - 128) / 128
    assert torch.allclose(prepared(ramp(100), "torch-fidelity")[0, 0, 5], expected, atol=1e-5)
    assert torch.allclose(prepared(ramp(100).mT, "torch-fidelity")[0, 0, :, 5], expected, atol=1e-5)


@pytest.mark.parametrize("size", [(40, 64), (512, 700)])
def test_clean_resizes_each_channel_as_pillow_does_in_float(size: tuple[int, int]) -> None:
    images = noise(*size)
    for channel, found in zip(images[0], prepared(images, "clean")[0], strict=True):
        whole = Image.frombytes("L", size[::-1], bytes(channel.flatten().tolist())).convert("F")
        expected = torch.tensor(list(whole.resize((299, 299), Image.Resampling.BICUBIC).get_flattened_data()))
        assert torch.allclose(found, (expected.view(299, 299).clamp(0, 255) - 128) / 128, atol=1e-6)


class Means(InceptionV3):
    """Takes the mean of each channel for features."""

    def forward(self, pixels: Tensor, taps: object = None) -> dict:  # type: ignore[type-arg]
        return {"2048": pixels.mean((2, 3))}


def test_pictures_of_several_sizes_keep_their_order() -> None:
    network = InceptionFeatures(Means(), torch.device("cpu"), "torch-fidelity")
    sizes = ((8, 9), (8, 9), (30, 8), (8, 9))
    pictures = [torch.full((3, *size), 128 + 10 * i, dtype=torch.uint8) for i, size in enumerate(sizes)]
    assert torch.allclose(network(pictures)["2048"][:, 0], torch.arange(4) * 10 / 128)


def test_features_that_are_not_finite_are_refused() -> None:
    network = InceptionFeatures(Means(), torch.device("cpu"), "clean")
    network._model.forward = lambda pixels, taps: {"2048": torch.full((1, 3), torch.nan)}  # type: ignore
    with pytest.raises(DivergedError, match="not finite"):
        network(noise(8, 8))


def test_published_weights_are_read_with_and_without_counts(tmp_path: Path) -> None:
    weights = inception_weights()
    counts = {
        name.replace("running_mean", "num_batches_tracked"): torch.tensor(0) for name in weights if "mean" in name
    }
    for tensors in (weights, weights | counts):
        save_file(tensors, tmp_path / "inception.safetensors")
        network = InceptionFeatures.load(tmp_path / "inception.safetensors", torch.device("cpu"), "clean")
        assert network.provenance["file"] == "inception.safetensors"
        assert torch.equal(network._model.state_dict()["fc.weight"], weights["fc.weight"])
    assert inception_tensors(weights | counts, tmp_path).keys() == weights.keys()


def test_other_weights_are_refused_with_the_way_to_the_right_ones(tmp_path: Path) -> None:
    torch.save({"x": torch.zeros(1)}, tmp_path / "pt_inception.pth")
    with pytest.raises(CheckpointError, match=r"it is a pickle.*ldm convert .* --allow-pickle"):
        InceptionFeatures.load(tmp_path / "pt_inception.pth", torch.device("cpu"), PREPROCESSINGS[0])
    with pytest.raises(CheckpointError, match=r"missing: Conv2d_1a_3x3\.conv\.weight"):
        inception_tensors({"x": torch.zeros(1)}, tmp_path)
