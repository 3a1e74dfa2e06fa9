"""Every shipped recipe is valid, explained, and of the size it claims."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ldm_cli.recipe.load import load_recipe
from ldm_cli.recipe.schema import RECIPES, TrainClipRecipe, TrainUnetRecipe, TrainVaeRecipe
from ldm_cli.recipe.shipped import find_recipe, recipes_folder, shipped_recipes
from ldm_cli.recipe.yaml_source import to_yaml
from ldm_cli.reporting import SilentReporter
from ldm_cli.stages import trainer_stage
from ldm_cli.stages.dry_run import dry_run

NAMES = sorted(shipped_recipes())
PUBLISHED = {
    "clip/vit-b-32": {"clip": 151_277_313},
    "clip/vit-l-14": {"clip": 427_616_513},
    "clip/rn50": {"clip": 102_007_137},
    "vae/sd-vae": {"vae": 83_653_863},
    "vae/vq-f16": {"vae": 76_073_859},
    "ar/llamagen-xl": {"transformer": 899_907_840},
    "prior/karlo": {"prior": 1_022_028_544},
    "unet/sd15": {"unet": 859_520_964},
    "unet/sd21": {"unet": 865_910_724},
    "unet/sdxl": {"unet": 2_567_463_684},
    "upscale/sd-x4": {"unet": 473_398_020},
    "sd3/medium": {"transformer": 2_028_328_000},
    "sd3/large": {"transformer": 8_056_627_520},
}


def test_the_shipped_recipes_are_these() -> None:
    bench = ["bench/clip", "bench/unet", "bench/vae"]
    demo = [f"demo/{what}" for what in ("clip", "vae", "unet", "sample", "eval", "pairs", "pairs-eval")]
    demo += ["demo/vq", "demo/ar", "demo/ar-eval"]
    lora = ["lora/demo", "lora/eval", "lora/sd15", "lora/sdxl"]
    image_prompt = ["image-prompt/demo", "image-prompt/sd15", "image-prompt/sdxl"]
    sd3 = ["sd3/demo", "sd3/demo-clip", "sd3/demo-eval", "sd3/demo-vae"]
    cascade = [f"cascade/demo{part}" for part in ("", "-base", "-eval", "-large")]
    pixels = ["unet/cifar10-classes", "upscale/emoji"]
    unclip = ["prior/demo", "unclip/demo", "unclip/demo-eval"]
    small = [f"{room}/{data}" for room in ("clip", "vae", "unet", "eval") for data in ("cifar10", "emoji")]
    drawn = [*cascade, *pixels, *unclip, *image_prompt]
    assert sorted([*bench, *demo, *drawn, *lora, *sd3, *small, *PUBLISHED]) == NAMES
    assert len(NAMES) == len(list(recipes_folder().rglob("*.y*ml"))) == 54


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_recipe_is_valid_and_begins_with_what_it_is(name: str) -> None:
    loaded = load_recipe(name)
    assert loaded.recipe.command in RECIPES
    assert re.match(r"# \S.{20,100}\.\n", loaded.text)


@pytest.mark.parametrize("name", NAMES)
def test_a_resolved_recipe_is_the_same_recipe(name: str, tmp_path: Path) -> None:
    loaded = load_recipe(name)
    path = tmp_path / "resolved.yaml"
    path.write_text(to_yaml(loaded.recipe.to_mapping()), encoding="utf-8")
    assert load_recipe(path).recipe == loaded.recipe


@pytest.mark.parametrize("name", ["demo/unet", "unet/cifar10", "unet/emoji"])
def test_the_parts_of_a_family_fit_together(name: str) -> None:
    recipe = load_recipe(name).recipe
    assert isinstance(recipe, TrainUnetRecipe)
    others = {other.recipe.name: other.recipe for other in map(load_recipe, NAMES) if hasattr(other.recipe, "name")}
    vae, clip = others[Path(recipe.vae).parts[1]], others[Path(recipe.text_encoder).parts[1]]
    factor = 2 ** (len(vae.vae.block_out_channels) - 1)  # type: ignore[union-attr]
    assert recipe.unet.cross_attention_dim == clip.clip.text_config.hidden_size  # type: ignore[union-attr]
    assert recipe.unet.in_channels == recipe.unet.out_channels == vae.vae.latent_channels  # type: ignore[union-attr]
    assert recipe.unet.sample_size == recipe.data.image_size // factor


def test_the_parts_of_the_small_stable_diffusion_3_fit_together() -> None:
    recipe, vae = load_recipe("sd3/demo").recipe, load_recipe("sd3/demo-vae").recipe
    clips = [load_recipe(name).recipe for name in ("demo/clip", "sd3/demo-clip")]
    assert isinstance(recipe, TrainUnetRecipe)
    assert isinstance(vae, TrainVaeRecipe)
    towers = [clip.model.text_config for clip in clips if isinstance(clip, TrainClipRecipe)]
    config = recipe.transformer
    assert config is not None
    assert config.joint_attention_dim == sum(tower.hidden_size for tower in towers)
    assert config.pooled_projection_dim == sum(tower.projection_dim for tower in towers)
    assert len({tower.max_position_embeddings for tower in towers}) == 1
    assert len({tower.hidden_size for tower in towers}) == 2
    assert config.in_channels == config.out_channels == vae.model.latent_channels == 16
    assert config.sample_size == recipe.data.image_size // 2 ** (len(vae.model.block_out_channels) - 1)


@pytest.mark.exhaustive  # a dry run for eight ranks is a command of docs/stable-diffusion-3.md
@pytest.mark.parametrize("name", ["sd3/medium", "sd3/large"])
def test_eight_ranks_share_a_transformer_of_published_size(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sizes = dry_run(load_recipe(name).recipe, SilentReporter(), num_ranks=8)["bytes"]
    share = PUBLISHED[name]["transformer"] // 8
    assert sizes == {
        "weights": 4 * share,
        "gradients": 4 * share,
        "optimizer": 8 * share,
        "ema": 4 * share,
        "save": 72 * share,
    }


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_has_its_published_number_of_parameters(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    loaded = load_recipe(name)
    trained, frozen = trainer_stage(loaded.recipe.command).parameters(loaded.recipe, [])
    assert PUBLISHED[name].items() <= (trained | frozen).items()
    (count,) = PUBLISHED[name].values()
    assert f"{count:,} parameters" in loaded.text.partition("\n")[0]


def test_a_recipe_is_found_by_path_and_by_every_form_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shipped = recipes_folder() / "demo" / "clip.yaml"
    for name in ("demo/clip", "demo/clip.yaml", "recipes/demo/clip.yaml", str(shipped)):
        assert find_recipe(name) == shipped
    own = tmp_path / "demo" / "clip"
    own.parent.mkdir()
    own.write_text("command: train-clip")
    assert find_recipe("demo/clip") == Path("demo/clip")
