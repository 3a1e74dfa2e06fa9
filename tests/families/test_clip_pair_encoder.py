"""Two text towers as one encoder: prompts that are empty, weighted, too long."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ldm_cli.core.models.clip import CLIPTextModel, CLIPTextModelWithProjection
from ldm_cli.core.models.clip_config import CLIPTextConfig
from ldm_cli.errors import CheckpointError
from ldm_cli.families.clip_pair_encoder import CLIPPairEncoder
from ldm_cli.families.clip_text_encoder import CLIPTextEncoder
from ldm_cli.families.prompt_chunks import PromptReading
from tests.sampling.tiny import TEXT, randomize, special_ids, tiny_tokenizer


def pair(lengths: tuple[int, int] = (12, 12), zeroes_empty: bool = True) -> CLIPPairEncoder:
    tokenizer, towers = tiny_tokenizer(), []
    for kind, length in zip((CLIPTextModel, CLIPTextModelWithProjection), lengths, strict=True):
        config = CLIPTextConfig(**TEXT, **special_ids(tokenizer), max_position_embeddings=length)
        model = randomize(kind(config), length + len(towers))
        towers.append(CLIPTextEncoder(model, tokenizer, is_penultimate=True))
    return CLIPPairEncoder(*towers, zeroes_empty=zeroes_empty)


def states(encoder: CLIPPairEncoder, prompt: str, warn: Callable[[str], None] = pytest.fail) -> tuple[Tensor, Tensor]:
    condition = encoder.encode_prompts([prompt], PromptReading(weighted=True), num_chunks=1, warn=warn)
    assert condition.tokens is not None
    assert condition.pooled is not None
    return condition.tokens, condition.pooled


def test_only_empty_captions_of_a_batch_are_zeros() -> None:
    captions = ["a blue square", "", "a red circle"]
    condition = pair().encode_tokens(pair().tokens(captions))
    for tensor in condition.tensors.values():
        assert tensor.flatten(1).any(dim=1).tolist() == [True, False, True]
    encoded = pair(zeroes_empty=False).encode_tokens(pair().tokens(captions))
    assert all(tensor.flatten(1).any(dim=1).all() for tensor in encoded.tensors.values())
    assert torch.equal(encoded.tokens[::2], condition.tokens[::2])  # type: ignore[index]


def test_a_weight_moves_the_states_of_both_towers_and_no_pooled_text() -> None:
    encoder = pair()
    plain, pooled = states(encoder, "a red circle")
    unweighted, _ = states(encoder, "a (red:1.0) circle")
    weighted, still_pooled = states(encoder, "a (red:1.5) circle")
    assert plain.shape == (1, 12, 48)
    assert torch.equal(plain, unweighted)
    assert torch.equal(pooled, still_pooled)
    moved = (plain != weighted)[0].view(12, 2, 24).any(-1)
    assert moved.any(0).tolist() == [True, True]
    assert not moved.all()


def test_a_prompt_that_is_too_long_is_named_by_each_tower() -> None:
    messages: list[str] = []
    states(pair(), "a red circle " * 9, messages.append)
    assert len(messages) == 2
    assert all("has more than 10 tokens" in message for message in messages)


def test_towers_of_different_lengths_are_refused() -> None:
    with pytest.raises(CheckpointError, match="the first takes 12 tokens, the second 9"):
        pair((12, 9))
