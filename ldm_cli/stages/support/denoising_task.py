"""The task of a denoiser, as far as those of all kinds agree."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ldm_cli.data.batch import Batch
from ldm_cli.families.family import Family
from ldm_cli.formats.model_folder import load_weights
from ldm_cli.formats.save_model import save_frozen, save_model
from ldm_cli.recipe.prior_recipe import TrainPriorRecipe
from ldm_cli.recipe.schema import TrainUnetRecipe
from ldm_cli.sampling.sample_options import PLAIN, SampleOptions
from ldm_cli.stages.support.batch_encoder import BatchEncoder
from ldm_cli.stages.support.denoising import AddedCondition, Denoising, Encoded
from ldm_cli.stages.support.patch_training import PatchTraining
from ldm_cli.stages.support.start import frozen_names
from ldm_cli.stages.support.training_run import Workbench
from ldm_cli.training.checkpoint import link_folder
from ldm_cli.training.task import WeightsByModule


class DenoisingTask:
    """Train the denoiser of a family on what the encoders of its recipe give; see `Task`.

    Args:
        encoder: codec and text encoders, frozen unless a subclass trains them.
        family: its denoiser has the weights to begin with.
        patches, added: as of `Denoising`.
    """

    num_files = 1

    def __init__(
        self,
        recipe: TrainUnetRecipe | TrainPriorRecipe,
        bench: Workbench,
        encoder: BatchEncoder,
        family: Family,
        patches: PatchTraining | None = None,
        added: AddedCondition | None = None,
    ) -> None:
        self.bench, self.encoder, self.family = bench, encoder, family
        denoiser: Any = family.denoiser
        self._component, self._frozen = family.components[0], frozen_names(denoiser)
        if recipe.train.gradient_checkpointing:
            denoiser.enable_gradient_checkpointing()
        self.modules: dict[str, nn.Module] = {self._component: denoiser}
        self.auxiliary: dict[str, nn.Module] = {}
        self._empty_tokens: dict[str, Tensor] = {}
        if bench.cache is None or encoder.trains_text:
            # As many rows as a cache encodes at once: a row's last bits depend on their number.
            empty = encoder.condition([""] * recipe.train.part_size()).map(lambda tensor: tensor[:1])
        else:
            empty = encoder.cached(bench.cache, "")
        self.denoising = Denoising(family, recipe.diffusion, recipe.seed, empty, patches, added)
        self._held_out: dict[int, Encoded] = {}

    def prepare(self, batch: Batch) -> Batch:
        """With the tokens of its captions, unless it is out of a cache."""
        return self.encoder.prepare(batch)

    def parts(self, batch: Batch, num_parts: int) -> Sequence[Batch]:
        """Samples do not depend on one another."""
        return batch.parts(num_parts)

    def encode_empty(self) -> None:
        """Encode the condition that takes the place of a dropped one anew, with gradients if the encoder is trained."""
        if not self._empty_tokens:
            tokens = self.encoder.encoder.tokens([""])
            self._empty_tokens = {name: tensor.to(self.bench.device) for name, tensor in tokens.items()}
        self.denoising.empty = self.encoder.condition_of(self._empty_tokens)

    def loss(self, part: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean denoising error; each sample has its own level, noise and dropout."""
        return self.denoising.loss(part, *self.encoder(part), step)

    def encoded(self, batch: Batch) -> Encoded:
        """A held-out batch; encoded once, unless the encoder is trained."""
        if id(batch) not in self._held_out or self.encoder.trains_text:
            sent = self.prepare(batch).map(lambda tensor: tensor.to(self.bench.device))
            self._held_out[id(batch)] = (sent, *self.encoder(sent))
        return self._held_out[id(batch)]

    def validate(self) -> dict[str, float]:
        """See `Denoising.validate`."""
        return self.denoising.validate(self.bench.held_out, self.encoded, self.bench.sharing)

    def picture(self, folder: Path | None, options: SampleOptions = PLAIN) -> None:
        """Nothing, unless the denoiser makes pictures."""

    def save_unchanged(self, folder: Path) -> None:
        """Write the parts of the model folder that training does not change."""
        self.family.save_companions(folder)
        save_frozen(folder / self._component, self.family.denoiser.state_dict(), self._frozen)

    def export(self, folder: Path, weights: WeightsByModule) -> None:
        """Write the model folder: the trained weights of the denoiser, and links to all else."""
        link_folder(self.bench.run.frozen, folder)
        config: Any = self.family.denoiser.config
        save_model(folder / self._component, weights[self._component], config.to_hugging_face(), frozen=self._frozen)

    def restore(self, folder: Path) -> None:
        """Read the denoiser's weights of `export` back."""
        load_weights(self.family.denoiser, folder / self._component)

    def finalize(self) -> dict[str, float]:
        """Nothing is left to do."""
        return {}
