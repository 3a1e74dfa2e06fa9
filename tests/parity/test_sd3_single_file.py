"""Stable Diffusion 3 in a single file against diffusers: the same tensors and the same pictures, both ways."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm_cli.errors import InputNotFoundError, UsageError
from ldm_cli.families.open_family import open_family
from ldm_cli.formats.json_file import read_json
from ldm_cli.formats.model_source import load_tensors, weights_sha256
from ldm_cli.reporting import SilentReporter
from ldm_cli.stages import convert
from ldm_cli.stages.convert import ConvertOptions
from tests.parity import original_names
from tests.parity.sd3_pipeline import their_sd3_folder
from tests.parity.test_sd3 import ours, theirs
from tests.parity.test_xl import assert_alike

diffusers = pytest.importorskip("diffusers")

run = partial(convert.run, reporter=SilentReporter())
PARTS = ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")
SIZE = {"width": 16, "height": 16}


def opened(folder: Path, file: Path | None = None) -> Any:
    """A folder, or a single file with the configurations of the folder, in diffusers."""
    has_t5 = (folder / "text_encoder_3").is_dir()
    absent = {} if has_t5 else {"text_encoder_3": None, "tokenizer_3": None}
    kind = diffusers.StableDiffusion3Pipeline
    if file is None:
        return kind.from_pretrained(folder, **absent)
    return kind.from_single_file(str(file), config=str(folder), local_files_only=True, **absent)


def states(pipeline: Any) -> dict[str, dict[str, Tensor]]:
    """The tensors of each model of a pipeline."""
    return {name: model.state_dict() for name in PARTS if (model := getattr(pipeline, name)) is not None}


def expect_same_tensors(found: Any, expected: Any) -> None:
    assert set(found) == set(expected)
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


def with_tokenizers(folder: Path, file: Path, *further: str) -> Path:
    """The file, with what it does not hold in a folder beside it."""
    for name in ("tokenizer", "tokenizer_2", "tokenizer_3", *further):
        if (folder / name).is_dir():
            shutil.copytree(folder / name, file.with_suffix("") / name)
    return file


@pytest.mark.parametrize(("seed", "has_t5"), [(0, False), (1, True)])
def test_folder_to_file_to_folder_keeps_each_tensor_and_the_file_opens_in_diffusers(
    tmp_path: Path, seed: int, has_t5: bool
) -> None:
    folder = their_sd3_folder(tmp_path, seed, has_t5=has_t5, is_like_published=True)
    pipeline = opened(folder)
    result = run(folder, tmp_path / "ours.safetensors", ConvertOptions())
    assert "diffusers StableDiffusion3Pipeline.from_single_file, with config=FOLDER" in result["opens_in"]
    bare = original_names.write_sd3(pipeline, tmp_path / "bare.safetensors")
    expect_same_tensors(load_file(tmp_path / "ours.safetensors"), load_file(bare))
    theirs = states(opened(folder, tmp_path / "ours.safetensors"))
    for name, expected in states(pipeline).items():
        expect_same_tensors(theirs[name], expected)
    # The one knows its configurations, the other is known by its shapes.
    for file in (tmp_path / "ours.safetensors", bare):
        back = tmp_path / f"from-{file.stem}"
        run(file, back, ConvertOptions(tokenizer=folder))
        for name in states(pipeline):
            expect_same_tensors(load_tensors(back / name), load_tensors(folder / name))
            assert weights_sha256(back / name) == weights_sha256(file / name)
        index, expected = read_json(back / "model_index.json"), read_json(folder / "model_index.json")
        for name in PARTS:
            assert index[name] == expected.get(name, [None, None])
        assert opened(back).tokenizer("a red circle") == pipeline.tokenizer("a red circle")
        assert torch.equal(ours(back, **SIZE), ours(folder, **SIZE))


@pytest.mark.parametrize(("seed", "has_t5"), [(0, False), (1, True)])
def test_a_file_without_configurations_is_sampled_as_diffusers_samples_the_folder(
    tmp_path: Path, seed: int, has_t5: bool
) -> None:
    folder = their_sd3_folder(tmp_path, seed, has_t5=has_t5, is_like_published=True)
    file = original_names.write_sd3(opened(folder), tmp_path / "bare.safetensors")
    assert_alike(ours(with_tokenizers(folder, file), **SIZE), theirs(folder))


@pytest.mark.parametrize("has_t5", [True, pytest.param(False, marks=pytest.mark.exhaustive)])
def test_encoders_that_the_file_does_not_hold_are_read_from_folders_beside_it(tmp_path: Path, has_t5: bool) -> None:
    folder = their_sd3_folder(tmp_path, has_t5=has_t5, is_like_published=True)
    file = original_names.write_sd3(opened(folder), tmp_path / "bare.safetensors", has_encoders=False)
    with pytest.raises(InputNotFoundError, match=r"text_encoder.*the file holds transformer, vae.*put the folder"):
        open_family(with_tokenizers(folder, file))
    again = tmp_path / "again.safetensors"
    file = with_tokenizers(folder, file.rename(again), "text_encoder", "text_encoder_2", "text_encoder_3")
    assert torch.equal(ours(file, **SIZE), ours(folder, **SIZE))
    run(file, tmp_path / "back", ConvertOptions())
    assert torch.equal(ours(tmp_path / "back", **SIZE), ours(folder, **SIZE))
    run(file, tmp_path / "half.safetensors", ConvertOptions(dtype="bf16"))
    assert not any(name.startswith("text_encoders") for name in load_file(tmp_path / "half.safetensors"))


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.exhaustive)])
def test_the_projection_of_the_first_tower_becomes_part_of_the_transformer(tmp_path: Path, seed: int) -> None:
    """diffusers takes the identity in its place, whatever the file holds: the file needs the projection elsewhere."""
    folder = their_sd3_folder(tmp_path, seed)
    projection = load_tensors(folder / "text_encoder")["text_projection.weight"]
    assert projection.shape[0] != projection.shape[1]
    file = tmp_path / "ours.safetensors"
    run(folder, file, ConvertOptions())
    found = load_file(file)["text_encoders.clip_l.transformer.text_projection.weight"]
    assert torch.equal(found, torch.eye(projection.shape[1]))
    assert_alike(ours(with_tokenizers(folder, file)), ours(folder))
    run(file, tmp_path / "back", ConvertOptions(tokenizer=folder))
    assert_alike(theirs(tmp_path / "back"), theirs(folder))
    run(tmp_path / "back", tmp_path / "again.safetensors", ConvertOptions())
    expect_same_tensors(load_file(tmp_path / "again.safetensors"), load_file(file))


def test_one_model_of_a_file_and_a_model_by_itself_go_both_ways(tmp_path: Path) -> None:
    folder = their_sd3_folder(tmp_path, is_like_published=True)
    run(folder, tmp_path / "whole.safetensors", ConvertOptions())
    for name in PARTS:
        alone, back = tmp_path / f"{name}.safetensors", tmp_path / name
        run(tmp_path / "whole.safetensors" / name, alone, ConvertOptions())
        run(alone, back, ConvertOptions())
        expect_same_tensors(load_tensors(back), load_tensors(folder / name))


def test_a_prediction_is_not_chosen_for_a_flow(tmp_path: Path) -> None:
    folder = their_sd3_folder(tmp_path)
    with pytest.raises(UsageError, match="--prediction-type is for whole pipelines with a U-Net"):
        run(folder, tmp_path / "x.safetensors", ConvertOptions(prediction_type="epsilon"))


def test_marks_that_other_programs_leave_are_no_foreign_tensors(tmp_path: Path) -> None:
    folder = their_sd3_folder(tmp_path, is_like_published=True)
    file = original_names.write_sd3(opened(folder), tmp_path / "bare.safetensors")
    expected = ours(with_tokenizers(folder, file), **SIZE)
    marks = {f"text_encoders.{name}.logit_scale": torch.ones(()) for name in ("clip_l", "clip_g", "t5xxl")}
    # Programs do not multiply by the projection of the first tower, and some files do not hold it.
    tensors = load_file(file)
    del tensors["text_encoders.clip_l.transformer.text_projection.weight"]
    save_file(tensors | marks, tmp_path / "marked.safetensors")
    assert torch.equal(ours(with_tokenizers(folder, tmp_path / "marked.safetensors"), **SIZE), expected)
