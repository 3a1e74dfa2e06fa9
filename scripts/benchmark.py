"""Training steps of our networks beside those of diffusers and transformers: same shapes, same weights, in turn.

    python scripts/benchmark.py [--rounds 5] [--json FILE]

Each round runs one step of ours and one of theirs (A B A B), after a warm-up; medians and ratios of whole steps
(forward, backward, AdamW) are printed. Needs the `test` extra.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm_cli.core.clip_loss import contrastive_loss
from ldm_cli.core.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from ldm_cli.core.models.clip import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig
from ldm_cli.core.models.unet_2d_condition import UNet2DConditionConfig, UNet2DConditionModel

Loss = Callable[[], Tensor]


def unet_losses() -> tuple[nn.Module, Loss, nn.Module, Loss, int]:
    """U-Net of 12.6 M parameters, latents 16×16×4, batch 16."""
    import diffusers

    config = UNet2DConditionConfig(
        sample_size=16,
        block_out_channels=(64, 128, 256),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=128,
        attention_head_dim=4,
    )
    ours = UNet2DConditionModel(config).to(memory_format=torch.channels_last)
    theirs = diffusers.UNet2DConditionModel(**config.to_mapping())
    theirs.load_state_dict(ours.state_dict())
    x, t, context = torch.randn(16, 4, 16, 16), torch.randint(0, 1000, (16,)), torch.randn(16, 32, 128)
    nhwc = x.to(memory_format=torch.channels_last)
    return (
        ours,
        lambda: (ours(nhwc, t, context) - x).square().mean(),
        theirs,
        lambda: (theirs(x, t, context).sample - x).square().mean(),
        16,
    )


def vae_losses() -> tuple[nn.Module, Loss, nn.Module, Loss, int]:
    """Autoencoder of 3.9 M parameters, 64 px, batch 16."""
    import diffusers

    config = AutoencoderKLConfig(
        block_out_channels=(32, 64, 128),
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        sample_size=64,
    )
    ours = AutoencoderKL(config).to(memory_format=torch.channels_last)
    theirs = diffusers.AutoencoderKL(**config.to_mapping())
    theirs.load_state_dict(ours.state_dict())
    x, noise = torch.randn(16, 3, 64, 64), torch.randn(16, 4, 16, 16)
    nhwc = x.to(memory_format=torch.channels_last)

    def their_loss() -> Tensor:
        posterior = theirs.encode(x).latent_dist
        return (theirs.decode(posterior.mean + posterior.std * noise).sample - x).abs().mean()

    return ours, lambda: (ours.decode(ours.encode(nhwc).sample(noise)) - x).abs().mean(), theirs, their_loss, 16


def clip_losses() -> tuple[nn.Module, Loss, nn.Module, Loss, int]:
    """CLIP of 128×4 layers a tower, 64 px, patch 8, 32 tokens, batch 64."""
    import transformers

    tower = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
    text = CLIPTextConfig(**tower, vocab_size=1000, max_position_embeddings=32, bos_token_id=998, eos_token_id=999)  # type: ignore[arg-type]
    vision = CLIPVisionConfig(**tower, image_size=64, patch_size=8)  # type: ignore[arg-type]
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=128)
    ours = CLIPModel(config)
    theirs = transformers.CLIPModel(transformers.CLIPConfig(**config.to_hugging_face()))
    theirs.load_state_dict(ours.state_dict(), strict=False)
    ids, pixels = torch.randint(0, 999, (64, 32)), torch.randn(64, 3, 64, 64)
    ids[:, -1] = 999

    def our_loss() -> Tensor:
        images, texts = ours.get_image_features(pixels), ours.get_text_features(ids)
        return contrastive_loss(images, texts, ours.clamped_logit_scale)[0]

    return ours, our_loss, theirs, lambda: theirs(ids, pixels, return_loss=True).loss, 64


def stepper(module: nn.Module, loss: Loss) -> Callable[[], float]:
    """A function that runs one training step and returns its seconds."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True)

    def step() -> float:
        start = time.perf_counter()
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - start

    return step


def main() -> None:
    """Run all comparisons and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="counted steps of each (after one warm-up)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    results: dict[str, object] = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    results["machine"] = platform.processor() or platform.machine()
    for name, losses in (("unet", unet_losses), ("vae", vae_losses), ("clip", clip_losses)):
        torch.manual_seed(0)
        ours, our_loss, theirs, their_loss, batch = losses()
        steps = stepper(ours, our_loss), stepper(theirs, their_loss)
        rounds = [[step() for step in steps] for _ in range(arguments.rounds + 1)][1:]
        medians = [statistics.median(seconds) for seconds in zip(*rounds, strict=True)]
        ratio = statistics.median(theirs_seconds / ours_seconds for ours_seconds, theirs_seconds in rounds)
        rates = [batch / seconds for seconds in medians]
        results[name] = {"ours_per_second": rates[0], "peer_per_second": rates[1], "speedup": ratio}
        print(f"{name}: ours {rates[0]:.1f}/s, peer {rates[1]:.1f}/s, {ratio:.2f} times as fast")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
