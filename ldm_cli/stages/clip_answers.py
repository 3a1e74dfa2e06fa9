"""`ldm clip classify | tag | ask | score`: pictures compared with labels, captions, answers, and their own captions."""

from __future__ import annotations

import os.path
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm_cli.errors import DataError, UsageError
from ldm_cli.evaluation import metrics
from ldm_cli.evaluation.nearest import nearest
from ldm_cli.evaluation.questions import statement
from ldm_cli.pictures.images import save_image
from ldm_cli.reporting import Reporter
from ldm_cli.stages.clip_search import expect_sheet, sheet_of
from ldm_cli.stages.support.clip_inputs import Clip, ClipOptions, open_picture_sets, picture_rows, texts_of
from ldm_cli.stages.support.picture_sets import PictureSet

IMAGENET = "imagenet"
"""The name of the 80 templates for ImageNet of Radford et al. 2021, arXiv:2103.00020, section 3.1.4."""
_IMAGENET_FILE = Path(metrics.__file__).with_name("imagenet_templates.txt")


def classify(
    sources: Sequence[str], labels: str, templates: str, top: int, options: ClipOptions, reporter: Reporter
) -> dict[str, Any]:
    """The most probable labels of each picture.

    Each label is the mean of its prompts in all templates (`class_embeddings`).

    Args:
        sources: pictures, as in `open_pictures`.
        labels: between commas, or a file with one per line.
        templates: texts with `{}` between commas, a file with one per line, or `imagenet`.
        top: labels to give for each picture.
        options, reporter: as in every command of `ldm clip`.

    Returns:
        `pictures`, each with `source`, `name` and `results`: `label`, `probability`, `cosine`. `num_labels`,
        `templates`, `provenance`.

    Raises:
        UsageError: a template has no `{}`; other errors as in `Clip` and `texts_of`.
    """
    names = texts_of(labels, "--labels")
    forms = texts_of(str(_IMAGENET_FILE) if templates == IMAGENET else templates, "--templates")
    if wrong := [form for form in forms if "{}" not in form]:
        raise UsageError(f"the template {wrong[0]!r} has no place for a label", remedy="write {} where it goes")
    sets, clip = open_picture_sets(sources, reporter), Clip(options, reporter)
    prompts = clip.texts([form.replace("{}", name) for name in names for form in forms])
    classes = metrics.class_embeddings(prompts.view(len(names), len(forms), -1))
    found = _judged(sets, clip, classes, [{"label": name} for name in names], top, with_probability=True)
    shown = templates if templates == IMAGENET else forms
    return {"pictures": found, "num_labels": len(names), "templates": shown, "provenance": clip.provenance()}


def tag(
    sources: Sequence[str], captions: str | None, top: int, options: ClipOptions, reporter: Reporter
) -> dict[str, Any]:
    """The captions nearest to each picture.

    Args:
        sources: pictures, as in `open_pictures`.
        captions: between commas, a file with one per line, a folder or shards whose captions are taken; None: those
            of the pictures themselves.
        top: captions to give for each picture.
        options, reporter: as in every command of `ldm clip`.

    Returns:
        `pictures`, each with `source`, `name` and `results`: `caption`, `cosine`. `num_captions`, `provenance`.

    Raises:
        DataError: there is no caption; other errors as in `Clip`.
    """
    sets = open_picture_sets(sources, reporter)
    # Path.is_dir raises OSError for a list that is too long for a name.
    if captions and not (captions.endswith(".tar") or os.path.isdir(captions)):  # noqa: PTH112
        candidates = texts_of(captions, "--captions")
    else:
        own = open_picture_sets([captions], reporter) if captions else sets
        candidates = list(dict.fromkeys(filter(None, _captions(own))))
    if not candidates:
        raise DataError("there are no captions to choose from", remedy="give --captions")
    clip = Clip(options, reporter)
    found = _judged(sets, clip, clip.texts(candidates), [{"caption": text} for text in candidates], top)
    return {"pictures": found, "num_captions": len(candidates), "provenance": clip.provenance()}


