"""`ldm train-ar`: a Transformer that predicts the codes of a VQ model after a caption."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm_cli import philox
from ldm_cli.core.models.llama import LlamaForCausalLM
from ldm_cli.core.models.llama_config import LlamaConfig, PictureTokens
from ldm_cli.core.models.vq_model import VQModel
from ldm_cli.core.token_loss import TokenLosses, sequences, token_losses
from ldm_cli.data.batch import Batch
from ldm_cli.data.latent_cache import LatentCache
from ldm_cli.data.tokenizer import Tokenizer
from ldm_cli.errors import RecipeError
from ldm_cli.families.autoregressive import Autoregressive, tokens_of
from ldm_cli.families.caption_tokens import CaptionTokens
from ldm_cli.formats.model_folder import load_weights, outline_model
from ldm_cli.formats.model_source import weights_sha256
from ldm_cli.formats.pipeline_folder import TRANSFORMER
from ldm_cli.formats.save_model import save_frozen, save_model
from ldm_cli.formats.weight_files import TRANSFORMERS_WEIGHTS
from ldm_cli.recipe.ar_recipe import TrainArRecipe
from ldm_cli.reporting import Reporter
from ldm_cli.stages.support.batch_encoder import cache_key
from ldm_cli.stages.support.code_encoder import CodeEncoder
from ldm_cli.stages.support.denoising import generate_samples
from ldm_cli.stages.support.model_sizes import Parameters, count_parameters, model_at, outlined, trained_parameters
from ldm_cli.stages.support.named_models import with_model_folders
from ldm_cli.stages.support.options import RunOptions, with_precision
from ldm_cli.stages.support.start import build_model, frozen_names, resolve_start, start_uses
from ldm_cli.stages.support.trained_tokenizer import tokenizer_of
from ldm_cli.stages.support.training_run import Workbench, run_training
from ldm_cli.training.checkpoint import link_folder
from ldm_cli.training.shared_work import in_turns
from ldm_cli.training.task import WeightsByModule


def run(recipe: TrainArRecipe, options: RunOptions, reporter: Reporter) -> dict[str, Any]:
    """Train the Transformer of `recipe`; the result is a folder with its VQ model and tokenizer."""
    recipe = with_precision(resolve_start(with_model_folders(recipe, reporter), reporter.warn), options)
    uses, facts = {"vq": recipe.vq} | start_uses(recipe), {}
    if recipe.tokenizer.path is not None:
        facts["tokenizer"] = Tokenizer.load(recipe.tokenizer.path).fingerprint
    build, sizes, cache = lambda bench: TokenTask(recipe, bench), parameters(recipe, []), recipe.cache
    open_cache = None
    if cache is not None:
        open_cache = lambda shards: LatentCache(Path(cache), shards, cache_key(recipe), reporter)  # noqa: E731
    return run_training(recipe, options, reporter, build, sizes, uses=uses, facts=facts, open_cache=open_cache)


def parameters(recipe: TrainArRecipe, notes: list[str]) -> Parameters:
    """The sizes of `recipe`; see `support/model_sizes.py`.

    Raises:
        RecipeError: the models do not fit together.
    """
    vq = model_at("vq", recipe.vq, lambda folder: outline_model(VQModel, folder), notes)
    vocab_size = recipe.tokenizer.vocab_size
    if recipe.tokenizer.path is None:
        notes.append("transformer: the trained vocabulary may have fewer tokens than tokenizer.vocab_size")
    elif Path(recipe.tokenizer.path).is_dir():
        vocab_size = Tokenizer.load(recipe.tokenizer.path).vocab_size
    else:
        notes.append(f"tokenizer: '{recipe.tokenizer.path}' not found")
    config, frozen = recipe.model, {}
    if vq is not None:
        config = with_tokens(config, picture_tokens(recipe, vq, vocab_size))
        frozen = {"vq": count_parameters(vq)}
    trained, left = trained_parameters(TRANSFORMER, outlined(lambda: LlamaForCausalLM(config), recipe))
    return trained, left | frozen


class TokenTask:
    """Predict each token of a caption and of its picture's codes from those before it (Ramesh et al. 2021, eq. 1)."""

    def __init__(self, recipe: TrainArRecipe, bench: Workbench) -> None:
        self.recipe, self.bench = recipe, bench
        self.encoder, tokenizer = CodeEncoder(recipe, bench.device), tokenizer_of(recipe, bench)
        self.model = build_model(LlamaForCausalLM, fitted_config(recipe, self.encoder.codec.vq, tokenizer), recipe)
        self._frozen = frozen_names(self.model)
        if recipe.train.gradient_checkpointing:
            self.model.enable_gradient_checkpointing()
        self.family = Autoregressive(self.model, self.encoder.codec, tokenizer)
        bench.run.share(self._save_unchanged)
        self.tokens = self.family.tokens
        self._text_end = tokenizer.end_id
        self._caption_tokens = CaptionTokens(tokenizer, self.tokens.text_length, bench.run.warn)
        self._empty = self._caption_tokens([""]).to(bench.device)
        self._dropout_key = philox.key(recipe.seed, "caption dropout")
        self.modules = {TRANSFORMER: self.model}
        self.auxiliary: dict[str, torch.nn.Module] = {}
        self.num_files = 1
        self._held_out: dict[int, Tensor] = {}

    def prepare(self, batch: Batch) -> Batch:
        """With `ids`, the token ids of its captions, int64 [B, L]."""
        return replace(batch, tokens={"ids": self._caption_tokens(batch.captions)})

    def parts(self, batch: Batch, num_parts: int) -> list[Batch]:
        """Samples do not depend on one another."""
        return batch.parts(num_parts)

    def loss(self, part: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean loss of codes and end, and `text_loss_weight` times that of the captions that are not dropped."""
        uniform = philox.uniform(self._dropout_key, part.epoch, part.position, 1)[:, 0]
        is_kept = uniform >= self.recipe.caption_dropout
        captions = torch.where(is_kept[:, None], part.tokens["ids"], self._empty)
        losses = self._losses(sequences(captions, self.encoder(part), self.tokens))
        text = (losses.text * is_kept).mean()
        loss = losses.codes.mean() + losses.end.mean() / self.tokens.num_places + self.recipe.text_loss_weight * text
        return loss, {"code_loss": losses.codes.mean().detach()}

    def _losses(self, ids: Tensor) -> TokenLosses:
        return token_losses(self.model(ids[:, :-1]), ids, self.tokens, self._text_end)

    def validate(self) -> dict[str, float]:
        """Bits per code and per text token of held-out samples, each the mean of their means; `val_loss` in nats."""

        def losses(batch: Batch) -> Tensor:
            found = self._losses(self._held_out_ids(batch))
            return torch.stack([found.codes, found.text], dim=1).double()

        if not self.bench.held_out:
            return {}
        codes, text = torch.cat(in_turns(self.bench.held_out, losses, self.bench.sharing)).mean(dim=0).tolist()
        bits = {"val_bits_per_image_token": codes / math.log(2), "val_bits_per_text_token": text / math.log(2)}
        return {"val_loss": codes + self.recipe.text_loss_weight * text} | bits

    def _held_out_ids(self, batch: Batch) -> Tensor:
        """The sequences of a held-out batch, encoded once."""
        if id(batch) not in self._held_out:
            sent = self.prepare(batch).map(lambda tensor: tensor.to(self.bench.device))
            self._held_out[id(batch)] = sequences(sent.tokens["ids"], self.encoder(sent), self.tokens)
        return self._held_out[id(batch)]

    def picture(self, folder: Path | None) -> None:
        """See `generate_samples`."""
        captions = [caption for batch in self.bench.held_out for caption in batch.captions]
        samples, warn = self.recipe.samples, self.bench.run.warn
        generate_samples(self.family, samples, captions, folder, warn, self.bench.sharing)

    def _save_unchanged(self, folder: Path) -> None:
        self.family.save_companions(folder)
        save_frozen(folder / TRANSFORMER, self.model.state_dict(), self._frozen, TRANSFORMERS_WEIGHTS)

    def export(self, folder: Path, weights: WeightsByModule) -> None:
        """Write the model folder: the trained weights of the Transformer, and links to all else."""
        link_folder(self.bench.run.frozen, folder)
        config = self.model.config.to_hugging_face()
        save_model(folder / TRANSFORMER, weights[TRANSFORMER], config, TRANSFORMERS_WEIGHTS, self._frozen)

    def restore(self, folder: Path) -> None:
        """Read the Transformer's weights of `export` back."""
        load_weights(self.model, folder / TRANSFORMER)

    def finalize(self) -> dict[str, float]:
        """Nothing is left to do."""
        return {}


def picture_tokens(recipe: TrainArRecipe, vq: VQModel, vocab_size: int) -> PictureTokens:
    """Where the tokens of captions and pictures are.

    Args:
        recipe: names the VQ model's folder, and the sizes of captions and pictures.
        vocab_size: of the captions' tokenizer.

    Raises:
        RecipeError: the pictures are no whole grid of codes.
    """
    side, rest = divmod(recipe.data.image_size, vq.factor)
    if rest:
        cause = f"data.image_size={recipe.data.image_size} is no multiple of {vq.factor}"
        raise RecipeError("the parts do not fit together", cause, "change the recipe", problems=(cause,))
    return PictureTokens(
        text_length=recipe.text_length,
        image_token_offset=vocab_size,
        num_codes=vq.config.num_vq_embeddings,
        grid=(side, side),
        vq_sha256=weights_sha256(Path(recipe.vq)),
    )


def with_tokens(config: LlamaConfig, tokens: PictureTokens) -> LlamaConfig:
    """The configuration of a model of these tokens."""
    sizes = {"vocab_size": tokens.vocab_size, "max_position_embeddings": tokens.length}
    return config.model_copy(update={**sizes, "eos_token_id": tokens.end_id, "ldm": tokens})


def fitted_config(recipe: TrainArRecipe, vq: VQModel, tokenizer: Tokenizer) -> LlamaConfig:
    """The Transformer's configuration for the tokens of a VQ model and a tokenizer.

    Raises:
        RecipeError: the model of `start_from` was trained with others.
    """
    tokens = picture_tokens(recipe, vq, tokenizer.vocab_size)
    if recipe.start_from is not None and tokens != (before := tokens_of(recipe.model)):
        problems = tuple(
            f"{name} was {getattr(before, name)!r} and is {value!r}"
            for name, value in tokens
            if value != getattr(before, name)
        )
        remedy = "leave vq, tokenizer, text_length and the size of start_from"
        raise RecipeError("start_from has other tokens", "; ".join(problems), remedy, problems=problems)
    ids = {"bos_token_id": tokenizer.start_id, "pad_token_id": tokenizer.pad_id}
    return with_tokens(recipe.model, tokens).model_copy(update=ids)
