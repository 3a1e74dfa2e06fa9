"""The scene detector against ground truth, on clean and on damaged pictures, and the scores made of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm_cli.data.scene_drawing import paint
from ldm_cli.data.scene_vocabulary import BACKGROUNDS, COLORS, NEW_COLORS
from ldm_cli.data.scenes import Split, scene
from ldm_cli.evaluation.attribute_accuracy import RATES, score_scenes
from ldm_cli.evaluation.scene_detector import SeenObject, read_scenes, relation


def attribute_accuracy(images: Tensor, truths: list[dict[str, Any]], stated_only: bool = False) -> dict[str, Any]:
    return score_scenes(read_scenes(images), truths, stated_only)


def drawn(seed: int, count: int, split: Split, size: int) -> tuple[Tensor, list[dict[str, Any]]]:
    scenes = [scene(seed, index, split, size) for index in range(count)]
    return torch.stack([pixels(one.image) for one in scenes]), [one.truth for one in scenes]


def pixels(image: Any) -> Tensor:
    flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return flat.view(image.height, image.width, 3).permute(2, 0, 1)


def blurred(images: Tensor, sigma: float) -> Tensor:
    axis = torch.arange(-6, 7).float()
    kernel = torch.exp(-axis.square() / (2 * sigma**2))
    kernel = (kernel[:, None] * kernel / kernel.sum() ** 2).expand(3, 1, -1, -1)
    return F.conv2d(F.pad(images, (6, 6, 6, 6), mode="replicate"), kernel, groups=3)


def damaged(images: Tensor, sigma: float, noise: float) -> Tensor:
    """Blurred, over-sharpened by a third (which rings, as decoders do), and noisy."""
    soft = blurred(images.float(), sigma)
    ringing = soft + (soft - blurred(soft, 2 * sigma)) / 3
    random = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return (ringing + noise * random).clamp(0, 255).round().to(torch.uint8)


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("size", [32, 64])
def test_every_attribute_of_real_scenes_is_read_right_99_times_of_100(split: Split, size: int) -> None:
    images, truths = drawn(seed=20_240_817, count=250, split=split, size=size)
    rates = attribute_accuracy(images, truths)["all"]
    assert {name: rate for name in RATES if (rate := rates[name]) is None or rate < 0.99} == {}


@pytest.mark.parametrize(("sigma", "noise"), [(0.7, 11.0), (0.9, 8.0), (0.4, 16.0)])
@pytest.mark.parametrize("size", [32, 64])
def test_shape_and_colour_survive_the_damage_of_a_decoder(sigma: float, noise: float, size: int) -> None:
    images, truths = drawn(seed=31_337, count=150, split="val", size=size)
    worse = damaged(images, sigma * size / 32, noise)
    error = (worse.float() - images.float()).square().mean()
    assert 10 * torch.log10(255**2 / error) < 28  # dB: no better than the pictures that will be judged
    rates = attribute_accuracy(worse, truths)["all"]
    assert {name: rates[name] for name in ("shape", "color", "background", "size", "place") if rates[name] < 0.97} == {}


@pytest.mark.parametrize("size", [33, 50, 128, 200])
def test_any_size_from_32_up_is_read(size: int) -> None:
    images, truths = drawn(seed=8, count=40, split="val", size=size)
    rates = attribute_accuracy(images, truths)["all"]
    assert (rates["shape"], rates["color"], rates["num_objects"]) == (1, 1, 1)


def test_centre_and_radius_are_measured_within_half_a_pixel() -> None:
    images, truths = drawn(seed=8, count=60, split="train", size=32)
    for truth, seen in zip(truths, read_scenes(images), strict=True):
        if truth["num_objects"] == 1:
            expected = truth["objects"][0]
            found = [*seen.objects[0].center, seen.objects[0].radius]
            assert found == pytest.approx([*expected["center"], expected["radius"]], abs=0.5 / 32)


def test_an_empty_picture_holds_nothing() -> None:
    for name, color in BACKGROUNDS.items():
        (seen,) = read_scenes(torch.tensor(color, dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 32, 32))
        assert (seen.background, seen.num_objects, seen.objects) == (name, 0, ())
    assert read_scenes(torch.zeros(0, 3, 32, 32, dtype=torch.uint8)) == []


def test_a_new_colour_is_read_only_if_the_palette_has_it() -> None:
    maroon = pixels(scene(1, 0, "val", 32, two_object_fraction=0.0, only="color=maroon").image)[None]
    assert read_scenes(maroon)[0].objects[0].color == "red"
    assert read_scenes(maroon, COLORS | NEW_COLORS)[0].objects[0].color == "maroon"


def test_three_objects_are_counted_as_three() -> None:
    from PIL import Image

    image = Image.new("RGB", (64, 64), "white")
    for center in ((0.2, 0.2), (0.7, 0.3), (0.4, 0.8)):
        paint(image, "circle", COLORS["red"], center, 0.15)
    (seen,) = read_scenes(pixels(image)[None])
    assert seen.num_objects == 3
    assert len(seen.objects) == 2


def test_reading_does_not_depend_on_the_batch() -> None:
    images, _ = drawn(seed=4, count=9, split="val", size=32)
    together, alone = read_scenes(images), [read_scenes(image[None])[0] for image in images]
    assert [(s.background, s.num_objects) for s in together] == [(s.background, s.num_objects) for s in alone]
    for one, other in zip(together, alone, strict=True):
        for a, b in zip(one.objects, other.objects, strict=True):
            assert (a.shape, a.color, a.size, a.place) == (b.shape, b.color, b.size, b.place)
            assert (*a.center, a.radius) == pytest.approx((*b.center, b.radius), abs=1e-5)


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(1, 3, 31, 31, dtype=torch.uint8),
        torch.zeros(1, 3, 32, 48, dtype=torch.uint8),
        torch.zeros(3, 32, 32, dtype=torch.uint8),
        torch.zeros(1, 3, 32, 32),
    ],
)
def test_other_tensors_are_refused(images: Tensor) -> None:
    with pytest.raises(ValueError, match="read_scenes"):
        read_scenes(images)


def test_relation_follows_the_longer_axis() -> None:
    def at(x: float, y: float) -> SeenObject:
        return SeenObject("circle", "red", "small", "center", (x, y), 0.1)

    assert relation(at(0.2, 0.5), at(0.8, 0.6)) == "left of"
    assert relation(at(0.8, 0.5), at(0.2, 0.6)) == "right of"
    assert relation(at(0.5, 0.2), at(0.6, 0.8)) == "above"
    assert relation(at(0.5, 0.8), at(0.6, 0.2)) == "below"


def scored(images: Tensor, truths: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    return attribute_accuracy(images, truths, **changes)["all"]


def single(split: Split = "train") -> tuple[Tensor, list[dict[str, Any]]]:
    images, truths = drawn(seed=2, count=30, split=split, size=32)
    keep = [i for i, truth in enumerate(truths) if truth["num_objects"] == 1]
    return images[keep], [truths[i] for i in keep]


def test_a_wrong_attribute_lowers_its_own_score_and_no_other() -> None:
    images, truths = single()
    for name in ("shape", "color", "size", "place"):
        lies = [truth | {"objects": [truth["objects"][0] | {name: "nonsense"}]} for truth in truths]
        rates = scored(images, lies)
        wrong = {key for key in RATES if rates[key] == 0}
        assert wrong == ({name, "shape_and_color"} if name in ("shape", "color") else {name})


def test_only_stated_attributes_are_scored_when_asked() -> None:
    images, truths = single()
    terse = [truth | {"stated": ["shape", "color"], "background": "nonsense"} for truth in truths]
    rates = scored(images, terse, stated_only=True)
    assert (rates["shape"], rates["color"], rates["shape_and_color"]) == (1, 1, 1)
    assert (rates["size"], rates["place"], rates["background"], rates["relation"]) == (None, None, None, None)
    assert scored(images, terse)["background"] == 0


def test_swapped_objects_break_the_relation_and_nothing_else() -> None:
    images, truths = drawn(seed=2, count=60, split="val", size=32)
    keep = [i for i, truth in enumerate(truths) if truth["num_objects"] == 2]
    assert keep
    swapped = [truths[i] | {"objects": truths[i]["objects"][::-1]} for i in keep]
    rates = scored(images[keep], swapped)
    assert (rates["relation"], rates["pair_shape_and_color"], rates["shape"]) == (0, 1, 1)
    assert scored(images[keep], [truths[i] for i in keep])["relation"] == 1


def test_a_relation_between_wrong_objects_is_not_right() -> None:
    images, truths = drawn(seed=2, count=60, split="val", size=32)
    keep = [i for i, truth in enumerate(truths) if truth["num_objects"] == 2]
    lies = [truths[i] | {"objects": [thing | {"color": "nonsense"} for thing in truths[i]["objects"]]} for i in keep]
    assert scored(images[keep], lies)["relation"] == 0


def test_a_missing_object_is_wrong_in_everything() -> None:
    _, truths = drawn(seed=2, count=10, split="val", size=32)
    rates = scored(torch.full((10, 3, 32, 32), 255, dtype=torch.uint8), truths)
    assert (rates["shape"], rates["color"], rates["size"], rates["place"], rates["num_objects"]) == (0, 0, 0, 0, 0)


def test_held_out_scenes_are_scored_apart() -> None:
    images, truths = drawn(seed=2, count=24, split="val", size=32)
    images[7::8] = 255
    groups = attribute_accuracy(images, truths)
    assert (groups["seen"]["shape"], groups["held_out"]["shape"]) == (1, 0)
    assert [groups[name]["num_images"] for name in ("all", "seen", "held_out")] == [24, 21, 3]


def test_counts_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match="2 images, but 1 truths"):
        attribute_accuracy(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), [{}])
