"""The embeddings and adapters of a job's pictures, in the networks of its family."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ldm_cli.errors import UsageError
from ldm_cli.families.adapted import AdaptedNetworks, adaptable_models, adaptable_networks
from ldm_cli.families.family import Family, ImageGenerator
from ldm_cli.families.lora_reader import read_lora
from ldm_cli.families.text_inversion import add_words
from ldm_cli.formats.embedding_file import read_embeddings
from ldm_cli.formats.lora_path import lora_sha256
from ldm_cli.pictures.job import Item
from ldm_cli.pictures.prompt_adapters import EmbeddingEntry
from ldm_cli.storage import file_sha256


class JobAdapters:
    """Every embedding, and every file of adapters that a job uses, read once.

    Attributes:
        paths, sha256: of the files of adapters, by name.
        embeddings, embedding_sha256: of the files of embeddings, by word.
    """

    def __init__(
        self,
        family: ImageGenerator,
        items: Sequence[Item],
        paths: Mapping[str, Path],
        embeddings: Sequence[EmbeddingEntry],
    ) -> None:
        """Read the files, and give the text towers the words; errors as in `read_lora` and `add_words`.

        Args:
            paths: files of adapters, by name; those are read that some picture uses.
        """
        read = [one for entry in embeddings for one in read_embeddings(Path(entry.path), entry.word)]
        names = sorted({name for item in items for name, _ in item.loras})
        if isinstance(family, Family):
            add_words(family.encoder, read)
        elif read or names:
            raise UsageError("this model takes no adapters and no embeddings", "they belong to denoisers")
        self.embeddings = {one.word: Path(entry.path) for one, entry in zip(read, embeddings, strict=True)}
        self.embedding_sha256 = {word: file_sha256(path) for word, path in self.embeddings.items()}
        self.paths = {name: paths[name] for name in names}
        self.sha256 = {name: lora_sha256(path) for name, path in self.paths.items()}
        networks = adaptable_networks(family) if names and isinstance(family, Family) else {}
        models = adaptable_models(networks)
        self._networks = AdaptedNetworks(networks, {n: read_lora(path, models) for n, path in self.paths.items()})

    def use_for(self, item: Item) -> None:
        """Set the weights of the networks for one picture, and all others with its adapters."""
        self._networks.use(dict(item.loras))
