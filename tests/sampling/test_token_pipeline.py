"""Pictures token by token: reproducible, guided, completed, chosen among several; what has no meaning is refused."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from ldm_cli.core.models.clip import CLIPModel
from ldm_cli.errors import CheckpointError, DivergedError, UsageError
from ldm_cli.families.autoregressive import Autoregressive
from ldm_cli.families.open_family import open_family, outline_family
from ldm_cli.pictures.images import save_image
from ldm_cli.sampling.best_of import candidates
from ldm_cli.sampling.config import SamplingConfig
from ldm_cli.sampling.edit_config import EditConfig
from ldm_cli.sampling.edit_input import open_edit_input
from ldm_cli.sampling.request import Blend, ImageRequest, requests_for
from ldm_cli.sampling.sample_options import SampleOptions
from ldm_cli.sampling.token_choice import chosen_tokens, nucleus
from ldm_cli.sampling.token_pipeline import TokenPipeline, token_noise
from tests.sampling.tiny import tiny_tokenizer
from tests.sampling.tiny_ar import save_tiny_model, save_tiny_vq, tiny_token_pipeline
from tests.stages.tiny import save_random_clip

GUIDED = SamplingConfig(guidance=3.0, images_per_prompt=1)
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    save_tiny_model(path)
    return path


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> TokenPipeline:
    return tiny_token_pipeline(folder)


def pictures(pipeline: TokenPipeline, requests: list[ImageRequest], config: Any, **options: Any) -> list[Tensor]:
    return [image.pixels for image in pipeline.generate(requests, config, options=SampleOptions(**options))]


def codes(pipeline: TokenPipeline, request: ImageRequest, config: SamplingConfig) -> list[int]:
    """The codes behind a picture."""
    seen: list[Tensor] = []
    decode = pipeline.family.codec.decode
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline.family.codec, "decode", lambda grid: (seen.append(grid), decode(grid))[1])
        list(pipeline.generate([request], config))
    return seen[0][0].flatten().tolist()


def test_a_picture_is_the_same_bits_in_any_company(pipeline: TokenPipeline) -> None:
    requests = [ImageRequest(prompt, seed) for prompt in ("a red circle", "a blue square") for seed in range(4)]
    expected = pictures(pipeline, requests, GUIDED)
    assert len({picture.numpy().tobytes() for picture in expected}) == 8
    for size in (1, 3):
        batches = itertools.batched(requests, size) if hasattr(itertools, "batched") else [requests[:size]]
        found = [picture for batch in batches for picture in pictures(pipeline, list(batch), GUIDED)]
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=False))


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_greedy_codes_are_those_of_transformers(pipeline: TokenPipeline, folder: Path, scale: float) -> None:
    tokens, theirs = pipeline.family.tokens, transformers.AutoModelForCausalLM.from_pretrained(folder / "transformer")
    prompt, empty = pipeline.family.prompt_tokens(["a red circle", ""], pytest.fail)
    begin = torch.tensor([tokens.begin_id])
    inputs, negative = torch.cat([prompt, begin])[None], torch.cat([empty, begin])[None]
    image_ids = list(range(tokens.image_token_offset, tokens.begin_id))
    expected = theirs.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=tokens.num_places,
        do_sample=False,
        eos_token_id=None,
        prefix_allowed_tokens_fn=lambda _, ids: image_ids,
        **({} if scale == 1.0 else {"guidance_scale": scale, "negative_prompt_ids": negative}),
    )[0, -tokens.num_places :]
    config = GUIDED.model_copy(
        update={"temperature": 0.0, "guidance": GUIDED.guidance.model_copy(update={"scale": scale})}
    )
    found = codes(pipeline, ImageRequest("a red circle", 0), config)
    assert found == (expected - tokens.image_token_offset).tolist()


def test_guidance_0_is_the_unconditional_model(pipeline: TokenPipeline) -> None:
    config = SamplingConfig(guidance=0.0)
    ours, other = (codes(pipeline, ImageRequest(prompt, 1), config) for prompt in ("a red circle", "a blue square"))
    assert ours == other == codes(pipeline, ImageRequest("", 1), SamplingConfig(guidance=1.0))


def test_tokens_have_their_probabilities() -> None:
    logits = torch.tensor([0.5, 0.25, 1e-30, 0.25]).log()
    uniform = (torch.arange(1000) + 0.5) / 1000
    found = chosen_tokens(logits.expand(1000, 4), uniform, SamplingConfig()).bincount(minlength=4)
    assert found.tolist() == [500, 250, 0, 250]
    sharper = chosen_tokens(logits.expand(1000, 4), uniform, SamplingConfig(temperature=0.5)).bincount(minlength=4)
    assert sharper.tolist() == [667, 166, 0, 167]
    top = chosen_tokens(logits.expand(1000, 4), uniform, SamplingConfig(top_k=1)).bincount(minlength=4)
    assert top.tolist() == [1000, 0, 0, 0]


def test_the_nucleus_is_the_smallest_set_with_the_probability() -> None:
    probabilities = torch.tensor([[0.1, 0.5, 0.15, 0.25]])
    assert nucleus(probabilities, 0.5).tolist() == [pytest.approx([0, 0.5, 0, 0])]
    assert nucleus(probabilities, 0.6).tolist() == [pytest.approx([0, 0.5, 0, 0.25])]
    assert nucleus(probabilities, 0.8).tolist() == [pytest.approx([0, 0.5, 0.15, 0.25])]


def test_a_number_below_one_never_chooses_an_impossible_token() -> None:
    logits = torch.full((1, 1000), -1e30)
    logits[0, 7] = 0.0
    for uniform in (2.0**-25, 1.0 - 2.0**-24):
        assert chosen_tokens(logits, torch.tensor([uniform]), SamplingConfig()).tolist() == [7]


def test_random_numbers_are_of_the_seed_and_the_place_alone() -> None:
    requests = requests_for(["a"], SamplingConfig(images_per_prompt=3))
    together = token_noise(requests, 16, torch.device("cpu"))
    assert torch.equal(together[2:], token_noise(requests[2:], 16, torch.device("cpu")))
    assert torch.equal(together[:, :8], token_noise(requests, 8, torch.device("cpu")))
    assert together.unique().numel() == 48


@pytest.mark.parametrize("kept", ["upper", "left"])
def test_a_picture_is_completed(pipeline: TokenPipeline, tmp_path: Path, kept: str) -> None:
    picture = torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    half = picture[:, :4] if kept == "upper" else picture[:, :, :4]
    save_image(tmp_path / "half.png", half)
    extend = (0, 0, 0, 4) if kept == "upper" else (0, 0, 4, 0)
    edit = open_edit_input(EditConfig(image=str(tmp_path / "half.png"), extend=extend), 2, None)
    seen: list[Tensor] = []
    decode = pipeline.family.codec.decode
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline.family.codec, "decode", lambda grid: (seen.append(grid), decode(grid))[1])
        requests = requests_for(["a red circle"], SamplingConfig(images_per_prompt=2))
        first, second = pictures(pipeline, requests, GUIDED, edit_input=edit)
    given = pipeline.family.codec.encode(edit.pixels[None].float() / 127.5 - 1)
    rows, columns = (slice(0, 2), slice(None)) if kept == "upper" else (slice(None), slice(0, 2))
    for grid, pixels in zip(seen[0], (first, second), strict=False):
        assert torch.equal(grid[0, rows, columns], given[0, 0, rows, columns])
        assert torch.equal(pixels[:, : half.shape[1], : half.shape[2]], half)
    assert not torch.equal(first, second)


def test_the_best_candidate_by_a_clip_is_kept(pipeline: TokenPipeline, tmp_path: Path) -> None:
    save_random_clip(tmp_path / "clip", tiny_tokenizer())
    best = {"scale": 3.0, "best_of": {"candidates": 4, "clip": str(tmp_path / "clip")}}
    config = SamplingConfig.from_mapping({"guidance": best})
    request = ImageRequest("a red circle", 5)
    plain = pictures(pipeline, candidates(request, 4), GUIDED)

    def brightness(self: CLIPModel, images: Tensor) -> Tensor:
        level = images.mean((1, 2, 3))
        return torch.stack([level, torch.ones_like(level)], 1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CLIPModel, "get_image_features", brightness)
        patch.setattr(CLIPModel, "get_text_features", lambda self, ids: torch.tensor([[1.0, 0.0]]).expand(len(ids), 2))
        [found] = pipeline.generate([request], config)
    assert (found.index, found.request) == (0, request)
    brightest = max(plain, key=lambda picture: picture.float().mean())
    assert torch.equal(found.pixels, brightest)
    assert torch.equal(plain[0], pictures(pipeline, [request], GUIDED)[0]), "the first candidate is the plain picture"


MEANINGLESS: list[dict[str, Any]] = [
    {"steps": 20},
    {"sampler": "ddim"},
    {"eta": 0.5},
    {"clip_skip": 2},
    {"long_prompts": True},
    {"timestep_spacing": "karras"},
    {"guidance": {"rescale": 0.5}},
    {"guidance": {"interval": [0.1, 1.0]}},
    {"guidance": {"perturb": {}}},
]


@pytest.mark.parametrize("settings", MEANINGLESS, ids=str)
def test_settings_without_meaning_are_refused(pipeline: TokenPipeline, settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"has no meaning for this model.*") as refused:
        list(pipeline.generate([ImageRequest("a", 0)], SamplingConfig.from_mapping(settings)))
    assert "temperature, top_k, top_p" in str(refused.value)


REFUSED: list[tuple[Callable[[TokenPipeline], Any], str]] = [
    (lambda p: p.generate([ImageRequest("a", 0)], SamplingConfig(width=16)), "size 16x8 is not possible"),
    (lambda p: p.generate([ImageRequest("a", 0)], GUIDED, torch.zeros(1, 1, 4, 4)), "--latents"),
    (lambda p: p.generate([ImageRequest("a (b:1.5)", 0)], GUIDED, options=SampleOptions(weighted=True)), "a weight"),
    (lambda p: p.generate([ImageRequest("a", 0)], GUIDED, options=SampleOptions(window=4)), "--tile"),
    (lambda p: p.generate([ImageRequest("a", 0)], GUIDED, options=SampleOptions(preview_every=4)), "--preview-every"),
    (
        lambda p: p.generate([ImageRequest("a", 0, Blend(prompt="b", seed=1, weight=0.5))], GUIDED),
        "--variation, --interpolate or blend",
    ),
]


@pytest.mark.parametrize(("generate", "message"), REFUSED)
def test_work_without_meaning_is_refused(pipeline: TokenPipeline, generate: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        list(generate(pipeline))


def test_a_picture_without_a_mask_is_refused(pipeline: TokenPipeline, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "p.png")
    edit = open_edit_input(EditConfig(image=str(tmp_path / "p.png")), 2, None)
    with pytest.raises(UsageError, match=r"completes pictures.*add --mask or --extend"):
        pictures(pipeline, [ImageRequest("a", 0)], GUIDED, edit_input=edit)


def test_a_picture_that_is_not_finite_is_named(folder: Path) -> None:
    pipeline = tiny_token_pipeline(folder)
    with torch.no_grad():
        pipeline.family.transformer.model.norm.weight.fill_(torch.nan)
    with pytest.raises(DivergedError, match="the Transformer gives values that are not finite"):
        pictures(pipeline, [ImageRequest("a", 0)], GUIDED)


def test_a_prompt_that_is_cut_is_named(pipeline: TokenPipeline) -> None:
    warnings: list[str] = []
    ids = pipeline.family.prompt_tokens(["a red circle " * 9], warnings.append)
    assert ids.shape == (1, 12)
    assert "has more than 10 tokens" in warnings[0]


def test_another_vq_model_is_refused(tmp_path: Path) -> None:
    save_tiny_model(tmp_path)
    assert outline_family(tmp_path).keys() == {"transformer", "vq"}
    save_tiny_vq(tmp_path / "vq", seed=1)
    for read in (open_family, outline_family):
        with pytest.raises(CheckpointError, match=r"do not fit.*vq_sha256"):
            read(tmp_path)


def test_an_ordinary_language_model_is_refused(tmp_path: Path) -> None:
    save_tiny_model(tmp_path)
    config = tmp_path / "transformer/config.json"
    config.write_text(config.read_text().replace('"ldm"', '"_ldm"'))
    with pytest.raises(CheckpointError, match="has no field 'ldm'"):
        open_family(tmp_path)


def test_half_precision_keeps_the_codec_exact(folder: Path) -> None:
    family = open_family(folder, precision="bf16")
    assert isinstance(family, Autoregressive)
    pipeline = TokenPipeline(family)
    assert pipeline.family.transformer.head_weight.dtype == torch.bfloat16
    assert next(pipeline.family.codec.parameters()).dtype == torch.float32
    assert len(pictures(pipeline, [ImageRequest("a red circle", 0)], GUIDED)) == 1
