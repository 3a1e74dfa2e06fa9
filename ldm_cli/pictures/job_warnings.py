"""Settings of a job that change no picture, sizes far from that of the model's training, and words in its prompts that
other programs take as commands."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from ldm_cli.families.family import Family, ImageGenerator
from ldm_cli.families.prompt_chunks import BREAK
from ldm_cli.families.prompt_weights import parse_weights
from ldm_cli.pictures.job import Item
from ldm_cli.sampling.config import SamplingConfig, SizesConfig
from ldm_cli.sampling.denoising import sampler_of, takes_eta
from ldm_cli.sampling.latent_sampler import prompts_of

_MOST_NAMED = 3
_NEAR = (0.4, 2.5)
"""Multiples of the side that a model was trained at, between which its pictures are worth a try."""
_ESCAPED = re.compile(r"\\.")
_COMMANDS = re.compile(
    r"""
      (?i:<[a-z]+(?:\[[^\[\]<>]*\])?:[^<>]*>)           # further networks, <random:this,that>
    | \b(?:BREAK|AND|ADD(?:BASE|COMM|COL|ROW))\b       # several prompts in one
    | \[[^\[\]]*\]                                      # [less], [this|that], [this:that:8]
    | \{[^{}]*\}                                        # {more}, {this|that}
    | \(\([^()]*\)\) | \([^()]*:[^()\w]*[\d.,]+\s*\)    # ((more)), (weights:-1) that are not read
    | \bembedding:[\w./-]+ | __[\w/*-]+__               # embeddings and word lists by name
    | \w*::-?\d[\d.]* | (?<!\S)--(?:ar|aspect|no|iw|niji|stylize|style|chaos|tile|v|q|s)\b
    | \)(?:\+{1,5}|-{1,5}|\d?\.\d+)(?!\w) | \w{3,}\+{2,5}(?!\w) | \)\.(?:and|blend|swap)\(
    | \b(?:Negative\ prompt|CFG\ scale):               # the settings that a picture was made with
    """,
    re.VERBOSE,
)


def job_warnings(items: Sequence[Item], family: ImageGenerator, weighted: bool, window: int | None = None) -> list[str]:
    """One message for each kind of setting, size or word without the effect that it seems to ask for.

    Args:
        weighted: whether `(word:1.3)` in a prompt is a weight.
        window: side of the windows in which large pictures are denoised; None: they are not.
    """
    found: dict[str, str] = {}
    for sampling in dict.fromkeys(item.sampling for item in items):
        for kind, message in (*_unused_settings(sampling, family), *_far_sizes(sampling, family, window)):
            found.setdefault(kind, message)
    for item in items:
        for kind, message in _unused_prompts(item, family):
            found.setdefault(kind, message)
    texts = [
        BREAK.sub(" ", text) if item.sampling.long_prompts else text
        for item in items
        for text in prompts_of(item.request, item.sampling.negative)
    ]
    if commands := foreign_commands(dict.fromkeys(texts), weighted):
        named = ", ".join(map(repr, commands[:_MOST_NAMED])) + (", …" if len(commands) > _MOST_NAMED else "")
        found["commands"] = f"prompts hold {named}: commands of other programs, which are read as words here"
    return list(found.values())


def foreign_commands(prompts: Iterable[str], weighted: bool) -> list[str]:
    """The parts of prompts that web interfaces take as commands, each once; arguments as in `job_warnings`."""
    commands: dict[str, None] = {}
    for prompt in prompts:
        text = _ESCAPED.sub(" ", prompt)
        if weighted:
            text = "".join(piece.text for piece in parse_weights(text))
        matches = [match[0] for match in _COMMANDS.finditer(text)]
        commands |= dict.fromkeys(
            command
            for command in matches
            if not (command in ("BREAK", "AND") and text.isupper()) and (weighted or not command.startswith("("))
        )
    return list(commands)


def _unused_settings(config: SamplingConfig, family: ImageGenerator) -> Iterator[tuple[str, str]]:
    """The kind and the message of each setting that changes nothing."""
    guidance, is_distilled = config.guidance, family.guidance_width is not None
    if isinstance(family, Family) and config.eta is not None and not takes_eta(family.settings, config):
        yield "eta", f"sampling.eta={config.eta:g} has no effect on {sampler_of(family.settings, config)}"
    given_sizes = {"sizes": config.sizes, "negative_sizes": config.negative_sizes}
    if not family.takes_sizes:
        for name, sizes in given_sizes.items():
            if sizes not in (None, SizesConfig()):
                yield name, f"sampling.{name} has no effect on a model that takes no sizes"
    is_perturbed = guidance.perturb is not None and guidance.perturb.scale > 0.0
    given = {
        "guidance.apg": guidance.apg is not None,
        "guidance.rescale": guidance.rescale > 0.0,
        "guidance.model": guidance.model is not None,
        "guidance.interval": guidance.interval is not None and not is_perturbed,
        "negative": bool(config.negative),
    }
    names: Iterable[str] = ()
    if is_distilled or guidance.scale == 1.0:
        names = given
        reason = "on a model that was distilled with guidance" if is_distilled else "with sampling.guidance.scale=1"
    elif guidance.scale == 0.0:
        names, reason = ("guidance.apg", "guidance.rescale"), "with sampling.guidance.scale=0"
    elif guidance.model is not None:
        names, reason = ("negative",), "with sampling.guidance.model"
    for name in names:
        if given[name]:
            yield name, f"sampling.{name} has no effect {reason}"


def _far_sizes(config: SamplingConfig, family: ImageGenerator, window: int | None) -> Iterator[tuple[str, str]]:
    """The kind and the message of a size that is far from that of the model's training."""
    if not isinstance(family, Family) or family.low_resolution is not None or window is not None:
        return
    own = [(side or 0) * family.codec.factor for side in family.sample_size]
    asked = [config.height or own[0], config.width or own[1]]
    if all(own) and not all(_NEAR[0] < side / usual < _NEAR[1] for side, usual in zip(asked, own, strict=True)):
        is_large = max(asked) > max(own)
        remedy = "enlarge smaller ones by --upscale MODEL, or add --tile" if is_large else "leave --size out"
        sizes = f"{asked[1]}x{asked[0]} is far from {own[1]}x{own[0]}, the size of the model's training"
        yield "size", f"size {sizes}, and pictures may look wrong; {remedy}"


def _unused_prompts(item: Item, family: ImageGenerator) -> Iterator[tuple[str, str]]:
    """The kind and the message of each setting that leaves the prompt without effect."""
    guidance, edit = item.sampling.guidance, item.edit
    # Outside of the interval the scale is 1.
    follows_prompt = guidance.scale != 0.0 or guidance.interval is not None or guidance.model is not None
    follows_prompt = follows_prompt or (guidance.clip is not None and guidance.clip.scale > 0.0)
    if item.request.prompt and not follows_prompt and family.guidance_width is None:
        yield "scale", "sampling.guidance.scale=0 ignores the prompt; where the card of a Turbo model says 0, give 1"
    if edit.image is not None and int(edit.resolved_strength * item.sampling.steps) == 0:
        yield (
            "strength",
            f"edit.strength={edit.resolved_strength:g} of {item.sampling.steps} steps leaves none: "
            "the prompt is ignored, the picture only passes through the autoencoder",
        )
