"""`ldm train-clip`: a contrastive image-text model from shards."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Generator, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm_cli.core.clip_loss import contrastive_loss
from ldm_cli.core.models.clip import CLIPModel
from ldm_cli.core.models.clip_config import CLIPConfig
from ldm_cli.core.models.clip_image_processor import CLIPImageProcessor
from ldm_cli.core.models.clip_resnet import StatisticsKept
from ldm_cli.data.batch import Batch
from ldm_cli.data.to_device import sent_to_device
from ldm_cli.data.tokenizer import Tokenizer
from ldm_cli.families.caption_tokens import CaptionTokens
from ldm_cli.families.clip_folder import open_image_processor
from ldm_cli.formats.json_file import write_json
from ldm_cli.formats.model_folder import load_weights
from ldm_cli.formats.save_model import save_frozen, save_model
from ldm_cli.formats.weight_files import TRANSFORMERS_WEIGHTS
from ldm_cli.pictures.grid import image_grid
from ldm_cli.pictures.images import save_image
from ldm_cli.recipe.schema import TrainClipRecipe
from ldm_cli.reporting import Reporter
from ldm_cli.stages.support.model_sizes import Parameters, outlined, trained_parameters
from ldm_cli.stages.support.named_models import with_model_folders
from ldm_cli.stages.support.options import RunOptions, with_precision
from ldm_cli.stages.support.start import build_model, frozen_names, resolve_start, start_folder, start_uses
from ldm_cli.stages.support.trained_tokenizer import tokenizer_of
from ldm_cli.stages.support.training_run import Workbench, run_training
from ldm_cli.training.checkpoint import link_folder
from ldm_cli.training.gradient_sum import gradient_sum
from ldm_cli.training.shared_work import in_turns
from ldm_cli.training.task import WeightsByModule
from ldm_cli.training.weights import Weights

_NUM_PICTURED = 6
_NUM_FOUND = 8


def run(recipe: TrainClipRecipe, options: RunOptions, reporter: Reporter) -> dict[str, Any]:
    """Train the CLIP of `recipe`; the result is a CLIPModel folder with its tokenizer."""
    recipe = with_precision(resolve_start(with_model_folders(recipe, reporter), reporter.warn), options)
    facts = {} if recipe.start_from is None else {"the image processor": _image_processor(recipe).model_dump_json()}
    if recipe.tokenizer.path is not None:
        facts["tokenizer"] = Tokenizer.load(recipe.tokenizer.path).fingerprint
    build = lambda bench: CLIPTask(recipe, bench)  # noqa: E731
    sizes, uses = parameters(recipe, []), start_uses(recipe)
    return run_training(recipe, options, reporter, build, sizes, uses=uses, facts=facts)


@dataclass(frozen=True)
class _Part:
    """A part of a batch, with what the contrastive loss of the global batch says of it.

    Attributes:
        features: their features [B, 2·D] with their graph, if they are there already; None: to be computed.
        gradient: of the loss with respect to them, [B, 2·D].
        scale_gradient: of the loss with respect to the logit scale.
        value: the loss of its rows, without gradient.
        figures: of its rows.
    """

    batch: Batch
    features: Tensor | None
    gradient: Tensor
    scale_gradient: Tensor
    value: Tensor
    figures: dict[str, Tensor]


def parameters(recipe: TrainClipRecipe, notes: list[str]) -> Parameters:
    """The sizes of `recipe`; see `support/model_sizes.py`."""
    if recipe.tokenizer.path is None:
        notes.append("clip: the trained vocabulary may have fewer tokens than text_config.vocab_size")
    _image_processor(recipe)
    return trained_parameters("clip", outlined(lambda: CLIPModel(recipe.model), recipe))


class CLIPTask:
    """Tell which caption belongs to which image of a batch."""

    def __init__(self, recipe: TrainClipRecipe, bench: Workbench) -> None:
        self.recipe, self.bench = recipe, bench
        self.tokenizer = tokenizer_of(recipe, bench)
        self.tokenizer.model_max_length = recipe.model.text_config.max_position_embeddings
        config = recipe.model if recipe.start_from else fit_to_tokenizer(recipe.model, self.tokenizer)
        self.model = build_model(CLIPModel, config, recipe)
        self._processor = _image_processor(recipe)
        self._frozen = frozen_names(self.model)
        state = self.model.state_dict()
        bench.run.share(lambda folder: save_frozen(folder, state, self._frozen, TRANSFORMERS_WEIGHTS))
        if recipe.train.gradient_checkpointing:
            self.model.enable_gradient_checkpointing()
        length = self.model.config.text_config.max_position_embeddings
        self._tokens = CaptionTokens(self.tokenizer, length, bench.run.warn)
        self.modules = {"clip": self.model}
        self.auxiliary: dict[str, torch.nn.Module] = {}
        self.num_files = 1

    def prepare(self, batch: Batch) -> Batch:
        """With `ids`, the token ids int64 [B, L], and, where equal captions match, `groups`: a number for each caption,
        int64 [B], the same for equal ones on all ranks."""
        tokens = {"ids": self._tokens(batch.captions)}
        if self.recipe.equal_captions_match:
            digests = (hashlib.sha256(caption.encode()).digest() for caption in batch.captions)
            numbers = [int.from_bytes(digest[:8], "little", signed=True) for digest in digests]
            tokens["groups"] = torch.tensor(numbers)
        return replace(batch, tokens=tokens)

    def parts(self, batch: Batch, num_parts: int) -> list[_Part]:
        """Equal parts of the batch, each with the gradient of its features.

        The loss is that of the *global* batch, also where it is run in parts, on one rank or on several. So the
        features of all parts come first, then the gradient of the loss with respect to them; `loss` computes the
        features of a part once more and passes their gradient on (Gao et al. 2021, arXiv:2101.06983, section 3.2).
        The activations of one part are in memory at a time, and each rank holds its own rows of the logits.
        """
        batches = batch.parts(num_parts)
        if num_parts == 1:
            features = [self._features(batch)]
        else:
            # Batch norms count the second pass, which gives the gradient, and not this one.
            with torch.no_grad(), StatisticsKept(self.model):
                features = [self._features(part) for part in batches]
        own = torch.cat([part.detach().float() for part in features])
        values, gradient, scale_gradient = self._feature_gradient(own, batch.tokens.get("groups"), num_parts)
        rows = gradient.chunk(num_parts)
        return [
            _Part(one, features[i] if num_parts == 1 else None, rows[i], scale_gradient, *values[i])
            for i, one in enumerate(batches)
        ]

    def loss(self, part: _Part, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The contrastive loss of the part's rows, with the gradient of the global batch's."""
        features = self._features(part.batch) if part.features is None else part.features
        # The gradient of the surrogate counts, its value does not.
        surrogate = (features.float() * part.gradient).sum() + self.model.clamped_logit_scale * part.scale_gradient
        return part.value + surrogate - surrogate.detach(), part.figures

    def _feature_gradient(
        self, own: Tensor, groups: Tensor | None, num_parts: int
    ) -> tuple[list[tuple[Tensor, dict[str, Tensor]]], Tensor, Tensor]:
        """Loss and figures of each part of this rank, and the gradient of the loss of all parts of all ranks.

        Args:
            own: image and text features side by side, float32 [B / ranks, 2·D].
            groups: `groups` of `contrastive_loss` for this rank's samples, int64 [B / ranks].

        Returns:
            Per part the loss of its rows and figures; the gradient with respect to `own`, summed over all parts of
            all ranks; the mean gradient with respect to the logit scale.
        """
        ranks = self.bench.ranks
        total = gradient_sum(Weights({}, ranks), self.recipe.train)
        features = ranks.gathered(own).requires_grad_()
        everyone = None if groups is None else ranks.gathered(groups)
        scale = self.model.clamped_logit_scale.detach().requires_grad_()
        size, start = len(own) // num_parts, ranks.rank * len(own)
        values: list[tuple[Tensor, dict[str, Tensor]]] = []
        for first in range(start, start + len(own), size):
            images, texts = features.chunk(2, dim=1)
            loss, figures = contrastive_loss(images, texts, scale, slice(first, first + size), everyone)
            values.append((loss.detach(), figures))
            total.add(torch.cat([gradient.reshape(-1) for gradient in torch.autograd.grad(loss, [features, scale])]))
        summed = total.finish()
        gradient = summed[:-1].view(features.shape)[start : start + len(own)]
        return values, gradient, summed[-1] / (num_parts * ranks.world_size)

    def _features(self, batch: Batch) -> Tensor:
        """Image and text features side by side, [B, 2·D], of a prepared batch on the device."""
        images = self.model.get_image_features(self._processor(batch.images))
        return torch.cat([images, self.model.get_text_features(batch.tokens["ids"])], dim=1)

    def _on_device(self, batches: Iterable[Batch]) -> Generator[Batch]:
        return sent_to_device((batch for batch in batches), self.bench.device, self.prepare)

    def validate(self) -> dict[str, float]:
        """Contrastive loss and accuracy among held-out batches of one size."""
        size = len(self.bench.held_out[0].keys) if self.bench.held_out else 0
        whole = [batch for batch in self.bench.held_out if len(batch.keys) == size]

        def figures(batch: Batch) -> Tensor:
            [batch] = self._on_device([batch])
            images, texts = self._features(batch).chunk(2, dim=1)
            loss, others = contrastive_loss(
                images, texts, self.model.clamped_logit_scale, groups=batch.tokens.get("groups")
            )
            return torch.stack([loss, others["accuracy"]]).double()

        if not whole:
            return {}
        loss, accuracy = torch.stack(in_turns(whole, figures, self.bench.sharing)).mean(dim=0).tolist()
        return {"val_loss": loss, "val_accuracy": accuracy}

    def picture(self, folder: Path | None) -> None:
        """`grid.png`: per held-out caption a row of the images that fit best; `captions.json` names them; by rank 0."""
        batches = self.bench.held_out
        if folder is None or not batches:
            return
        features = torch.cat([self._features(batch) for batch in self._on_device(batches)])
        images, texts = (torch.nn.functional.normalize(side, dim=-1) for side in features.chunk(2, dim=1))
        texts = texts[:_NUM_PICTURED]
        best = (texts @ images.T).topk(min(_NUM_FOUND, len(images)), dim=1).indices.tolist()
        pixels = torch.cat([batch.images for batch in batches])
        save_image(folder / "grid.png", image_grid([pixels[i] for row in best for i in row], columns=len(best[0])))
        captions = [caption for batch in batches for caption in batch.captions]
        rows = [
            {"caption": caption, "found": [captions[i] for i in row]}
            for caption, row in zip(captions, best, strict=False)
        ]
        (folder / "captions.json").write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    def export(self, folder: Path, weights: WeightsByModule) -> None:
        """Write the CLIPModel folder with tokenizer and image processor."""
        config = self.model.config.to_hugging_face()
        if self._frozen:
            link_folder(self.bench.run.frozen, folder)
        save_model(folder, weights["clip"], config, TRANSFORMERS_WEIGHTS, self._frozen)
        self.tokenizer.save(folder)
        write_json(folder / "preprocessor_config.json", self._processor.to_hugging_face())

    def restore(self, folder: Path) -> None:
        """Read the weights of `export` back."""
        load_weights(self.model, folder)

    def finalize(self) -> dict[str, float]:
        """The logit scale; nothing is left to do."""
        return {"logit_scale": self.model.clamped_logit_scale.item()}


def _image_processor(recipe: TrainClipRecipe) -> CLIPImageProcessor:
    """The one of `start_from`, or OpenAI's; errors as in `open_image_processor`."""
    if recipe.start_from is None:
        return CLIPImageProcessor.for_side(recipe.model.vision_config.image_size)
    return open_image_processor(start_folder(recipe))


def fit_to_tokenizer(config: CLIPConfig, tokenizer: Tokenizer) -> CLIPConfig:
    """`config` with the vocabulary size and special ids of the tokenizer in its text tower."""
    ids = {
        "vocab_size": tokenizer.vocab_size,
        "bos_token_id": tokenizer.start_id,
        "eos_token_id": tokenizer.end_id,
        "pad_token_id": tokenizer.pad_id,
    }
    return config.model_copy(update={"text_config": config.text_config.model_copy(update=ids)})
