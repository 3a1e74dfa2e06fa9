"""Words of textual inversion in towers whose files pool at the largest id."""

from __future__ import annotations

import torch

from ldm_cli.core.models.clip import CLIPTextModelWithProjection
from ldm_cli.core.models.clip_config import CLIPTextConfig
from ldm_cli.families.clip_text_encoder import CLIPTextEncoder
from ldm_cli.families.text_inversion import add_words
from ldm_cli.formats.embedding_file import TextEmbedding
from tests.sampling.tiny import TEXT, randomize, special_ids, tiny_tokenizer


def test_new_ids_are_not_taken_for_the_end_of_the_text() -> None:
    pooled = []
    for eos_token_id in (2, tiny_tokenizer().end_id):
        tokenizer = tiny_tokenizer()
        config = CLIPTextConfig(**TEXT | special_ids(tokenizer) | {"eos_token_id": eos_token_id})  # type: ignore[arg-type]
        encoder = CLIPTextEncoder(randomize(CLIPTextModelWithProjection(config), 1), tokenizer)
        add_words(encoder, [TextEmbedding("<toy>", (torch.ones(2, 24),))])
        ids = encoder.tokens(["a <toy> red circle"])
        found = encoder.encode_tokens(ids).pooled
        assert found is not None
        pooled.append(found)
    assert torch.equal(*pooled)
