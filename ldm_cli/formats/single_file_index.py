"""Index and scheduler of the pipeline in a single file, which holds neither."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ldm_cli.formats.pipeline_folder import (
    DIFFUSERS_VERSION,
    INDEX_NAME,
    SCHEDULER_FILE,
    TEXT_ENCODER,
    TEXT_ENCODER_2,
    TEXT_ENCODER_3,
    TRANSFORMER,
    UNET,
    VAE,
    tokenizer_of,
)

_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
_FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
_CHANNELS_WITH_MASK = 9
_EMPTY = [None, None]
# ComfyUI's marks of a U-Net that predicts a velocity, and of one that was trained at zero SNR.
_VELOCITY_MARK, _ZERO_SNR_MARK = "v_pred", "ztsnr"
# Steps after which Stable Diffusion 2 was published with a prediction of the noise; only pickles tell them.
_EPSILON_AT_STEP = 875000


def pipeline_files(
    configs: Mapping[str, Mapping[str, Any]], file: Path, names: Collection[str], metadata: Mapping[str, str]
) -> dict[str, dict[str, Any]]:
    """Index and scheduler by relative path; nothing where a U-Net, an autoencoder and a text encoder are not together.

    The text encoders of Stable Diffusion 3 may lie beside the file.

    Args:
        configs: configuration of each model, by subfolder.
        file: the single file.
        names: of all tensors in the file.
        metadata: of the file.
    """
    if {TRANSFORMER, VAE} <= configs.keys():
        return _files_of_3(configs, file)
    if not {UNET, VAE, TEXT_ENCODER} <= configs.keys():
        return {}
    is_xl, in_channels = TEXT_ENCODER_2 in configs, configs[UNET]["in_channels"]
    is_2 = not is_xl and bool(configs[UNET]["use_linear_projection"])
    kind = ("XL" if is_xl else "") + ("Inpaint" if in_channels == _CHANNELS_WITH_MASK else "")
    scheduler = {**_BETAS, **_solver(is_xl, is_2), "steps_offset": 1, "timestep_spacing": "leading"}
    scheduler["prediction_type"] = _prediction(is_2 and in_channels != _CHANNELS_WITH_MASK, names, metadata)
    if _ZERO_SNR_MARK in names:
        scheduler |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    index: dict[str, Any] = {
        "_class_name": f"StableDiffusion{kind}Pipeline",
        "_diffusers_version": DIFFUSERS_VERSION,
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "feature_extractor": _EMPTY,
        "image_encoder": _EMPTY,
        **{name: _library_and_class(config) for name, config in configs.items()},
        **{tokenizer_of(name): ["transformers", "CLIPTokenizer"] for name in configs if "text" in name},
    }
    index |= (
        {"force_zeros_for_empty_prompt": True}
        if is_xl
        else {"requires_safety_checker": False, "safety_checker": _EMPTY}
    )
    return {INDEX_NAME: index, str(SCHEDULER_FILE): scheduler}


def _files_of_3(configs: Mapping[str, Mapping[str, Any]], file: Path) -> dict[str, dict[str, Any]]:
    """Index and scheduler of Stable Diffusion 3."""
    text = {name: ["transformers", "CLIPTextModelWithProjection"] for name in (TEXT_ENCODER, TEXT_ENCODER_2)}
    tokenizers = {tokenizer_of(name): ["transformers", "CLIPTokenizer"] for name in text}
    has_t5 = TEXT_ENCODER_3 in configs or beside(file, TEXT_ENCODER_3) is not None
    index: dict[str, Any] = {
        "_class_name": "StableDiffusion3Pipeline",
        "_diffusers_version": DIFFUSERS_VERSION,
        "scheduler": ["diffusers", _FLOW["_class_name"]],
        "feature_extractor": _EMPTY,
        "image_encoder": _EMPTY,
        **text,
        **tokenizers,
        TEXT_ENCODER_3: ["transformers", "T5EncoderModel"] if has_t5 else _EMPTY,
        tokenizer_of(TEXT_ENCODER_3): ["transformers", "T5TokenizerFast"] if has_t5 else _EMPTY,
        **{name: _library_and_class(configs[name]) for name in (TRANSFORMER, VAE)},
    }
    return {INDEX_NAME: index, str(SCHEDULER_FILE): dict(_FLOW)}


def beside(file: Path, component: str) -> Path | None:
    """The folder of a component that a single file does not hold: `a/x/NAME` or `a/NAME` for `a/x.safetensors`."""
    places = [file.with_suffix("") / component, file.parent / component]
    return next((place for place in places if place.is_dir()), None)


def sample_size(scheduler: Mapping[str, Any], configs: Collection[str]) -> int:
    """Side of the latents that the published model was trained at: XL at 1024 px, 2 with velocity at 768, else 512."""
    if TEXT_ENCODER_2 in configs:
        return 128
    return 96 if scheduler.get("prediction_type") == "v_prediction" else 64


def _solver(is_xl: bool, is_2: bool) -> dict[str, Any]:
    """The class of the published model's scheduler."""
    if is_xl:
        return {"_class_name": "EulerDiscreteScheduler"}
    if is_2:
        return {"_class_name": "DDIMScheduler", "clip_sample": False, "set_alpha_to_one": False}
    return {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "set_alpha_to_one": False}


def _prediction(is_2: bool, names: Collection[str], metadata: Mapping[str, str]) -> str:
    """What the file says; where it says nothing, velocity for Stable Diffusion 2, as diffusers decides."""
    said = metadata.get("modelspec.prediction_type", "v" if _VELOCITY_MARK in names else None)
    if said is None:
        said = "v" if is_2 and metadata.get("global_step") != str(_EPSILON_AT_STEP) else "epsilon"
    return "v_prediction" if said in ("v", "v_prediction") else "epsilon"


def _library_and_class(config: Mapping[str, Any]) -> list[str]:
    if "_class_name" in config:
        return ["diffusers", str(config["_class_name"])]
    return ["transformers", str(config["architectures"][0])]
