"""What Stability AI's modelspec 1.0.1 asks of the metadata of a single file."""

from __future__ import annotations

from ldm_cli.formats.pipeline_folder import INDEX_NAME, SCHEDULER_FILE, TRANSFORMER, UNET
from ldm_cli.stages.support.convertible import FoundModels

# Parameters of the published U-Nets, with 4 channels of input: web interfaces know these sizes only.
_PUBLISHED = {
    859_520_964: "stable-diffusion-v1",
    865_910_724: "stable-diffusion-v2",
    2_567_463_684: "stable-diffusion-xl-v1-base",
}


def modelspec(models: FoundModels, title: str) -> dict[str, str]:
    """The metadata of a pipeline; nothing for a model by itself.

    Args:
        title: of the model, where the source says none.
    """
    if INDEX_NAME not in models.json_files:
        return {}
    denoiser = UNET if UNET in models.models else TRANSFORMER
    spec = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": published_name(models) or f"ldm-cli-{denoiser}-v1",
        "modelspec.implementation": "diffusers",
        "modelspec.title": models.metadata.get("modelspec.title", title),
    }
    if denoiser == UNET:
        prediction = models.json_files[str(SCHEDULER_FILE)].get("prediction_type", "epsilon")
        spec["modelspec.prediction_type"] = "v" if prediction == "v_prediction" else prediction
    return spec


def published_name(models: FoundModels) -> str | None:
    """Name of the published architecture whose sizes the U-Net has; None if it has others."""
    if UNET not in models.models:
        return None
    tensors = models.models[UNET].tensors
    further = tensors["conv_in.weight"][:, 4:].numel()
    return _PUBLISHED.get(sum(tensor.numel() for tensor in tensors.values()) - further)
