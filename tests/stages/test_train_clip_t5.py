"""T5 beside CLIP as the text encoders of a U-Net: conditions, training, the folder, the cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from ldm_cli.core.models.clip import CLIPTextModel
from ldm_cli.core.models.clip_config import CLIPTextConfig
from ldm_cli.errors import CheckpointError, RecipeError
from ldm_cli.families.adapted import adaptable_networks
from ldm_cli.families.clip_t5_encoder import CLIPT5Encoder
from ldm_cli.families.clip_text_encoder import CLIPTextEncoder
from ldm_cli.families.open_family import open_family, outline_family
from ldm_cli.families.prompt_chunks import PromptReading
from ldm_cli.families.stable_diffusion import StableDiffusion, check_fit
from ldm_cli.recipe.schema import TrainUnetRecipe
from ldm_cli.reporting import SilentReporter
from ldm_cli.sampling.config import SamplingConfig
from ldm_cli.sampling.pipeline import Pipeline
from ldm_cli.sampling.request import ImageRequest
from ldm_cli.stages import convert
from ldm_cli.stages.convert import ConvertOptions
from ldm_cli.stages.dry_run import dry_run
from ldm_cli.stages.support.activation_sizes import activation_bytes
from ldm_cli.stages.support.start import resolve_start
from ldm_cli.stages.support.text_encoders import open_text_encoder, text_key

from ..faults.runs import assert_same_run
from ..sampling.tiny import randomize, tiny_tokenizer
from .test_precompute import assert_a_cache_changes_nothing
from .tiny import lose_after, trained, unet_recipe
from .tiny_sd3 import WIDTH, save_tiny_sd3, tiny_t5

PROMPTS = ["a red circle", "a blue square"]
LENGTH, T5_LENGTH = 12, 20
COMPONENTS = {"unet", "vae", "text_encoder", "text_encoder_3"}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An autoencoder, two CLIP towers and T5, untrained."""
    return save_tiny_sd3(tmp_path_factory.mktemp("parts"))


