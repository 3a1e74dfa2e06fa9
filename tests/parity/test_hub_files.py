"""The weights that are downloaded of a model on the hub are those that diffusers chooses."""

from __future__ import annotations

import random

import pytest

from ldm_cli.errors import InputNotFoundError
from tests.formats.test_hub_files import MODEL, chosen, weights_in

loading = pytest.importorskip("diffusers.pipelines.pipeline_loading_utils")


@pytest.mark.parametrize("seed", range(40))
def test_weights_are_those_that_diffusers_takes(seed: int) -> None:
    draw = random.Random(seed)
    variant = draw.choice([None, "fp16", "bf16"])
    names = ["model_index.json", "whole.safetensors", "README.md", "unet/diffusion_pytorch_model.non_ema.safetensors"]
    for component, stem in (("unet", MODEL), ("vae", MODEL), ("text_encoder", "model")):
        precisions = {"", *draw.sample(["fp16", "bf16"], draw.randint(0, 2))}
        files = [file for p in precisions for file in weights_in(stem, p, draw.choice(["whole", "sharded", "old"]))]
        pickles = draw.choice([[], [f"{stem}.bin", f"{stem}.fp16.bin", f"{stem}.bin.index.json"]])
        names += [f"{component}/{file}" for file in ("config.json", *files, *pickles)]
    draw.shuffle(names)
    choice = loading.variant_compatible_siblings
    try:
        ours = chosen(names, ["unet", "vae", "text_encoder"], variant)
    except InputNotFoundError:
        with pytest.raises(ValueError, match="no such modeling files"):
            choice([name for name in names if not name.endswith(".bin")], variant)
        return
    theirs = choice(set(names), variant, ["*.bin", "*.bin.index.json"])[0]
    texts = {"model_index.json", *(f"{component}/config.json" for component in ("unet", "vae", "text_encoder"))}
    assert ours == {name for name in theirs if "/" in name} | texts
