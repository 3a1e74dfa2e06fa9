"""`ldm clip` against transformers with the same weights, in its layout and in that of open_clip."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from ldm_cli.errors import CheckpointError
from ldm_cli.formats.embedding_files import open_embeddings
from ldm_cli.formats.hub_files import files_of
from ldm_cli.reporting import SilentReporter
from ldm_cli.stages import clip_answers, clip_embed, clip_search
from ldm_cli.stages.support.clip_inputs import ClipOptions
from tests.parity import original_names
from tests.sampling.test_guidance_models import tiny_clip_folder

transformers = pytest.importorskip("transformers")
theirs = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")

MEAN, STD = [0.1, 0.5, 0.7], [0.2, 0.5, 0.9]
NAMES = ["circle", "square", "ring"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP in `transformers` and in `open_clip`, whose pictures are not normalised as usual; 30 `pictures`."""
    home = tmp_path_factory.mktemp("clip")
    (home / "transformers").mkdir()
    folder = tiny_clip_folder(home / "transformers")
    prepared = {"size": 8, "crop_size": 8, "image_mean": MEAN, "image_std": STD}
    (folder / "preprocessor_config.json").write_text(json.dumps(prepared))
    config = json.loads((folder / "config.json").read_text())
    vision, text = config["vision_config"], config["text_config"]
    shutil.copytree(
        folder, home / "open_clip", ignore=lambda *_: ["model.safetensors", "config.json", "preprocessor_config.json"]
    )
    renamed = original_names.open_clip(load_file(folder / "model.safetensors"))
    save_file(
        {name: tensor.contiguous() for name, tensor in renamed.items()}, home / "open_clip/open_clip_model.safetensors"
    )
    model = {
        "embed_dim": config["projection_dim"],
        "quick_gelu": vision["hidden_act"] == "quick_gelu",
        "vision_cfg": {
            "image_size": 8, "layers": 1, "width": vision["hidden_size"], "patch_size": vision["patch_size"],
            "head_width": vision["hidden_size"] // vision["num_attention_heads"],
        },
        "text_cfg": {
            "context_length": text["max_position_embeddings"], "vocab_size": text["vocab_size"],
            "width": text["hidden_size"], "heads": text["num_attention_heads"], "layers": text["num_hidden_layers"],
        },
    }  # fmt: skip
    content = {"model_cfg": model, "preprocess_cfg": {"mean": MEAN, "std": STD}}
    (home / "open_clip/open_clip_config.json").write_text(json.dumps(content))
    (home / "pictures").mkdir()
    generator = np.random.default_rng(0)
    for i in range(30):
        pixels = generator.integers(0, 256, (8 + (i % 3 == 0) * 4, 8 + (i % 3 == 1) * 5, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(home / "pictures" / f"{i:02d}.png")
    return home


def their_features(home: Path, texts: list[str]) -> tuple[Tensor, Tensor, float]:
    folder = home / "transformers"
    model = transformers.CLIPModel.from_pretrained(folder)
    process = theirs.CLIPImageProcessorPil.from_pretrained(folder)
    tokens = transformers.CLIPTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
    pictures = [Image.open(file) for file in sorted((home / "pictures").iterdir())]
    pixels = torch.cat([process(picture, return_tensors="pt")["pixel_values"] for picture in pictures])
    with torch.no_grad():
        found = [model.get_image_features(pixels), model.get_text_features(**tokens)]
    images, words = (F.normalize(getattr(one, "pooler_output", one), dim=-1) for one in found)
    return images, words, float(model.logit_scale.exp())


def options(home: Path, layout: str) -> ClipOptions:
    return ClipOptions(str(home / layout), "cpu", 7)


LAYOUTS = ("transformers", "open_clip", "open_clip/open_clip_model.safetensors")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_embeddings_and_the_ten_nearest_pictures_are_those_of_transformers(
    layout: str, home: Path, tmp_path: Path
) -> None:
    texts = ["a red circle", "the blue square!"]
    images, words, _ = their_features(home, texts)
    chosen, silent = options(home, layout), SilentReporter()
    clip_embed.run([str(home / "pictures")], None, tmp_path / "p.npy", chosen, silent)
    assert (open_embeddings(tmp_path / "p.npy").vectors - images).abs().max() < 1e-5
    clip_embed.run([], "\n".join(texts).replace("\n", ","), tmp_path / "t.safetensors", chosen, silent)
    assert (open_embeddings(tmp_path / "t.safetensors").vectors - words).abs().max() < 1e-5
    found = clip_search.run([str(tmp_path / "p.npy")], clip_search.Wanted(texts), chosen, silent)
    for query, row in zip(found["queries"], words @ images.T, strict=True):
        assert [entry["row"] for entry in query["results"]] == row.argsort(descending=True)[:10].tolist()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_probabilities_are_those_of_transformers(layout: str, home: Path) -> None:
    images, words, scale = their_features(home, [f"a {name}" for name in NAMES])
    expected = (scale * images @ words.T).softmax(1)
    result = clip_answers.classify(
        [str(home / "pictures")], ",".join(NAMES), "a {}", 3, options(home, layout), SilentReporter()
    )
    for picture, row in zip(result["pictures"], expected, strict=True):
        found = {entry["label"]: entry["probability"] for entry in picture["results"]}
        assert [found[name] for name in NAMES] == pytest.approx(row.tolist(), abs=1e-5)


@pytest.mark.parametrize(
    ("place", "change"),
    [
        ("vision_cfg", {"timm_model_name": "vit_base"}),
        ("vision_cfg", {"layers": [3, 4, 6, 3]}),
        ("text_cfg", {"hf_model_name": "roberta-base"}),
        ("text_cfg", {"no_causal_mask": True}),
        ("preprocess_cfg", {"resize_mode": "longest"}),
    ],
)
def test_models_of_open_clip_that_are_none_of_ours_are_refused(
    place: str, change: dict[str, Any], home: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(home / "open_clip", tmp_path / "other")
    content = json.loads((folder / "open_clip_config.json").read_text())
    section = content["model_cfg"] if place in content["model_cfg"] else content
    section[place] |= change
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=f"open_clip_config.json.*{next(iter(change))}"):
        clip_embed.run([], "a", tmp_path / "a.npy", ClipOptions(str(folder), "cpu"), SilentReporter())


def test_the_weights_of_open_clip_are_fetched_from_the_hub() -> None:
    names = [
        "open_clip_config.json",
        "open_clip_model.safetensors",
        "open_clip_pytorch_model.bin",
        "vocab.json",
        "a.md",
    ]
    assert set(files_of(names, [""], None, "org/name", print)) == {*names[:2], "vocab.json"}
