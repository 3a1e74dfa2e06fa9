"""Fields by the names that other trainers and pipelines have for them: what people write who come from there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args

from pydantic import BaseModel

# Field, and other names for it.
_FIELDS = {
    "train.lr": "learning_rate",
    "train.steps": "max_train_steps max_steps num_steps iterations epochs num_epochs num_train_epochs max_train_epochs",
    "train.batch_size": "train_batch_size bs",
    "train.micro_batch": "gradient_accumulation_steps accumulate_grad_batches grad_accum",
    "train.precision": "mixed_precision fp16 bf16 amp",
    "train.lr_schedule": "lr_scheduler lr_scheduler_type",
    "train.warmup_steps": "lr_warmup_steps warmup",
    "train.betas": "adam_beta1 adam_beta2",
    "train.eps": "adam_epsilon",
    "train.weight_decay": "adam_weight_decay wd",
    "train.max_grad_norm": "grad_clip clip_grad_norm gradient_clip_val",
    "train.ema_decay": "use_ema ema",
    "train.save_every": "checkpointing_steps save_steps save_every_n_steps",
    "train.keep_checkpoints": "checkpoints_total_limit save_total_limit",
    "train.validate_every": "validation_steps eval_steps",
    "train.log_every": "logging_steps",
    "train.track": "report_to",
    "data.image_size": "resolution",
    "data.shards": "train_data_dir train_data dataset",
    "data.val_shards": "val_data",
    "data.num_workers": "dataloader_num_workers workers",
    "data.flip_probability": "random_flip",
    "start_from": "pretrained_model_name_or_path pretrained",
    "lora.rank": "network_dim",
    "lora.alpha": "network_alpha",
    "diffusion.snr_gamma": "min_snr_gamma",
    "diffusion.caption_dropout": "cond_dropout",
    "sampling.steps": "num_inference_steps ddim_steps",
    "guidance.scale": "guidance_scale cfg cfg_scale",
    "guidance.rescale": "guidance_rescale",
    "sampling.negative": "negative_prompt",
    "sampling.sampler": "sampler_name scheduler",
    "sampling.images_per_prompt": "num_images_per_prompt",
}
_OPTIONS = {
    "--out": "output_dir output outdir save_dir",
    "--resume": "resume_from_checkpoint",
    "--nproc": "num_processes nproc_per_node gpus",
}
_COMMANDS = {
    "sample": "generate txt2img img2img inpaint infer inference upscale",
    "train-unet": "train_lora lora finetune fine_tune dreambooth",
    "convert": "merge export",
    "pull": "download",
    "data pack": "pack prepare",
    "compare": "fid",
}


def field_called(name: str, model: type[BaseModel], section: str = "") -> str | None:
    """The dotted path of the field that other programs call `name`, or that is called so in another section.

    Args:
        name: what somebody wrote, `-` or `_` between words.
        model: the recipe.
        section: dotted path of the section it was written in; its own fields come first.
    """
    plain = name.lower().replace("-", "_")
    places = list(_places(model))
    for wanted in (plain, _meant(plain, _FIELDS)):
        found = [place for place in places if place == wanted or place.endswith(f".{wanted}")]
        found.sort(key=lambda place: not place.startswith(f"{section}."))
        if found:
            return found[0]
    return None


def option_called(name: str) -> str | None:
    """The option of a trainer that other programs call `name`."""
    return _meant(name.lower().replace("-", "_"), _OPTIONS)


def command_called(name: str) -> str | None:
    """The command that other programs call `name`."""
    return _meant(name.lower().replace("-", "_"), _COMMANDS)


def _meant(name: str, table: dict[str, str]) -> str | None:
    return next((meant for meant, names in table.items() if name in names.split()), None)


def _places(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Dotted paths of all fields, depth first."""
    for name, field in model.model_fields.items():
        yield prefix + name
        for inner in models_in(field.annotation):
            yield from _places(inner, f"{prefix}{name}.")


def models_in(annotation: object) -> Iterator[type[BaseModel]]:
    """The sections that a field's type allows."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from models_in(part)
