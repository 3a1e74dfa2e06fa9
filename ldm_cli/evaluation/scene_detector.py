"""Read synthetic scenes from their pixels: background, objects with shape, colour, size and place, and their relation.

Nothing is learned. The background is the border's median; objects are connected patches that differ from it; each is
compared with every shape, rendered at the patch's area and centre. Images are first averaged down to 32×32 pixels,
which removes noise and ringing of decoders.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm_cli.data import scene_vocabulary as words
from ldm_cli.data.scene_drawing import coverage

WORKING_SIZE = 32
"""Side in pixels to which images are averaged down."""
_MIN_CONTRAST = 45.0
"""Least distance of an object's pixel from the background (Euclidean, 0–441); the palettes are 100 apart."""
_RELATIVE_CONTRAST = 0.4
"""Least distance as a fraction of the largest one nearby, which excludes the soft edge of an object."""
_MIN_AREA = 14
"""Least pixels of an object's patch; the smallest rendered object has 35."""
_MAX_OBJECTS = 2
"""Number of patches that are read, the largest ones."""

_ATLAS_UNIT = 64
"""Pixels per unit radius in the stored shapes."""
_ATLAS_SIDE = 3 * _ATLAS_UNIT
_FOOTPRINTS = tuple(range(5, 41, 2))
"""Side, in atlas pixels, of the square a picture's pixel averages over: 64 / radius in pixels."""
_SHIFTS = (-0.4, 0.0, 0.4)
"""Corrections of the centre that are tried, in pixels."""
_SCALES = (0.93, 1.0, 1.07)
"""Corrections of the radius that are tried."""
_SOFTNESS = (1.0, 1.8, 2.6)
"""Blurs that are tried: the pixel's own footprint, and those of blurred pictures, as multiples of it."""


@dataclass(frozen=True)
class SeenObject:
    """An object that was read.

    Attributes:
        shape, color, size: names of `scene_vocabulary`.
        place: the nearest place of a lone object's centre.
        center: x and y in image sides.
        radius: in image sides.
    """

    shape: str
    color: str
    size: str
    place: str
    center: tuple[float, float]
    radius: float


@dataclass(frozen=True)
class SeenScene:
    """An image that was read.

    Attributes:
        background: name of the nearest background colour.
        num_objects: number of all patches.
        objects: the largest of them, at most two, largest first.
    """

    background: str
    num_objects: int
    objects: tuple[SeenObject, ...]


def relation(first: SeenObject, second: SeenObject) -> str:
    """The relation of `first` to `second` along the axis on which their centres are farther apart."""
    dx, dy = first.center[0] - second.center[0], first.center[1] - second.center[1]
    if abs(dx) >= abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"


def read_scenes(images: Tensor, palette: dict[str, words.Color] = words.COLORS) -> list[SeenScene]:
    """Read a batch of images.

    Args:
        images: uint8 [N, 3, H, H], H at least 32.
        palette: the colours that an object may have, sRGB by name; each takes the nearest.

    Raises:
        ValueError: if the images have another shape or type.
    """
    if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] != images.shape[3] or images.shape[2] < 32:
        raise ValueError(f"read_scenes: images are {list(images.shape)}, not [N, 3, H, H] with H at least 32")
    if images.dtype != torch.uint8:
        raise ValueError(f"read_scenes: images are {images.dtype}, not torch.uint8")
    if len(images) == 0:
        return []
    pixels = F.interpolate(images.cpu().float(), size=(WORKING_SIZE, WORKING_SIZE), mode="area")
    ground = _border_median(pixels)
    labels = _patches((pixels - ground[:, :, None, None]).square().sum(1).sqrt())
    ground_names = _nearest(ground, words.BACKGROUNDS)
    owners, masks, counts = _largest_patches(labels)
    objects: list[list[SeenObject]] = [[] for _ in range(len(images))]
    if owners:
        owner = torch.tensor(owners)
        for i, found in zip(owners, _read_objects(pixels[owner], ground[owner], masks, palette), strict=True):
            objects[i].append(found)
    return [
        SeenScene(name, count, tuple(seen)) for name, count, seen in zip(ground_names, counts, objects, strict=True)
    ]


def _border_median(pixels: Tensor) -> Tensor:
    """[N, 3]: median of each channel over the outermost pixels of [N, 3, S, S]."""
    edges = (pixels[:, :, 0], pixels[:, :, -1], pixels[:, :, :, 0], pixels[:, :, :, -1])
    return torch.cat(edges, dim=2).median(dim=2).values


