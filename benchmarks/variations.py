"""What variations of a picture keep: shape and colour, and what differs, place or size.

`python benchmarks/variations.py runs/demo-unclip "data/demo/val-*.tar"`, after `make demo-unclip`. Pictures of a single
object, held out from training, are varied; a detector reads what each variation shows. Rates come with 95 % intervals.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from ldm_cli.data.config import DataConfig
from ldm_cli.data.loader import sequential_batches
from ldm_cli.data.open_shards import open_shards
from ldm_cli.evaluation.intervals import share_interval
from ldm_cli.evaluation.scene_detector import read_scenes
from ldm_cli.families.open_family import open_family
from ldm_cli.families.unclip import UnCLIP
from ldm_cli.reporting import SilentReporter
from ldm_cli.sampling.config import SamplingConfig
from ldm_cli.sampling.pipeline_of import pipeline_of
from ldm_cli.sampling.request import ImageRequest
from ldm_cli.sampling.sample_options import SampleOptions


def judged(truths: list[dict[str, Any]], pictures: torch.Tensor) -> list[tuple[bool, bool]]:
    """For each picture, uint8 [N, 3, S, S]: whether shape and colour are its truth's, whether place or size differ."""
    found = []
    for truth, seen in zip(truths, read_scenes(pictures), strict=True):
        [wanted], objects = truth["objects"], seen.objects
        one = objects[0] if objects else None
        keeps = one is not None and (one.shape, one.color) == (wanted["shape"], wanted["color"])
        differs = one is not None and (one.place, one.size) != (wanted["place"], wanted["size"])
        found.append((keeps, differs))
    return found


def main() -> None:
    """Print the rates at each noise level as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("shards")
    parser.add_argument("--pictures", type=int, default=64)
    parser.add_argument("--each", type=int, default=2)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--noise-level", type=int, nargs="+", default=[0, 200])
    given = parser.parse_args()
    family = open_family(given.model)
    if not isinstance(family, UnCLIP) or family.image_encoder is None:
        raise SystemExit(f"{given.model} is no unCLIP with an image encoder")
    data = DataConfig(shards=given.shards, image_size=32)
    batches = sequential_batches(open_shards(data.shards, data, SilentReporter()), data, 64, with_json=True)
    images, truths = [], []
    for batch in batches:
        for image, truth in zip(batch.images, batch.metadata or [], strict=True):
            if len(truth["objects"]) == 1 and len(images) < given.pictures:
                images.append(image)
                truths.append(truth)
        if len(images) == given.pictures:
            break
    with torch.inference_mode():
        embeddings = family.image_encoder(torch.stack(images)).repeat_interleave(given.each, 0)
    truths = [truth for truth in truths for _ in range(given.each)]
    requests = [ImageRequest("", seed) for seed in range(len(truths))]
    for level in given.noise_level:
        settings = {"sampler": "ddim", "steps": 20, "guidance": given.guidance, "prior": {"noise_level": level}}
        config, options = SamplingConfig.from_mapping(settings), SampleOptions(image_embeds=embeddings[:, None])
        pictures = torch.stack([one.pixels for one in pipeline_of(family).generate(requests, config, options=options)])
        marks = judged(truths, pictures)
        row: dict[str, Any] = {"noise_level": level, "pictures": len(marks)}
        for number, name in enumerate(("keeps_shape_and_color", "place_or_size_differs")):
            share = sum(mark[number] for mark in marks) / len(marks)
            row[name] = [round(share, 4), [round(end, 4) for end in share_interval(share, len(marks))]]
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
