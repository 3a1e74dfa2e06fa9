"""Long prompts in chunks, and the layer of the text tower: the rule by hand, the states by transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ldm_cli.core.models.clip import CLIPTextModel, CLIPTextModelWithProjection
from ldm_cli.core.models.clip_config import CLIPTextConfig
from ldm_cli.errors import UsageError
from ldm_cli.families.clip_pair_encoder import CLIPPairEncoder
from ldm_cli.families.clip_text_encoder import CLIPTextEncoder
from ldm_cli.families.prompt_chunks import PromptReading, Token, divided
from tests.sampling.tiny import TEXT, randomize, special_ids, tiny_tokenizer

transformers = pytest.importorskip("transformers")

COMMA, LENGTH, LAYERS = 0, 12, 3
LONG = PromptReading(long=True)


@pytest.mark.parametrize(
    ("ids", "chunks"),
    [
        ([], [[]]),
        ([1, 2, 3, 4, 5], [[1, 2, 3, 4, 5]]),
        ([1, 2, 3, 4, 5, 6, 7], [[1, 2, 3, 4, 5], [6, 7]]),
        ([1, 2, COMMA, 3, 4, 5, 6], [[1, 2, COMMA], [3, 4, 5, 6]]),
        ([1, 2, 3, 4, COMMA, 5], [[1, 2, 3, 4, COMMA], [5]]),
        ([1, 2, 3, 4, 5, COMMA, 6], [[1, 2, 3, 4, 5], [COMMA, 6]]),
        ([1, COMMA, 2, 3, 4, COMMA, 5], [[1, COMMA, 2, 3, 4], [COMMA, 5]]),
        ([1, COMMA, 2, COMMA, 3, 4], [[1, COMMA, 2, COMMA], [3, 4]]),
        ([1, COMMA, 2, 3, 4, 5, 6, 7, 8], [[1, COMMA], [2, 3, 4, 5, 6], [7, 8]]),
        ([1, None, 2], [[1], [2]]),
        ([None, 1], [[], [1]]),
        ([1, None], [[1]]),
        ([1, None, None, 2], [[1], [], [2]]),
        ([1, COMMA, None, 2, 3, 4, 5, 6, 7], [[1, COMMA], [2, 3, 4, 5, 6], [7]]),
    ],
)
def test_a_full_chunk_ends_after_its_last_comma_and_a_break_ends_any(
    ids: Sequence[int | None], chunks: list[list[int]]
) -> None:
    tokens = [None if token is None else Token(token, 1.0, 0) for token in ids]
    assert [[token.id for token in chunk] for chunk in divided(tokens, 5, COMMA)] == chunks


@pytest.mark.parametrize(("place", "is_moved"), [(54, False), (55, True)])
def test_a_comma_counts_among_the_last_twenty_of_75_tokens(place: int, is_moved: bool) -> None:
    tokens = [Token(COMMA if i == place else 1, 1.0, i) for i in range(80)]
    first, second = divided(tokens, 75, COMMA)
    assert (len(first), len(second)) == ((place + 1, 79 - place) if is_moved else (75, 5))


def encoder(kind: type[CLIPTextModel], seed: int, *, is_penultimate: bool = False) -> CLIPTextEncoder:
    tokenizer = tiny_tokenizer()
    config = {**TEXT, "num_hidden_layers": LAYERS}
    model = kind(CLIPTextConfig(**config, **special_ids(tokenizer), max_position_embeddings=LENGTH))
    return CLIPTextEncoder(randomize(model, seed), tokenizer, is_penultimate=is_penultimate)


def theirs(ours: CLIPTextEncoder, folder: Path) -> transformers.PreTrainedModel:
    ours.save(folder)
    return getattr(transformers, type(ours.model).__name__).from_pretrained(folder / "text_encoder").eval()


def row(ours: CLIPTextEncoder, text: str) -> Tensor:
    """A chunk as a tower takes it."""
    tokens = ours.tokenizer.encode([text], LENGTH)
    assert not tokens.truncated
    return tokens.input_ids


PARTS = ["a red circle,", "a blue square left of a green", "of a", ""]
PROMPT = "a red circle, a blue square left of a green BREAK of a"


@pytest.mark.parametrize("clip_skip", [None, 1, 2, 3])
@torch.no_grad()
def test_states_of_a_long_prompt_are_those_of_its_chunks_in_transformers(clip_skip: int | None, tmp_path: Path) -> None:
    ours = encoder(CLIPTextModel, 1)
    num_tokens = [len(ours.tokenizer.pieces(part)) for part in PARTS]
    assert num_tokens[0] + num_tokens[1] > LENGTH - 2 >= max(num_tokens)
    reading = PromptReading(long=True, clip_skip=clip_skip)
    assert ours.num_chunks(PROMPT, reading) == 3
    states = ours.encode_prompts([PROMPT], reading, num_chunks=4, warn=pytest.fail).tokens
    model = theirs(ours, tmp_path)
    hidden = model(torch.cat([row(ours, part) for part in PARTS]), output_hidden_states=True).hidden_states
    (norm,) = (module for name, module in model.named_modules() if name.endswith("final_layer_norm"))
    normed = norm(hidden[-(clip_skip or 1)])
    torch.testing.assert_close(states, normed.reshape(1, 4 * LENGTH, -1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("clip_skip", [None, 1, 3])
@torch.no_grad()
def test_the_pair_of_xl_takes_the_layer_without_the_norm_and_the_pooled_text_of_the_first_chunk(
    clip_skip: int | None, tmp_path: Path
) -> None:
    kinds = (CLIPTextModel, CLIPTextModelWithProjection)
    pair = CLIPPairEncoder(*(encoder(kind, 1 + i, is_penultimate=True) for i, kind in enumerate(kinds)))
    reading = PromptReading(long=True, clip_skip=clip_skip)
    assert pair.num_chunks(PROMPT, reading) == 3
    found = pair.encode_prompts([PROMPT, ""], reading, num_chunks=3, warn=pytest.fail)
    ids = torch.cat([row(pair.first, part) for part in PARTS[:3]])
    outputs = [theirs(tower, tmp_path)(ids, output_hidden_states=True) for tower in (pair.first, pair.second)]
    expected = torch.cat([output.hidden_states[-(clip_skip or 2)] for output in outputs], dim=-1)
    assert found.tokens is not None
    assert found.pooled is not None
    torch.testing.assert_close(found.tokens[0], expected.flatten(0, 1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.pooled[0], outputs[1].text_embeds[0], rtol=1e-5, atol=1e-5)
    assert not found.tokens[1].any()
    assert not found.pooled[1].any()


def test_weights_count_in_every_chunk_and_a_break_within_parentheses_breaks() -> None:
    ours, reading = encoder(CLIPTextModel, 1), PromptReading(weighted=True, long=True)
    weighted = ours.encode_prompts(["a (red BREAK blue:1.5) square"], reading, num_chunks=2, warn=pytest.fail).tokens
    plain = [
        ours.encode_prompts([text], LONG, num_chunks=1, warn=pytest.fail).tokens for text in ("a red", "blue square")
    ]
    empty = ours.encode_prompts([""], LONG, num_chunks=1, warn=pytest.fail).tokens
    assert weighted is not None
    assert empty is not None
    for chunk, states, (first, last) in zip(
        weighted.split(LENGTH, 1), plain, [("a", "a red"), ("", "blue")], strict=True
    ):
        start, end = (1 + len(ours.tokenizer.pieces(text)) for text in (first, last))
        assert states is not None
        expected = states.clone()
        expected[:, start:end] = empty[:, start:end] + 1.5 * (states - empty)[:, start:end]
        torch.testing.assert_close(chunk, expected)


def test_a_prompt_that_fits_is_the_same_long_or_not_and_a_break_is_a_word_in_short_ones() -> None:
    ours = encoder(CLIPTextModel, 1)
    for prompt in ("a red circle", "", "a, b"):
        one, other = (
            ours.encode_prompts([prompt], r, num_chunks=1, warn=pytest.fail).tokens for r in (LONG, PromptReading())
        )
        assert one is not None
        assert other is not None
        assert torch.equal(one, other)
    assert ours.num_chunks("a BREAK b", PromptReading()) == 1
    assert ours.num_chunks("a BREAK b", LONG) == 2
    assert ours.num_chunks("a BREAKER b", LONG) == 1


def test_captions_are_encoded_in_as_many_chunks_as_the_recipe_says_and_cut_after_them() -> None:
    warnings: list[str] = []
    tower, tokenizer = encoder(CLIPTextModel, 1).model, tiny_tokenizer()
    ours = CLIPTextEncoder(tower, tokenizer, warn=warnings.append, caption_chunks=2)
    captions = ["a red circle", "a red circle, a blue square left of a green"]
    ids = ours.tokens(captions)["ids"]
    assert ids.shape == (2, 2 * LENGTH)
    states = ours.encode_tokens({"ids": ids}).tokens
    assert states is not None
    for caption, found in zip(captions, states, strict=True):
        expected = ours.encode_prompts([caption], LONG, num_chunks=2, warn=pytest.fail).tokens
        assert expected is not None
        torch.testing.assert_close(found, expected[0])
    assert warnings == []
    for _ in range(2):
        ours.tokens(["a red circle, a blue square left of a green BREAK zebra"])
    assert len(warnings) == 1
    assert "captions of more than 2 × 10 tokens are cut" in warnings[0]
    assert "before 'zebra'" in warnings[0]


def test_a_layer_that_there_is_not_is_refused() -> None:
    encoder(CLIPTextModel, 1).check(PromptReading(clip_skip=LAYERS))
    with pytest.raises(UsageError, match="clip_skip=4 is not possible: a text encoder has 3 layers"):
        encoder(CLIPTextModel, 1).check(PromptReading(clip_skip=LAYERS + 1))