def ask(source: str, question: str, answers: str, options: ClipOptions, reporter: Reporter) -> dict[str, Any]:
    """The most probable answers to a question about each picture.

    Args:
        source: pictures, as in `open_pictures`.
        question: in English; `statement` has the rules.
        answers: between commas, or a file with one per line.
        options, reporter: as in every command of `ldm clip`.

    Returns:
        `question`; `pictures`, each with `source`, `name` and `results`: `answer`, `statement`, `probability`,
        `cosine`; `provenance`. Errors are those of `Clip` and `texts_of`.
    """
    offered = texts_of(answers, "--answers")
    rows = [{"answer": answer, "statement": statement(question, answer)} for answer in offered]
    sets, clip = open_picture_sets([source], reporter), Clip(options, reporter)
    vectors = clip.texts([row["statement"] for row in rows])
    found = _judged(sets, clip, vectors, rows, len(rows), with_probability=True)
    return {"question": question, "pictures": found, "provenance": clip.provenance()}


def score(
    sources: Sequence[str],
    caption: str | None,
    options: ClipOptions,
    reporter: Reporter,
    *,
    top: int = 10,
    sheet: Path | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """How well captions fit their pictures.

    Args:
        sources: pictures, as in `open_pictures`, with captions.
        caption: one for all pictures; None: their own. Pictures without one are left out, with a warning.
        options, reporter: as in every command of `ldm clip`.
        top: pictures on the sheet.
        sheet: where to draw those of the lowest scores; None: nowhere.

    Returns:
        The means of `summarize_clip_score`; `pictures`, each with `source`, `name`, `caption`, `cosine` and
        `clipscore_hessel`; `sheet`, with one; `provenance`.

    Raises:
        DataError: no picture has a caption, or none of those with one can be read; other errors as in
            `Clip` and `expect_sheet`.
    """
    expect_sheet(sheet, overwrite=overwrite)
    sets = open_picture_sets(sources, reporter)
    captions = [caption] * sum(len(one.files) for one in sets) if caption else _captions(sets)
    if not any(captions):
        raise DataError("no picture has a caption", remedy="give --caption, or NAME.txt beside each picture")
    if missing := captions.count(""):
        reporter.warn(f"{missing} pictures without a caption are left out")
    clip = Clip(options, reporter)
    images, numbers = clip.pictures(sets)
    kept = [row for row, number in enumerate(numbers) if captions[number]]
    if not kept:
        raise DataError("no picture with a caption can be read")
    captions, rows = [captions[numbers[row]] for row in kept], picture_rows(sets, [numbers[row] for row in kept])
    distinct = {text: place for place, text in enumerate(dict.fromkeys(captions))}
    texts, images = clip.texts(list(distinct))[[distinct[text] for text in captions]], images[kept]
    cosines = metrics.clip_score(images, texts)
    pairs = [
        {**row, "caption": text, "cosine": cosine, "clipscore_hessel": 2.5 * max(cosine, 0.0)}
        for row, text, cosine in zip(rows, captions, cosines.tolist(), strict=True)
    ]
    result: dict[str, Any] = {**metrics.summarize_clip_score(cosines), "pictures": pairs}
    if sheet is not None:
        lowest = sorted(pairs, key=lambda pair: float(pair["cosine"]))[:top]
        save_image(sheet, sheet_of([{"text": "lowest scores", "results": lowest}], sets, reporter))
        result["sheet"] = str(sheet)
    return {**result, "provenance": clip.provenance()}


def _captions(sets: Sequence[PictureSet]) -> list[str]:
    """The caption of each picture, in order; empty where it has none."""
    return [one.caption(number) for one in sets for number in range(len(one.files))]


def _judged(
    sets: Sequence[PictureSet],
    clip: Clip,
    candidates: Tensor,
    about: Sequence[dict[str, str]],
    top: int,
    *,
    with_probability: bool = False,
) -> list[dict[str, Any]]:
    """The nearest candidates of each picture, the nearest first.

    Args:
        candidates: float32 [C, D] of length 1.
        about: of each candidate, what its results say.
        top: results per picture.
        with_probability: add the softmax of all cosines, times the logit scale.
    """
    images, numbers = clip.pictures(sets)
    cosines, places = nearest(images, candidates, top)
    totals = torch.logsumexp(clip.logit_scale * images @ candidates.T, dim=1, keepdim=True)
    probabilities = (clip.logit_scale * cosines - totals).exp().tolist()
    found = []
    for row, near, rows, chances in zip(
        picture_rows(sets, numbers), cosines.tolist(), places.tolist(), probabilities, strict=True
    ):
        results = [
            {**about[place], **({"probability": chance} if with_probability else {}), "cosine": cosine}
            for place, cosine, chance in zip(rows, near, chances, strict=True)
        ]
        found.append({**row, "results": results})
    return found
