"""Which files of a model on the hub are downloaded."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from ldm_cli.errors import CheckpointError, InputNotFoundError, LdmError
from ldm_cli.formats.hub_files import components_of, files_of

INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "requires_safety_checker": False,
    "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
    "feature_extractor": ["transformers", "CLIPImageProcessor"],
    "image_encoder": [None, None],
    "scheduler": ["diffusers", "PNDMScheduler"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
}
TEXTS = ["model_index.json", "scheduler/scheduler_config.json", "tokenizer/vocab.json", "tokenizer/merges.txt"]
MODEL = "diffusion_pytorch_model"


def chosen(names: Sequence[str], components: Sequence[str], variant: str | None = None) -> set[str]:
    """The files of a list, which holds each once."""
    found = files_of(names, components, variant, "org/name", lambda line: None)
    assert len(found) == len(set(found))
    return set(found)


def weights_in(stem: str, variant: str, layout: str) -> list[str]:
    """Files of one precision, in a layout that some version of diffusers or transformers writes."""
    infix = f".{variant}" if variant else ""
    shards = [f"-0000{i}-of-00002" for i in (1, 2)]
    if layout == "whole":
        return [f"{stem}{infix}.safetensors"]
    if layout == "sharded":
        index = f"{stem}.safetensors.index{infix}.json"
        return [*(f"{stem}{infix}{shard}.safetensors" for shard in shards), index]
    return [*(f"{stem}{shard}{infix}.safetensors" for shard in shards), f"{stem}.safetensors{infix}.index.json"]


def test_components_are_those_of_the_index_that_are_read() -> None:
    assert components_of(INDEX, (), "org/name") == ["scheduler", "tokenizer", "unet"]
    assert components_of(INDEX, ("unet",), "org/name") == ["unet"]
    with pytest.raises(InputNotFoundError, match="'org/name' has no component 'vae': it has safety_checker"):
        components_of(INDEX, ("vae",), "org/name")


def test_texts_are_taken_whole_and_nothing_that_is_in_deeper_folders_or_is_a_program() -> None:
    unet = ["unet/config.json", f"unet/{MODEL}.safetensors"]
    others = ["unet/modeling.py", "unet/onnx/config.json", "tokenizer/tokenizer.pkl", "vae/config.json", "README.md"]
    assert chosen([*TEXTS, *unet, *others], ["scheduler", "tokenizer", "unet"]) == {*TEXTS, *unet}


def test_a_model_by_itself_is_in_the_root_and_its_tokenizer_needs_no_weights() -> None:
    root = ["config.json", "vocab.json", "merges.txt", "preprocessor_config.json"]
    names = [*root, "model.safetensors", "pytorch_model.bin", "flax_model.msgpack", "v1-5-pruned.safetensors"]
    assert chosen(names, [""]) == {*root, "model.safetensors"}
    assert chosen(names, ["tokenizer"]) == set(root)


def test_of_a_whole_file_and_shards_the_one_that_folders_are_read_from_is_taken() -> None:
    """As `weight_files` does: of diffusers the shards, of transformers the whole file."""
    for stem, layout in ((MODEL, "sharded"), ("model", "whole")):
        names = ["config.json", *weights_in(stem, "", "whole"), *weights_in(stem, "", "sharded")]
        assert chosen(names, [""]) == {"config.json", *weights_in(stem, "", layout)}


def test_another_precision_is_taken_and_said_where_the_wanted_one_is_missing() -> None:
    said: list[str] = []
    names = ["model_index.json", "vae/config.json", f"vae/{MODEL}.safetensors"]
    names += ["unet/config.json", f"unet/{MODEL}.fp16.safetensors"]
    assert set(files_of(names, ["unet", "vae"], None, "org/name", said.append)) == set(names)
    assert said == ["'org/name' has unet in fp16 only"]
    assert set(files_of(names, ["unet", "vae"], "fp16", "org/name", said.append)) == set(names)
    assert said[1:] == ["'org/name' has vae in full precision only"]


@pytest.mark.parametrize(
    ("names", "component", "variant", "kind", "words"),
    [
        (["config.json", "model.safetensors"], "", "fp16", InputNotFoundError, "no weights of the variant 'fp16'"),
        (["config.json", "pytorch_model.bin"], "", None, CheckpointError, "'pytorch_model.bin' is a pickle"),
        (["config.json"], "", None, InputNotFoundError, "no weights in 'org/name'"),
        (["model_index.json", "unet/config.json"], "unet", None, InputNotFoundError, "no weights in 'org/name/unet'"),
        (["model_index.json"], "unet", None, InputNotFoundError, "'org/name' has no files of 'unet'"),
        (["sd.safetensors"], "", None, InputNotFoundError, "neither model_index.json nor config.json"),
    ],
)
def test_what_cannot_be_chosen_is_one_clear_line(
    names: list[str], component: str, variant: str | None, kind: type[LdmError], words: str
) -> None:
    with pytest.raises(kind, match=words):
        chosen(names, [component], variant)
