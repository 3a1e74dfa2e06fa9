"""`ldm compare` on results of `ldm eval`: their numbers side by side, as far as they were measured in one way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm_cli.errors import DataError
from ldm_cli.formats.json_file import read_json
from ldm_cli.stages.support.eval_result import RESULT_NAME
from ldm_cli.storage import is_sealed
from ldm_cli.training.run_identity import flatten, recipe_changes

_NETWORKS = {
    **dict.fromkeys(("clip_score", "frechet_distance", "cmmd"), "clip"),
    **dict.fromkeys(("fid", "kid", "prdc", "is"), "inception"),
    "fd_dinov2": "dinov2",
}
"""The network that measures, by metric. Others measure a network, or take none."""
_OF_PICTURES = {*_NETWORKS, "attribute_accuracy"}


@dataclass(frozen=True)
class _Result:
    """A result, or a point of a sweep."""

    name: str
    metrics: Mapping[str, Any]
    provenance: Mapping[str, Any]


def run(files: Sequence[Path]) -> dict[str, Any]:
    """The numbers of several results that may be compared.

    Args:
        files: that `ldm eval` wrote. Each point of a sweep counts as a result.

    Returns:
        `results`: `name` and `numbers` of each; `not_compared`: the reason for every metric that is left out.

    Raises:
        InputNotFoundError, CheckpointError: a file is missing, or no JSON.
        DataError: a file is no result of `ldm eval`, or no metric may be compared.
    """
    results = [result for file, name in zip(files, _names(files), strict=True) for result in _read(file, name)]
    reasons = {metric: _reason(metric, results) for metric in dict.fromkeys(m for one in results for m in one.metrics)}
    compared = [metric for metric, reason in reasons.items() if not reason]
    refused = {metric: reason for metric, reason in reasons.items() if reason}
    if not compared:
        causes = "; ".join(f"{metric}: {reason}" for metric, reason in refused.items())
        raise DataError("no metric can be compared", causes, "measure all in the same way")
    numbers = [flatten({metric: one.metrics[metric] for metric in compared}) for one in results]
    return {
        "results": [
            {"name": one.name, "numbers": {name: value for name, value in own.items() if ".num_" not in name}}
            for one, own in zip(results, numbers, strict=True)
        ],
        "not_compared": refused,
    }


def _names(files: Sequence[Path]) -> list[str]:
    """Short names: of `eval.json` that of its folder, else that of the file; paths where two would be equal."""
    short = [file.resolve().parent.name if file.name == RESULT_NAME else file.stem for file in files]
    return short if len(set(short)) == len(short) else [str(file) for file in files]


def _read(file: Path, name: str) -> list[_Result]:
    content = read_json(file)
    metrics, provenance, points = content.get("metrics"), content.get("provenance"), content.get("points")
    if not isinstance(metrics, dict) or not isinstance(provenance, dict) or "recipe" not in provenance:
        raise DataError(f"cannot compare '{file}'", "it is no result of ldm eval")
    if "sha256" in content and not is_sealed(content):
        raise DataError(f"'{file}' is damaged", "it is not as it was written", "measure again with ldm eval")
    if not points:
        return [_Result(name, metrics, provenance)]
    found = []
    try:
        for point in points:
            settings = [f"{field} {value}" for field, value in point["settings"].items()]
            found.append(_Result(", ".join([name, point["pipeline"], *settings]), point["metrics"], provenance))
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"cannot compare '{file}'", "its points are none of ldm eval") from error
    return found


def _reason(metric: str, results: Sequence[_Result]) -> str:
    """Why a metric of these results cannot be compared; empty if it can."""
    if lacking := [one.name for one in results if metric not in one.metrics]:
        return f"{lacking[0]} lacks it"
    first, *others = results
    for other in others:
        before, after = _basis(metric, first.provenance), _basis(metric, other.provenance)
        if changes := recipe_changes(before, after)[1]:
            return f"{first.name} and {other.name} differ in {'; '.join(changes)}"
    return ""


def _basis(metric: str, provenance: Mapping[str, Any]) -> dict[str, Any]:
    """What must be equal for numbers of a metric to be comparable, as nested data."""
    recipe, data = provenance["recipe"], provenance["data"]
    basis = {"data": recipe["data"], "real set": data["fingerprint"], "num_samples": data["num_samples"]}
    if metric in _OF_PICTURES:
        basis["num_generated"] = data["num_generated"]
    if metric == "zero_shot":
        basis["zero_shot"] = recipe["eval"]["zero_shot"]
    if network := _NETWORKS.get(metric):
        own = provenance["models"][network]
        basis[network] = {name: own[name] for name in ("sha256", "preprocessing") if name in own}
    return basis
