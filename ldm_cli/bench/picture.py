"""Speed of sampling in a running process, and of one picture from process start to PNG."""

from __future__ import annotations

import itertools
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ldm_cli.bench import peers
from ldm_cli.bench.race import Contender, Runner, race, speed, speed_and_memory
from ldm_cli.bench.workload import build_model
from ldm_cli.core.diffusion.config import DiffusionConfig
from ldm_cli.core.models.autoencoder_kl import AutoencoderKL
from ldm_cli.core.models.clip import CLIPTextModel
from ldm_cli.core.models.clip_config import CLIPTextConfig
from ldm_cli.core.models.unet_2d_condition import UNet2DConditionModel
from ldm_cli.data.tokenizer import Tokenizer
from ldm_cli.data.tokenizer_config import TokenizerConfig
from ldm_cli.errors import WorkerError
from ldm_cli.families.clip_text_encoder import CLIPTextEncoder
from ldm_cli.families.open_family import open_family
from ldm_cli.families.stable_diffusion import StableDiffusion
from ldm_cli.formats.scheduler_file import our_settings
from ldm_cli.recipe.load import load_recipe
from ldm_cli.recipe.schema import TrainUnetRecipe, TrainVaeRecipe
from ldm_cli.sampling.config import SamplingConfig
from ldm_cli.sampling.pipeline import Pipeline
from ldm_cli.sampling.request import requests_for

PROMPT = "a red circle"
_GUIDANCE = 7.5


def sample(
    folder: str, images: int, steps: int, rounds: int, compared: bool, device: str, compiled: bool
) -> list[dict[str, Any]]:
    """`images` pictures of one prompt, DDIM, guidance 7.5, in a process with a loaded model: one row per contender, and
    with `compiled` a further one for the compiled model of each."""
    field = []
    for is_compiled in (False, True) if compiled else (False,):
        arguments, suffix = (folder, images, steps, device, is_compiled), " compiled" if is_compiled else ""
        field.append(Contender(f"ldm{suffix}", our_pictures, arguments))
        if compared:
            field.append(Contender(f"diffusers{suffix}", peers.their_pictures, (*arguments, PROMPT, _GUIDANCE)))
    laps = race(field, rounds=rounds, warmup=1, device=device)
    return [speed_and_memory(name, lap, laps["ldm"]) for name, lap in laps.items()]


def our_pictures(folder: str, images: int, steps: int, device: str, compiled: bool) -> Runner:
    """Our pipeline, loaded; a step generates all pictures."""
    precision = "fp32" if device == "cpu" else "fp16"
    pipeline = Pipeline(open_family(Path(folder), device, precision, compiled=compiled))
    config = SamplingConfig.from_mapping(
        {"sampler": "ddim", "steps": steps, "images_per_prompt": images, "batch_size": min(images, 16)}
    )
    return Runner(lambda: [*pipeline.generate(requests_for([PROMPT], config), config)], images)


def start(folder: str, steps: int, rounds: int, compared: bool) -> list[dict[str, Any]]:
    """One picture from process start to PNG on disk, by `ldm sample` and by the shortest diffusers script."""
    with tempfile.TemporaryDirectory() as scratch:
        words = ["sample", "--model", folder, "-p", PROMPT, "-n", "1", "--steps", str(steps), "--sampler", "ddim"]
        ours = [sys.executable, "-m", "ldm_cli", *words, "--guidance", str(_GUIDANCE), "--out"]
        field = [Contender("ldm", process, (ours, f"{scratch}/ours"))]
        if compared:
            theirs = [sys.executable, "-c", peers.script(folder, PROMPT, steps, _GUIDANCE)]
            field.append(Contender("diffusers", process, (theirs, f"{scratch}/theirs")))
        laps = race(field, rounds=rounds, warmup=1)  # the first one warms the disk cache
    return [speed(name, lap, laps["ldm"]) for name, lap in laps.items()]


def process(command: list[str], target: str) -> Runner:
    """A process whose last argument is another target at every step."""
    numbers = itertools.count()
    return Runner(lambda: _run([*command, f"{target}-{next(numbers)}.png"]), 1)


def _run(command: list[str]) -> None:
    try:
        subprocess.check_output(command, stderr=subprocess.STDOUT, text=True)
    except subprocess.CalledProcessError as error:
        last = (error.output.strip().splitlines() or ["no message"])[-1]
        raise WorkerError(f"'{' '.join(command[:4])} …' failed", last) from None


@contextmanager
def random_pipeline(unet_recipe: str = "bench/unet", vae_recipe: str = "bench/vae") -> Iterator[str]:
    """A temporary pipeline folder of random weights, with the U-Net and the autoencoder of two recipes."""
    recipe, vae = load_recipe(unet_recipe).recipe, load_recipe(vae_recipe).recipe
    assert isinstance(recipe, TrainUnetRecipe)
    assert isinstance(vae, TrainVaeRecipe)
    unet = build_model(recipe)
    assert isinstance(unet, UNet2DConditionModel)
    tokenizer = Tokenizer.train([PROMPT] * 4, TokenizerConfig(vocab_size=600))
    width = max(unet.config.per_level(unet.config.cross_attention_dim))
    text = CLIPTextConfig(
        vocab_size=tokenizer.vocab_size,
        bos_token_id=tokenizer.start_id,
        eos_token_id=tokenizer.end_id,
        pad_token_id=tokenizer.pad_id,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=4,
        num_attention_heads=4,
    )
    torch.manual_seed(0)
    encoder = CLIPTextEncoder(CLIPTextModel(text), tokenizer)
    family = StableDiffusion(unet, AutoencoderKL(vae.model), encoder, our_settings(DiffusionConfig().to_mapping()))
    with tempfile.TemporaryDirectory() as scratch:
        family.save(Path(scratch) / "model")
        yield f"{scratch}/model"
