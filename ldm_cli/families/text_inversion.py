"""Words of textual inversion in the text towers of a family."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ldm_cli.errors import CheckpointError, UsageError
from ldm_cli.families.clip_pair_encoder import CLIPPairEncoder
from ldm_cli.families.clip_text_encoder import CLIPTextEncoder
from ldm_cli.families.family import Encoder
from ldm_cli.formats.embedding_file import TextEmbedding


def add_words(encoder: Encoder, embeddings: Sequence[TextEmbedding]) -> None:
    """Let the words of some embeddings stand for their vectors, in every tower that they have vectors for.

    Raises:
        UsageError: two have the same word, or the encoder has no towers of CLIP.
        CheckpointError: an embedding fits no tower.
    """
    if not embeddings:
        return
    words = [embedding.word for embedding in embeddings]
    if repeated := [word for word in words if words.count(word) > 1]:
        raise UsageError(f"two embeddings are called '{repeated[0]}'", remedy="write --embedding FILE=WORD")
    if isinstance(encoder, CLIPPairEncoder):
        towers = [encoder.first, encoder.second]
    elif isinstance(encoder, CLIPTextEncoder):
        towers = [encoder]
    else:
        raise UsageError("this model takes no embeddings", remedy="leave --embedding out")
    for embedding in embeddings:
        if all(embedding.for_width(tower.width) is None for tower in towers):
            widths = ", ".join(str(vectors.shape[1]) for vectors in embedding.vectors)
            cause = f"its vectors have {widths} numbers, the text encoder {', '.join(str(t.width) for t in towers)}"
            raise CheckpointError(f"the embedding '{embedding.word}' does not fit the model", cause)
    for tower in towers:
        found = {embedding.word: embedding.for_width(tower.width) for embedding in embeddings}
        _extend(tower, {word: vectors for word, vectors in found.items() if vectors is not None})


def _extend(tower: CLIPTextEncoder, vectors: dict[str, Tensor]) -> None:
    transformer = tower.model.text_model
    # Ids above that of the end would be taken for it in files that pool at the largest id.
    transformer.config = transformer.config.model_copy(update={"eos_token_id": tower.tokenizer.end_id})
    ids = tower.tokenizer.add_words({word: len(rows) for word, rows in vectors.items()})
    table = transformer.embeddings.token_embedding.weight
    missing = max(0, tower.tokenizer.vocab_size - len(table))
    extended = torch.cat([table.detach(), table.new_zeros(missing, table.shape[1])])
    for word, rows in vectors.items():
        extended[ids[word]] = rows.to(extended)
    transformer.embeddings.token_embedding.weight = nn.Parameter(extended, requires_grad=False)
