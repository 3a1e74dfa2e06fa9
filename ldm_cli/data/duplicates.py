"""Near-duplicates within a data set, and samples that it shares with another one: what to tell, what to leave out."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm_cli.data.bad_samples import BadSample
from ldm_cli.data.config import DataConfig
from ldm_cli.data.loader import sequential_batches
from ldm_cli.data.near_pairs import Pairs, near_pairs
from ldm_cli.data.open_shards import open_shards
from ldm_cli.data.shards import ShardSet
from ldm_cli.data.signatures import SIDE, Signer, signatures, views
from ldm_cli.errors import InputNotFoundError, OutputError
from ldm_cli.reporting import Reporter
from ldm_cli.storage import storage_errors, write_whole

_NUM_SHOWN = 20
_BATCH = 256


def find_duplicates(
    config: DataConfig, file: Path, against: str | None, threshold: float, reporter: Reporter
) -> dict[str, Any]:
    """Compare all pictures of `config.shards`, and of the shards `against`, by their signatures.

    Returns:
        The report of `report_duplicates`; samples that cannot be decoded are not compared.

    Raises:
        OutputError, StorageError: `file` exists or cannot be written; other errors as in `open_shards`.
    """
    if file.exists():
        raise OutputError(f"'{file}' exists already", remedy="name another file")
    sets = [open_shards(shards, config, reporter) for shards in (against, config.shards) if shards]
    names, pairs = picture_pairs(sets, config, threshold, reporter)
    num_other = len(names[0]) if against else 0
    every = [name for own in names for name in own]
    return report_duplicates(every.__getitem__, (num_other, len(every) - num_other), pairs, threshold, file)


def picture_pairs(
    sets: Sequence[ShardSet], config: DataConfig, threshold: float, reporter: Reporter
) -> tuple[list[list[str]], Pairs]:
    """The names of the pictures of each set that can be decoded, and the near pairs among all of them, by signatures.

    Raises:
        InputNotFoundError: no picture can be decoded; other errors as in `sequential_batches`.
    """
    thumbnails, names, done = list[Tensor](), list[list[str]](), 0
    reading = config.model_copy(update={"image_size": SIDE, "crop": "squash", "max_bad_fraction": 1.0})
    with reporter.progress("reading pictures", sum(one.num_samples for one in sets), unit="sample") as progress:
        for one in sets:
            names.append([])
            for batch in sequential_batches(one, reading, _BATCH, with_captions=False):
                thumbnails.append(batch.images)
                names[-1] += batch.keys
                progress.update(done := done + len(batch))
    if not thumbnails:
        raise InputNotFoundError("there are no pictures to compare", "none can be decoded", "see `ldm data check`")
    pictures = torch.cat(thumbnails)

    def seen(sign: Signer, rows: slice) -> Tensor:
        return sign(pictures[rows])

    vectors = torch.cat([signatures(part) for part in thumbnails])
    return names, near_pairs(vectors, [partial(seen, sign) for sign in views()], threshold, reporter)


def report_duplicates(
    name_of: Callable[[int], str], sizes: tuple[int, int], pairs: Pairs, threshold: float, file: Path
) -> dict[str, Any]:
    """Choose the samples to leave out, and write them as a file for `data.quarantine`.

    A sample is left out if it is near to one of the other set, or to an earlier one of its own that stays. So each is
    near to one that is kept, however long the chains of similar ones are.

    Args:
        name_of: `shard/key` of each vector, or the path of a file in a folder; those of the other set come first.
        sizes: number of vectors of the other set, and of our own.
        pairs: of near vectors.
        threshold: of these pairs.

    Returns:
        `samples`, `threshold`, `pairs` within the set, `groups` (samples that stay, and others are near to them),
        `left_out`; `shared_pairs` and `shared` (left out) with the other set; `recall` of the search, `file`, and the
        `most_similar` pairs.

    Raises:
        StorageError: the file cannot be written.
    """
    num_other, num_samples = sizes
    columns = (pairs.first.tolist(), pairs.second.tolist(), pairs.similarity.tolist())
    near = [pair for pair in zip(*columns, strict=True) if pair[1] >= num_other]
    left_out: dict[int, tuple[int, float]] = {}
    for first, second, cosine in near:
        if first not in left_out:
            left_out.setdefault(second, (first, cosine))
    lines = []
    for row, (kept, cosine) in left_out.items():
        name = name_of(row)
        # A key has no dot in its last part, so such a name is that of a file in a folder, which has no shard.
        shard, _, key = ("", "", name) if "." in name.rpartition("/")[2] else name.partition("/")
        reason = "duplicate" if kept >= num_other else "in the other set"
        lines.append(BadSample(shard and f"{shard}.tar", key, reason, f"like {name_of(kept)}, cosine {cosine:.4f}"))
    with storage_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, "".join(json.dumps(asdict(line)) + "\n" for line in lines))
    shown = sorted(near, key=lambda pair: -pair[2])[:_NUM_SHOWN]
    return {
        "samples": num_samples,
        "threshold": threshold,
        "pairs": sum(first >= num_other for first, _, _ in near),
        "groups": len({kept for kept, _ in left_out.values()}),
        "left_out": len(lines),
        "shared_pairs": sum(first < num_other for first, _, _ in near),
        "shared": sum(line.reason != "duplicate" for line in lines),
        "recall": pairs.recall,
        "file": str(file),
        "most_similar": [{"first": name_of(a), "second": name_of(b), "cosine": cosine} for a, b, cosine in shown],
    }