@pytest.fixture(scope="module")
def run(scenes: Path, parts: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps."""
    folder = tmp_path_factory.mktemp("run") / "run"
    trained(clip_t5_recipe(scenes, parts, steps=3), folder)
    return folder


def clip_t5_recipe(
    scenes: Path, parts: dict[str, str], diffusion: dict[str, Any] | None = None, **train: Any
) -> dict[str, Any]:
    recipe = unet_recipe(scenes, Path(parts["text_encoder"]), Path(parts["vae"]), diffusion, **train)
    recipe["unet"] = recipe["unet"] | {"cross_attention_dim": WIDTH, "in_channels": 4, "out_channels": 4}
    return recipe | {"text_encoder_3": parts["text_encoder_3"], "max_sequence_length": T5_LENGTH}


def their_states(folder: Path, prompts: list[str], t5_length: int, width: int) -> Tensor:
    """What transformers' encoders make of prompts: CLIP's states and then T5's, filled up with zeros."""
    transformers = pytest.importorskip("transformers")
    states = []
    for end, tokenizer, model in (("", "CLIPTokenizer", "CLIPTextModel"), ("_3", "T5TokenizerFast", "T5EncoderModel")):
        texts = getattr(transformers, tokenizer).from_pretrained(folder / f"tokenizer{end}")
        length = t5_length if end else texts.model_max_length
        ids = texts(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
        with torch.no_grad():
            found = getattr(transformers, model).from_pretrained(folder / f"text_encoder{end}")(ids)[0]
        states.append(pad(found, (0, width - found.shape[-1])))
    return torch.cat(states, dim=1)


def encode(encoder: CLIPT5Encoder, prompts: list[str], reading: PromptReading | None = None, chunks: int = 1) -> Tensor:
    found = encoder.encode_prompts(prompts, reading or PromptReading(), num_chunks=chunks, warn=pytest.fail)
    assert found.pooled is None
    assert found.tokens is not None
    return found.tokens


@pytest.mark.parametrize("t5_width", [8, 16, 24])
def test_states_are_those_of_clip_and_then_those_of_t5(tmp_path: Path, t5_width: int) -> None:
    tokenizer = tiny_tokenizer()
    config = CLIPTextConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        bos_token_id=tokenizer.start_id,
        eos_token_id=tokenizer.end_id,
    )
    clip, width = CLIPTextEncoder(randomize(CLIPTextModel(config), 1), tokenizer), max(16, t5_width)
    encoder = CLIPT5Encoder([clip], tiny_t5(t5_width), width, T5_LENGTH)
    encoder.save(tmp_path)
    ours = encode(encoder, PROMPTS)
    assert ours.shape == (2, LENGTH + T5_LENGTH, width)
    assert ours.std() > 0.1
    captions, expected = (
        encoder.encode_tokens(encoder.tokens(PROMPTS)),
        their_states(tmp_path, PROMPTS, T5_LENGTH, width),
    )
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(captions.tokens, expected, atol=1e-5, rtol=0)


def test_weights_of_words_and_chunks_are_of_clip_alone(run: Path) -> None:
    encoder = open_family(run).encoder  # type: ignore[attr-defined]
    plain = encode(encoder, ["a red circle"])
    weighted = encode(encoder, ["a (red:1.5) circle"], PromptReading(weighted=True))
    assert torch.equal(weighted[:, LENGTH:], plain[:, LENGTH:])
    assert not torch.equal(weighted[:, :LENGTH], plain[:, :LENGTH])
    long = encode(encoder, ["a red circle"], PromptReading(long=True), chunks=2)
    assert long.shape[1] == 2 * LENGTH + T5_LENGTH
    assert torch.equal(long[:, 2 * LENGTH :], plain[:, LENGTH:])


def pictures(family: StableDiffusion, prompts: list[str], noise: Tensor) -> Tensor:
    config = SamplingConfig(sampler="ddim", steps=4, guidance=4.0, width=24, height=24, negative="a square")
    requests = [ImageRequest(prompt, seed) for seed, prompt in enumerate(prompts)]
    return torch.stack([image.pixels for image in Pipeline(family).generate(requests, config, noise)])


def test_diffusers_opens_the_folder_and_gives_the_same_pictures_of_joined_states(run: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    family = open_family(run)
    assert isinstance(family, StableDiffusion)
    noise = torch.randn(2, 4, 12, 12, generator=torch.Generator().manual_seed(7))
    ours = pictures(family, PROMPTS, noise)
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(run / "model")
    theirs.set_progress_bar_config(disable=True)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        theirs(PROMPTS, num_inference_steps=1)  # by CLIP alone, whose states are narrower
    states = [their_states(run / "model", prompts, T5_LENGTH, WIDTH) for prompts in (PROMPTS, ["a square"] * 2)]
    given = {"num_inference_steps": 4, "guidance_scale": 4.0, "height": 24, "width": 24, "output_type": "np"}
    embeds = {"prompt_embeds": states[0], "negative_prompt_embeds": states[1]}
    expected = torch.from_numpy(theirs(**embeds, latents=noise, **given).images).permute(0, 3, 1, 2) * 255
    assert expected.std() > 10
    assert (ours.int() - expected.round().int()).abs().max() <= 2
    for row, prompt in enumerate(PROMPTS):
        alone = pictures(family, [prompt], noise[row : row + 1])
        assert torch.equal(alone[0], ours[row]), "a picture does not depend on the others"


def test_a_run_writes_a_folder_with_both_encoders(run: Path, parts: dict[str, str], tmp_path: Path) -> None:
    family = open_family(run)
    assert isinstance(family, StableDiffusion)
    assert isinstance(family.encoder, CLIPT5Encoder)
    assert family.encoder.t5_length == T5_LENGTH
    assert set(outline_family(run / "model")) == set(family.networks) == set(family.weights_sha256) == COMPONENTS
    assert set(adaptable_networks(family)) == {"unet", "text_encoder"}
    for name in ("text_encoder", "text_encoder_3"):
        before = (Path(parts[name]) / "model.safetensors").read_bytes()
        assert (name == "text_encoder") or (run / "model" / name / "model.safetensors").read_bytes() == before
    family.save(tmp_path / "saved")
    index = json.loads((run / "model/model_index.json").read_text())
    assert json.loads((tmp_path / "saved/model_index.json").read_text()) == index
    assert open_family(tmp_path / "saved").weights_sha256 == family.weights_sha256


def test_conversion_keeps_folders_whole_and_refuses_a_single_file(run: Path, tmp_path: Path) -> None:
    convert.run(run, tmp_path / "folder", ConvertOptions(), SilentReporter())
    assert open_family(tmp_path / "folder").weights_sha256 == open_family(run).weights_sha256
    with pytest.raises(CheckpointError, match="has no place for 'text_encoder_3'"):
        convert.run(run, tmp_path / "x.safetensors", ConvertOptions(), SilentReporter())


def test_training_from_a_cache_gives_the_same_weights_and_losses(
    scenes: Path, parts: dict[str, str], tmp_path: Path
) -> None:
    recipe = clip_t5_recipe(scenes, parts, {"encoder_dropout": 0.3}, steps=4, log_every=1, save_every=4)
    assert_a_cache_changes_nothing(recipe, tmp_path)


def test_a_lost_run_ends_in_the_same_weights(scenes: Path, parts: dict[str, str], tmp_path: Path) -> None:
    recipe = clip_t5_recipe(scenes, parts, {"encoder_dropout": 0.4}, steps=4, save_every=2, ema_decay=0.9)
    trained(recipe, tmp_path / "whole")
    lose_after(2, recipe, tmp_path / "broken")
    trained(recipe, tmp_path / "broken")
    assert_same_run(tmp_path / "whole", tmp_path / "broken", 4)


def test_each_encoder_is_left_out_by_itself(run: Path) -> None:
    encoder = open_family(run).encoder  # type: ignore[attr-defined]
    whole = encoder.encode_tokens(encoder.tokens(["a red circle"] * 4))
    left_out = torch.tensor([[False, False], [True, False], [False, True], [True, True]])
    found, clip = encoder.without(whole, left_out), slice(None, LENGTH)
    for row, (no_clip, no_t5) in enumerate(left_out.tolist()):
        for part, is_left_out in ((clip, no_clip), (slice(LENGTH, None), no_t5)):
            expected = torch.zeros_like(whole.tokens[row, part]) if is_left_out else whole.tokens[row, part]
            assert torch.equal(found.tokens[row, part], expected)
    assert found.pooled is None


def test_a_run_begins_at_such_a_folder(scenes: Path, run: Path, tmp_path: Path) -> None:
    recipe = unet_recipe(scenes, Path(), Path(), steps=2)
    recipe = {name: value for name, value in recipe.items() if name not in ("vae", "text_encoder", "unet")}
    recipe |= {"start_from": str(run), "freeze": ["*", "!conv_out.*"]}
    filled = resolve_start(TrainUnetRecipe.from_mapping(recipe), pytest.fail)
    assert filled.text_encoder_3 == str(run / "model/text_encoder_3")
    assert filled.max_sequence_length == T5_LENGTH
    trained(recipe, tmp_path)
    before, after = (open_family(folder).denoiser.state_dict() for folder in (run, tmp_path))  # type: ignore[attr-defined]
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"conv_out.weight", "conv_out.bias"}


def test_the_dry_run_counts_both_encoders(scenes: Path, parts: dict[str, str]) -> None:
    recipe = clip_t5_recipe(scenes, parts, {"encoder_dropout": 0.4})
    result = dry_run(TrainUnetRecipe.from_mapping(recipe), SilentReporter())
    assert result["parameters"].keys() == COMPONENTS
    assert "24.4 % of captions become the empty one, of 2 encoders" in " ".join(result["notes"])


def test_activations_grow_with_the_tokens_of_t5(scenes: Path, parts: dict[str, str]) -> None:
    def kept(**fields: Any) -> int:
        recipe = TrainUnetRecipe.from_mapping(clip_t5_recipe(scenes, parts) | fields)
        return activation_bytes(recipe, 2)["kept"]

    assert kept(max_sequence_length=None) == kept(max_sequence_length=256) > kept(max_sequence_length=20)
    assert kept(max_sequence_length=20) > kept(max_sequence_length=None, text_encoder_3="")


def test_the_key_of_a_cache_names_both_encoders(scenes: Path, parts: dict[str, str]) -> None:
    recipe = TrainUnetRecipe.from_mapping(clip_t5_recipe(scenes, parts))
    key = text_key(recipe)
    assert key.keys() >= {"text_encoder", "tokenizer", "text_encoder_3", "tokenizer_3", "width", "max_sequence_length"}
    assert text_key(recipe.model_copy(update={"max_sequence_length": 10})) != key
    assert text_key(recipe.model_copy(update={"text_encoder": parts["text_encoder_2"]})) != key
    assert open_text_encoder(recipe, pytest.fail).key.items() <= key.items()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_encoder_3": "text_encoder_2"}, "text_encoder_3 must be T5, but '.*text_encoder_2' is none"),
        ({"text_encoder": "text_encoder_3"}, "text_encoder is T5: beside a CLIP name it text_encoder_3"),
        (
            {"text_encoder_3": "", "text_encoder_2": "text_encoder_3"},
            "text_encoder_2 is T5: beside a CLIP name it text_encoder_3, and the CLIP text_encoder",
        ),
        ({"clip_skip": 3}, "clip_skip=3, but a text encoder has 2 layers"),
        ({"unet": {"cross_attention_dim": 36}}, "cross_attention_dim=36, but '.*text_encoder' and '.*_3' give 28"),
        ({"low_resolution": {"factor": 2}}, "low_resolution in latents goes with one text_encoder, a CLIP"),
    ],
)
def test_parts_that_do_not_fit_are_named(
    scenes: Path, parts: dict[str, str], change: dict[str, Any], message: str
) -> None:
    recipe = clip_t5_recipe(scenes, parts)
    change = {field: parts.get(str(value), value) for field, value in change.items()}
    change |= {"unet": recipe["unet"] | change.get("unet", {})}
    with pytest.raises(RecipeError, match=message):
        dry_run(TrainUnetRecipe.from_mapping(recipe | change), SilentReporter())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_encoder_2": "text_encoder_2"}, "text_encoder_2, a CLIP, or text_encoder_3, T5, beside text_encoder"),
        ({"vae": "pixels"}, "vae=pixels does not go with text_encoder_3"),
        ({"max_sequence_length": 0}, "max_sequence_length=0 leaves no room"),
        ({"image_embedding": {"image_encoder": "x"}}, "image_embedding is for a U-Net with one text encoder"),
    ],
)
def test_a_recipe_that_contradicts_itself_is_refused(
    scenes: Path, parts: dict[str, str], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        TrainUnetRecipe.from_mapping(clip_t5_recipe(scenes, parts) | change)


def test_a_folder_whose_parts_do_not_fit_is_refused(run: Path) -> None:
    family = open_family(run)
    assert isinstance(family, StableDiffusion)
    config = family.denoiser.config.model_copy(update={"cross_attention_dim": 20})
    family.denoiser.config = config
    with pytest.raises(CheckpointError, match=r"cross_attention_dim=20, the larger of .*text_encoder_3.hidden_size=28"):
        check_fit(family.folder, config, family.codec, family.encoder.texts)