def _nearest(colors: Tensor, palette: dict[str, words.Color]) -> list[str]:
    """The name of the palette's nearest colour for each of [N, 3]."""
    names = list(palette)
    distances = torch.cdist(colors, torch.tensor(list(palette.values()), dtype=torch.float32))
    return [names[i] for i in distances.argmin(1).tolist()]


def _patches(contrast: Tensor) -> Tensor:
    """Labels of connected patches (8 neighbours): int64 [N, S, S], 0 where `contrast` [N, S, S] is low."""
    near = F.max_pool2d(contrast[:, None], 9, stride=1, padding=4)[:, 0]
    mask = contrast > (near * _RELATIVE_CONTRAST).clamp(min=_MIN_CONTRAST)
    count, side = contrast.shape[0], contrast.shape[-1]
    start = torch.arange(1, side * side + 1, dtype=torch.float32).view(1, side, side)
    labels = start.expand(count, -1, -1) * mask
    while True:  # spread the highest number of each patch over it
        spread = F.max_pool2d(labels[:, None], 3, stride=1, padding=1)[:, 0] * mask
        if torch.equal(spread, labels):
            return labels.long()
        labels = spread


def _largest_patches(labels: Tensor) -> tuple[list[int], Tensor, list[int]]:
    """The largest patches of each image: index of the image, masks bool [M, S, S]; and each image's number of
    patches."""
    count, side = labels.shape[0], labels.shape[-1]
    areas = torch.zeros(count, side * side + 1).scatter_add_(1, labels.flatten(1), torch.ones(count, side * side))
    areas[:, 0] = 0
    order = areas.argsort(dim=1, descending=True, stable=True)[:, :_MAX_OBJECTS]
    kept = areas.gather(1, order) >= _MIN_AREA
    owners, ranks = kept.nonzero(as_tuple=True)
    masks = labels[owners] == order[owners, ranks][:, None, None]
    return owners.tolist(), masks, (areas >= _MIN_AREA).sum(1).tolist()


def _read_objects(pixels: Tensor, ground: Tensor, masks: Tensor, palette: dict[str, words.Color]) -> list[SeenObject]:
    """Read M objects from images [M, 3, S, S], backgrounds [M, 3] and patches [M, S, S]."""
    offset = pixels - ground[:, :, None, None]
    opacity = _opacity(offset, masks)
    fit = _fit_shapes(opacity)
    weight = fit.template.flatten(1)
    color = torch.einsum("mcp,mp->mc", offset.flatten(2), weight) / weight.square().sum(1, keepdim=True)
    colors = _nearest(ground + color, palette)
    result = []
    for i, (color_name, shape) in enumerate(zip(colors, fit.shape.tolist(), strict=True)):
        x, y, radius = (value / WORKING_SIZE for value in fit.geometry[i, :3].tolist())
        result.append(SeenObject(words.SHAPE_NAMES[shape], color_name, _size(radius), _place(x, y), (x, y), radius))
    return result


def _size(radius: float) -> str:
    """The size class: boundaries lie in the middle of the gaps between classes."""
    return min(words.SIZES, key=lambda name: max(words.SIZES[name][0] - radius, radius - words.SIZES[name][1]))


def _place(x: float, y: float) -> str:
    return min(words.PLACES, key=lambda name: (words.PLACES[name][0] - x) ** 2 + (words.PLACES[name][1] - y) ** 2)


def _opacity(offset: Tensor, masks: Tensor) -> Tensor:
    """The part of each pixel that the object covers: [M, S, S], about 0 to 1.

    A pixel of coverage a has the colour ground + a·(object − ground); so a is its projection on that
    difference, which the patch's strongest pixels show.
    """
    strength = offset.square().sum(1).sqrt() * masks
    strongest = strength.flatten(1).topk(8, dim=1).indices
    full = offset.flatten(2).gather(2, strongest[:, None].expand(-1, 3, -1)).median(dim=2).values
    projected = torch.einsum("mchw,mc->mhw", offset, full) / full.square().sum(1)[:, None, None]
    around = F.max_pool2d(masks[:, None].float(), 3, stride=1, padding=1)[:, 0]
    return projected.clamp(0.0, 1.2) * around


@dataclass(frozen=True)
class _Fit:
    """The best rendering of M objects: shape int64 [M], geometry [M, 4] (x, y, radius in pixels, softness),
    template [M, S, S]."""

    shape: Tensor
    geometry: Tensor
    template: Tensor


