"""Embeddings of textual inversion against diffusers: the files it reads, and the states of prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ldm_cli.errors import CheckpointError, InputNotFoundError, UsageError
from ldm_cli.families.open_family import open_family
from ldm_cli.families.prompt_chunks import PromptReading
from ldm_cli.families.text_inversion import add_words
from ldm_cli.formats.embedding_file import read_embeddings, words_beside
from ldm_cli.formats.png_metadata import read_provenance
from ldm_cli.pictures.images import read_image
from tests.parity.their_pipeline import scheduler, their_folder
from tests.parity.xl_pipeline import their_xl_folder
from tests.stages.test_sample import draw, repeat

diffusers = pytest.importorskip("diffusers")

PROMPTS = ["a red <Cat> circle", "<cat>", "a blue square, <cat>, <cat> left", "a red circle"]


def vectors(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) / 4


def their_states(pipeline: Any, prompt: str) -> torch.Tensor:
    return pipeline.encode_prompt(prompt, "cpu", 1, False)[0]


def our_states(encoder: Any, prompt: str) -> Any:
    return encoder.encode_prompts([prompt], PromptReading(), num_chunks=1, warn=lambda _: None)


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ({"<cat>": vectors(24)}, None),
        ({"<cat>": vectors(4, 24)}, None),
        ({"emb_params": vectors(3, 24)}, "<cat>"),
        ({"emb_params": vectors(3, 24).half()}, "<cat>"),
    ],
)
def test_states_are_those_of_diffusers(content: dict[str, torch.Tensor], word: str | None, tmp_path: Path) -> None:
    folder, file = their_folder(tmp_path, scheduler("ddim")), tmp_path / "cat.safetensors"
    save_file(content, file)
    encoder = open_family(folder).encoder
    before = our_states(encoder, PROMPTS[-1]).tokens
    add_words(encoder, read_embeddings(file, word))
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.load_textual_inversion(str(file), token="<cat>")
    for prompt in PROMPTS:
        expected = their_states(pipeline, prompt.lower())
        torch.testing.assert_close(our_states(encoder, prompt).tokens, expected, atol=1e-5, rtol=0)
    assert torch.equal(our_states(encoder, PROMPTS[-1]).tokens, before)


def test_both_towers_of_xl_get_theirs_and_pool_at_the_end(tmp_path: Path) -> None:
    folder, file = their_xl_folder(tmp_path, seed=1), tmp_path / "cat.safetensors"
    encoder: Any = open_family(folder).encoder
    widths = encoder.first.width, encoder.second.width
    assert widths[0] != widths[1]
    content = {"clip_l": vectors(2, widths[0]), "clip_g": vectors(2, widths[1], seed=1)}
    save_file(content, file)
    add_words(encoder, read_embeddings(file, "<cat>"))
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    for name, number in (("clip_l", ""), ("clip_g", "_2")):
        tower, tokenizer = getattr(pipeline, f"text_encoder{number}"), getattr(pipeline, f"tokenizer{number}")
        pipeline.load_textual_inversion(content[name], token="<cat>", text_encoder=tower, tokenizer=tokenizer)
    for prompt in PROMPTS:
        states, _, pooled, _ = pipeline.encode_prompt(prompt.lower(), device="cpu", do_classifier_free_guidance=False)
        found = our_states(encoder, prompt)
        torch.testing.assert_close(found.tokens, states, atol=1e-5, rtol=0)
        torch.testing.assert_close(found.pooled, pooled, atol=1e-5, rtol=0)


def test_files_that_are_no_embedding_are_named(tmp_path: Path) -> None:
    encoder = open_family(their_folder(tmp_path, scheduler("ddim"))).encoder
    with pytest.raises(InputNotFoundError, match="check --embedding"):
        read_embeddings(tmp_path / "none.safetensors", None)
    torch.save({"string_to_param": {"*": vectors(2, 24)}}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="it is a pickle"):
        read_embeddings(tmp_path / "a.pt", None)
    for content in ({"a": vectors(2, 24), "b": vectors(2, 24)}, {"a": vectors(2, 2, 2)}):
        save_file(content, tmp_path / "b.safetensors")
        with pytest.raises(CheckpointError, match="is no embedding: it holds a"):
            read_embeddings(tmp_path / "b.safetensors", None)
    save_file({"emb_params": vectors(2, 10)}, tmp_path / "c.safetensors")
    (other,) = read_embeddings(tmp_path / "c.safetensors", None)
    assert other.word == "c"
    with pytest.raises(CheckpointError, match=r"'c' does not fit the model: its vectors have 10 numbers, .* 24"):
        add_words(encoder, [other])
    with pytest.raises(UsageError, match="two embeddings are called 'c'"):
        add_words(encoder, [other, other])


def test_a_job_has_its_words_records_and_repeats_them(tmp_path: Path) -> None:
    folder, file = their_folder(tmp_path, scheduler("ddim")), tmp_path / "cat.safetensors"
    save_file({"emb_params": vectors(3, 24)}, file)
    result = draw(folder, tmp_path / "out", prompts=["a <cat>"], embeddings=[{"path": str(file), "word": "<cat>"}])
    plain = draw(folder, tmp_path / "plain", prompts=["a <cat>"])
    picture = Path(result["images"][0]["file"])
    assert not torch.equal(read_image(picture), read_image(Path(plain["images"][0]["file"])))
    assert list(read_provenance(picture)["embedding_sha256"]) == ["<cat>"]
    again, _ = repeat(picture, tmp_path / "again")
    assert Path(again).read_bytes() == picture.read_bytes()
    save_file({"emb_params": vectors(3, 24, seed=5)}, file)
    with pytest.raises(CheckpointError, match="the embedding '<cat>' has changed since"):
        repeat(picture, tmp_path / "changed")


def test_words_beside_adapters_are_read_as_embeddings(tmp_path: Path) -> None:
    file = tmp_path / "style.safetensors"
    words = {"<s1>": torch.randn(6), "<s2>": torch.randn(6)}
    adapter = {"unet:0:down": torch.randn(1, 4), "unet:0:up": torch.randn(4, 1)}
    save_file({**words, **adapter}, file, dict.fromkeys(words, "<embed>"))
    found = read_embeddings(file, None)
    assert [(one.word, one.vectors[0].tolist()) for one in found] == [(n, [v.tolist()]) for n, v in words.items()]
    with pytest.raises(CheckpointError, match="it holds the words <s1>, <s2>"):
        read_embeddings(file, "style")
    assert words_beside(load_file(file), file) == ["<s1>", "<s2>"]  # what readers of adapters pass over
