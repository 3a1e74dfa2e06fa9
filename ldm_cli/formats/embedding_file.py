"""Files of textual inversion (Gal et al. 2022, arXiv:2208.01618): vectors that a word of a prompt stands for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ldm_cli.errors import CheckpointError, InputNotFoundError
from ldm_cli.formats.weight_files import is_pickle, named, read_metadata, read_tensors
from ldm_cli.formats.weight_values import expect_sound

_TOWERS = ("clip_l", "clip_g")
"""Names of the vectors for the towers of Stable Diffusion XL."""


@dataclass(frozen=True)
class TextEmbedding:
    """A word and its vectors.

    Attributes:
        vectors: [n, D] for some towers, in the order of the file.
    """

    word: str
    vectors: tuple[Tensor, ...]

    def for_width(self, width: int) -> Tensor | None:
        """The vectors [n, D] for a tower of width D; None: the file has none."""
        return next((vectors for vectors in self.vectors if vectors.shape[1] == width), None)


def read_embeddings(path: Path, word: str | None) -> list[TextEmbedding]:
    """Read a file of AUTOMATIC1111 or diffusers, for one tower or for both of Stable Diffusion XL; or the words that
    lora_diffusion keeps beside its adapters.

    Args:
        path: safetensors.
        word: what the vectors are called; None: as the file says, else the name of the file without its ending.

    Raises:
        InputNotFoundError: there is no such file.
        CheckpointError: it is a pickle, damaged, or of another kind.
    """
    if not path.is_file():
        raise InputNotFoundError(f"embedding '{path}' not found", remedy="check --embedding")
    if is_pickle(path):
        cause = "it is a pickle, which could run any program"
        raise CheckpointError(f"cannot use '{path}'", cause, "save it as safetensors with the program that wrote it")
    tensors = read_tensors(path)
    expect_sound(tensors, path)
    if words := words_beside(tensors, path):
        if word is not None and len(words) > 1:
            raise CheckpointError(
                f"cannot call '{path}' {word!r}", f"it holds the words {named(words)}", "leave it out"
            )
        return [TextEmbedding(word or own, (tensors[own][None],)) for own in words]
    found = _vectors(tensors)
    if found is None or not all(vectors.ndim == 2 for vectors in found.values()):
        cause = f"it holds {named(list(tensors)) or 'nothing'}"
        raise CheckpointError(f"'{path}' is no embedding", cause, "emb_params, clip_l and clip_g, or one word are read")
    own = next(iter(found))
    if word is None:
        word = path.stem if own in ("emb_params", *_TOWERS) else own
    return [TextEmbedding(word, tuple(found.values()))]


def words_beside(tensors: Mapping[str, Tensor], path: Path) -> list[str]:
    """The names of the vectors [D] that a file of lora_diffusion holds beside adapters."""
    metadata = read_metadata(path)
    return [name for name, tensor in tensors.items() if metadata.get(name) == "<embed>" and tensor.ndim == 1]


def _vectors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """[n, D] by name; None if the tensors are no embedding."""
    if "emb_params" in tensors:
        return {"emb_params": tensors["emb_params"]}
    if tensors.keys() <= set(_TOWERS) or len(tensors) == 1:
        return {name: tensor[None] if tensor.ndim == 1 else tensor for name, tensor in tensors.items()} or None
    return None
