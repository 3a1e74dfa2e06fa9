"""A whole unCLIP model of a decoder and a prior that were trained apart."""

from __future__ import annotations

from pathlib import Path

from ldm_cli.errors import CheckpointError, UsageError
from ldm_cli.families.latent_diffusion import pipeline_of
from ldm_cli.families.open_family import open_family, resolve_model
from ldm_cli.families.prior import open_prior
from ldm_cli.families.unclip import UnCLIP
from ldm_cli.formats.model_source import weights_sha256
from ldm_cli.formats.pipeline_folder import IMAGE_ENCODER, INDEX_NAME, PRIOR_PIPELINE


def joined_with_prior(decoder: Path, prior: Path) -> UnCLIP:
    """The model of two folders or runs, in float32.

    Raises:
        UsageError: the first is no decoder of image embeddings, or the second no prior.
        InputNotFoundError, CheckpointError: one cannot be read, or they do not fit: also if their embeddings are those
            of two CLIPs.
    """
    family, prior = open_family(decoder, "cpu", "fp32"), resolve_model(prior)
    if not isinstance(family, UnCLIP):
        remedy = "give a run of train-unet with image_embedding"
        raise UsageError(f"'{decoder}' takes no prior", "it is no decoder of image embeddings", remedy)
    if (kind := pipeline_of(prior)) != PRIOR_PIPELINE:
        found = f"it holds a {kind}" if kind else f"it has no {INDEX_NAME}"
        raise UsageError(f"--prior '{prior}' is no prior", found, "give a run of train-prior")
    joined = family.with_prior(open_prior(prior, "cpu", "fp32"))
    if family.image_encoder is not None and family.folder is not None:
        ours, theirs = (weights_sha256(folder / IMAGE_ENCODER) for folder in (family.folder, prior))
        if ours != theirs:
            cause = "their image encoders differ, and so do the embeddings that they know"
            raise CheckpointError("prior and decoder do not fit", cause, "train both with one CLIP")
    return joined