def _fit_shapes(opacity: Tensor) -> _Fit:
    """The shape, centre, radius and blur whose rendering is nearest to `opacity` [M, S, S] in the mean square.

    Each shape's area and centroid give its radius and centre directly. Small corrections of radius and blur are tried
    next, and then of the centre.
    """
    _, areas, centroids = _atlas()
    axis = torch.arange(WORKING_SIZE) + 0.5
    total = opacity.sum((1, 2)).clamp(min=1e-3)
    mean = torch.stack(((opacity.sum(1) @ axis) / total, (opacity.sum(2) @ axis) / total), dim=1)
    radius = (total[:, None] / areas).sqrt()  # [M, K] for K shapes
    center = mean[:, None] - centroids * radius[..., None]  # [M, K, 2]
    start = torch.cat((center, radius[..., None], torch.ones_like(radius)[..., None]), dim=2)
    resized = [start * torch.tensor((1.0, 1.0, scale, soft)) for scale in _SCALES for soft in _SOFTNESS]
    fitted, _ = _best_trial(opacity, resized)
    moved = [fitted + torch.tensor((dx, dy, 0.0, 0.0)) for dx in _SHIFTS for dy in _SHIFTS]
    fitted, error = _best_trial(opacity, moved)
    rows, shape = torch.arange(len(opacity)), error.argmin(1)
    return _Fit(shape, fitted[rows, shape], _rendered(fitted)[rows, shape])


def _best_trial(opacity: Tensor, trials: list[Tensor]) -> tuple[Tensor, Tensor]:
    """For each object and shape the trial [M, K, 4] whose rendering is nearest to `opacity`, and its squared error
    [M, K]."""
    best, least = trials[0], torch.full(trials[0].shape[:2], torch.inf)
    for trial in trials:
        error = (_rendered(trial) - opacity[:, None]).square().sum((2, 3))
        best = torch.where((error < least)[..., None], trial, best)
        least = torch.minimum(error, least)
    return best, least


def _rendered(geometry: Tensor) -> Tensor:
    """Render all K shapes: geometry [M, K, 4] (x, y, radius in pixels, softness) to coverage [M, K, S, S]."""
    atlas, num_shapes = _atlas()[0], geometry.shape[1]
    axis = torch.arange(WORKING_SIZE) + 0.5
    x, y, radius, softness = geometry.unbind(2)
    footprint = softness * _ATLAS_UNIT / radius
    level = ((footprint - _FOOTPRINTS[0]) / 2).round().long().clamp(0, len(_FOOTPRINTS) - 1)
    columns, rows = (
        ((axis - c[..., None]) / radius[..., None] * _ATLAS_UNIT + _ATLAS_SIDE / 2).floor().long() for c in (x, y)
    )
    # The border of the atlas is empty, so that points outside may read it.
    columns, rows = columns.clamp(0, _ATLAS_SIDE - 1), rows.clamp(0, _ATLAS_SIDE - 1)
    page = (level * num_shapes + torch.arange(num_shapes))[..., None, None]
    return atlas.take((page * _ATLAS_SIDE + rows[..., :, None]) * _ATLAS_SIDE + columns[..., None, :])


@functools.cache
def _atlas() -> tuple[Tensor, Tensor, Tensor]:
    """Every shape at radius `_ATLAS_UNIT`, averaged over every footprint: [L, K, A, A]; its area [K] at
    radius 1, and its centroid [K, 2] from the centre at radius 1."""
    pages = []
    for shape in words.SHAPE_NAMES:
        mask, (left, top) = coverage(shape, (0.5, 0.5), _ATLAS_UNIT / _ATLAS_SIDE, _ATLAS_SIDE)
        page = torch.zeros(_ATLAS_SIDE, _ATLAS_SIDE)
        page[top : top + mask.height, left : left + mask.width] = (
            torch.frombuffer(bytearray(mask.tobytes()), dtype=torch.uint8).view(mask.height, mask.width) / 255
        )
        pages.append(page)
    sharp = torch.stack(pages)
    axis = (torch.arange(_ATLAS_SIDE) + 0.5 - _ATLAS_SIDE / 2) / _ATLAS_UNIT
    areas = sharp.sum((1, 2))
    centroids = torch.stack((sharp.sum(1) @ axis, sharp.sum(2) @ axis), dim=1) / areas[:, None]
    levels = []
    for k in _FOOTPRINTS:
        rows = F.avg_pool2d(sharp[:, None], (k, 1), stride=1, padding=(k // 2, 0))
        levels.append(F.avg_pool2d(rows, (1, k), stride=1, padding=(0, k // 2))[:, 0])
    return torch.stack(levels), areas / _ATLAS_UNIT**2, centroids
