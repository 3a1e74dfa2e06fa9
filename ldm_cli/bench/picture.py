"""Speed of sampling in a running process, and of one picture from process start to PNG."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from ldm_cli.bench import peers
from ldm_cli.bench.race import Contender, race, speedup
from ldm_cli.bench.workload import build_model
from ldm_cli.core.diffusion.config import DiffusionConfig
from ldm_cli.core.models.autoencoder_kl import AutoencoderKL
from ldm_cli.core.models.autoencoder_kl_config import AutoencoderKLConfig
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
    model: str | None, images: int, steps: int, rounds: int, compared: bool, device: str, compiled: bool = False
) -> list[dict[str, Any]]:
    """`images` pictures of one prompt, DDIM, guidance 7.5, in a process with a loaded model: one row per contender, and
    with `compiled` a further one for the compiled model of each."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = model or random_pipeline(Path(scratch) / "model")
        field = []
        for is_compiled in (False, True) if compiled else (False,):
            arguments, suffix = (folder, images, steps, device, is_compiled), " compiled" if is_compiled else ""
            field.append(Contender(f"ldm{suffix}", OurPictures, arguments))
            if compared:
                field.append(Contender(f"diffusers{suffix}", peers.TheirPictures, (*arguments, PROMPT, _GUIDANCE)))
        laps = race(field, rounds=rounds, warmup=1, device=device)
    return [
        {
            "contender": name,
            "images_per_second": images / lap.median,
            "seconds": lap.median,
            "peak_mib": lap.peak_bytes / 2**20,
            "speedup": speedup(laps["ldm"], lap),
        }
        for name, lap in laps.items()
    ]


class OurPictures:
    """Our pipeline, loaded; a step generates all pictures."""

    def __init__(self, folder: str, images: int, steps: int, device: str, compiled: bool) -> None:
        precision = "fp32" if device == "cpu" else "fp16"
        self.pipeline = Pipeline(open_family(Path(folder), device, precision, compiled=compiled))
        self.config = SamplingConfig.from_mapping(
            {"sampler": "ddim", "steps": steps, "images_per_prompt": images, "batch_size": min(images, 16)}
        )

    def step(self) -> None:
        """Generate the pictures."""
        for _ in self.pipeline.generate(requests_for([PROMPT], self.config), self.config):
            pass

    def facts(self) -> dict[str, Any]:
        """Pictures a step."""
        return {"units": self.config.images_per_prompt}


def start(model: str | None, steps: int, rounds: int, compared: bool) -> list[dict[str, Any]]:
    """One picture from process start to PNG on disk, by `ldm sample` and by the shortest diffusers script."""
    with tempfile.TemporaryDirectory() as scratch:
        here = Path(scratch)
        folder = model or random_pipeline(here / "model")
        words = ["sample", "--model", folder, "-p", PROMPT, "-n", "1", "--steps", str(steps), "--sampler", "ddim"]
        commands = {"ldm": [sys.executable, "-m", "ldm_cli", *words, "--guidance", str(_GUIDANCE)]}
        if compared:
            script = peers.script(folder, PROMPT, steps, _GUIDANCE, str(here / "theirs.png"))
            commands["diffusers"] = [sys.executable, "-c", script]
        seconds: dict[str, list[float]] = {name: [] for name in commands}
        for number in range(rounds + 1):
            for name, command in commands.items():
                out = ["--out", str(here / f"out-{number}")] if name == "ldm" else []
                took = _run([*command, *out], here)
                if number:  # the first one warms the disk cache
                    seconds[name].append(took)
    ours = seconds["ldm"]
    return [
        {
            "contender": name,
            "seconds": median(taken),
            "time_ratio": median(a / b for a, b in zip(ours, taken, strict=True)),
        }
        for name, taken in seconds.items()
    ]


def _run(command: list[str], folder: Path) -> float:
    """Wall seconds of a process."""
    package = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    begin = time.perf_counter()
    with subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        _, complaint = process.communicate()
    if process.returncode:
        last = (complaint.strip().splitlines() or ["no message"])[-1]
        raise WorkerError(f"'{' '.join(command[:4])} …' failed", last)
    return time.perf_counter() - begin


def random_pipeline(folder: Path, unet_recipe: str = "bench/unet", vae_recipe: str | None = None) -> str:
    """Write a pipeline folder of random weights around a recipe's U-Net.

    Args:
        folder: the output folder.
        unet_recipe: of `train-unet`.
        vae_recipe: of `train-vae`; None: a small autoencoder of factor 4.
    """
    recipe = load_recipe(unet_recipe).recipe
    assert isinstance(recipe, TrainUnetRecipe)
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
    vae = AutoencoderKLConfig(
        block_out_channels=(32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=unet.config.in_channels,
    )
    if vae_recipe is not None:
        its_recipe = load_recipe(vae_recipe).recipe
        assert isinstance(its_recipe, TrainVaeRecipe)
        vae = its_recipe.model
    torch.manual_seed(0)
    encoder = CLIPTextEncoder(CLIPTextModel(text), tokenizer)
    StableDiffusion(unet, AutoencoderKL(vae), encoder, our_settings(DiffusionConfig().to_mapping())).save(folder)
    return str(folder)
