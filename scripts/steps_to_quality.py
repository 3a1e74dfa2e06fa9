"""What each sampler reaches in how many steps: python scripts/steps_to_quality.py results.json SAMPLER… --steps 5 10 20

For every sampler and number of steps the pictures of the recipe's first captions are generated from the same seeds,
and measured as `ldm eval` does. New results are added to the file, and a table is printed.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, get_args

import torch

from ldm_cli.data.open_shards import open_shards
from ldm_cli.errors import UsageError
from ldm_cli.evaluation.attribute_accuracy import score_scenes
from ldm_cli.evaluation.frechet import fit_gaussian, frechet_distance
from ldm_cli.recipe.load import load_recipe
from ldm_cli.recipe.schema import EvalRecipe
from ldm_cli.reporting import SilentReporter
from ldm_cli.sampling.config import SamplerName
from ldm_cli.stages.support.eval_samples import Gathered, Models, load_models, measure_generated, measure_real


def measured(recipe: EvalRecipe, models: Models, real: Gathered, sampler: str, steps: int) -> dict[str, float]:
    """Share of single objects with the right shape and colour, and the Fréchet distance on CLIP's features."""
    changes = {"sampler": sampler, "steps": steps}
    config = recipe.eval.model_copy(update={"sampling": recipe.eval.sampling.model_copy(update=changes)})
    generated = measure_generated(config, real, models, SilentReporter())
    scores: dict[str, Any] = score_scenes(generated.scenes, real.metadata[: len(generated.scenes)], stated_only=True)
    gaussians = [fit_gaussian(torch.cat(features)) for features in (real.image_features, generated.image_features)]
    return {"accuracy": scores["all"]["shape_and_color"], "distance": float(frechet_distance(*gaussians))}


def table(results: dict[str, dict[str, float]], num_pictures: int) -> str:
    """Results as Markdown: a row for each sampler, a column for each number of steps."""
    names = list(dict.fromkeys(key.split()[0] for key in results))
    columns = sorted({int(key.split()[1]) for key in results})
    lines = ["| sampler | " + " | ".join(f"{n} steps" for n in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name in names:
        cells = [results.get(f"{name} {n}") for n in columns]
        shown = [f"{100 * c['accuracy']:.0f} %, {c['distance']:.1f}" if c else "–" for c in cells]
        lines.append(f"| `{name}` | " + " | ".join(shown) + " |")
    return "\n".join([*lines, "", f"{num_pictures} pictures each"])


def main() -> None:
    """Measure what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("samplers", nargs="*", metavar="SAMPLER", default=get_args(SamplerName))
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 10, 20, 50])
    parser.add_argument("--num-pictures", type=int, default=64)
    parser.add_argument("--recipe", default="demo/eval")
    options = parser.parse_args()
    metrics = "eval.metrics=[frechet_distance,attribute_accuracy]"
    changes = (metrics, f"eval.num_generated={options.num_pictures}")
    recipe = load_recipe(Path(options.recipe), changes, expected_command="eval").recipe
    assert isinstance(recipe, EvalRecipe)
    models = load_models(recipe.eval, torch.device("cpu"))
    real = measure_real(
        recipe, open_shards(recipe.data.shards, recipe.data, SilentReporter()), models, SilentReporter()
    )
    results = json.loads(options.results.read_text()) if options.results.exists() else {}
    for steps in options.steps:
        for sampler in options.samplers:
            if f"{sampler} {steps}" in results:
                continue
            try:
                results[f"{sampler} {steps}"] = measured(recipe, models, real, sampler, steps)
            except UsageError as error:  # some take no more steps than the model has levels between its ends
                print(f"{sampler}, {steps} steps: {error}", file=sys.stderr)
            options.results.write_text(json.dumps(results, indent=1))
    print(table(results, options.num_pictures))


if __name__ == "__main__":
    main()
