"""What five billion samples on a thousand ranks cost each process, by simulation: python benchmarks/scale.py

There are no shards, only what an index knows of them: their names, sizes and counts. All else is the code of training.
Opening real files takes one `stat` a shard more. The result is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from array import array
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

from ldm_cli.data.config import DataConfig
from ldm_cli.data.order import Order, rank_slice
from ldm_cli.data.patterns import expand_braces
from ldm_cli.data.shard_facts import ShardFacts, read_shard_facts, write_shard_facts
from ldm_cli.data.shard_paths import ShardPaths
from ldm_cli.data.shards import ShardSet, ShardTables
from ldm_cli.data.step_plan import StepPlan

_BYTES_PER_SAMPLE = 45_000
_SEED = 1
T = TypeVar("T")


def simulate(num_shards: int, samples: int, num_ranks: int, batch_size: int, positions: int) -> dict[str, Any]:
    """Time and memory of one process of a run.

    Args:
        num_shards: of the data set.
        samples: of most shards; every 7th has one less, so that no sum is a product.
        num_ranks: processes that train together.
        batch_size: samples per step over all ranks.
        positions: how many random positions are found, and compared with those of another process.
    """
    counts = array("q", (samples - (shard % 7 == 0) for shard in range(num_shards)))
    names = [f"/data/{{00000..{num_shards - 1:05d}}}.tar"]
    _write_facts(names, counts)
    config = DataConfig(shards=names[0])
    before = _resident()
    shards, open_seconds = _timed(lambda: _open(names))
    plan, plan_seconds = _timed(lambda: StepPlan(_SEED, shards, config, batch_size))
    megabytes = (_resident() - before) / 2**20
    total = shards.num_samples
    dice = random.Random(0)
    order, fresh = (Order(_SEED, shards.sizes, config.shuffle_window) for _ in range(2))
    places = [(dice.randrange(20), dice.randrange(total)) for _ in range(positions)]
    found = [_timed(partial(order, *place)) for place in places]
    dice.shuffle(shuffled := list(range(positions)))
    same = sum(fresh(*places[number]) == found[number][0] for number in shuffled)
    late = 7 * total // batch_size + 12_345
    resumed = {}
    for name, step in (("step 0", 0), ("epoch 7", late)):
        begin = partial(_first_step, shards, config, batch_size, step)
        resumed[name] = median(_timed(begin)[1] for _ in range(3))
    part = rank_slice(batch_size, num_ranks - 1, num_ranks)
    _, step_seconds = _timed(lambda: [plan.step(late + number, part) for number in range(100)])
    return {
        "shards": num_shards,
        "samples": total,
        "ranks": num_ranks,
        "open_seconds": round(open_seconds, 3),
        "plan_seconds": round(plan_seconds, 3),
        "megabytes": round(megabytes, 1),
        "position_ms": {
            "median": round(1e3 * median(seconds for _, seconds in found), 3),
            "p99": round(1e3 * sorted(seconds for _, seconds in found)[int(0.99 * positions)], 3),
        },
        "equal_positions": same,
        "of_positions": positions,
        "resume_seconds": {name: round(seconds, 3) for name, seconds in resumed.items()},
        "step_of_a_rank_ms": round(10 * step_seconds, 3),
        **_traffic(order, samples, config.shuffle_window, batch_size, num_ranks),
    }


def _first_step(shards: ShardSet, config: DataConfig, batch_size: int, step: int) -> object:
    """What a run that is continued at a step begins with."""
    return StepPlan(_SEED, shards, config, batch_size).step(step, slice(0, 8))


def _traffic(order: Order, samples: int, window: int, batch_size: int, num_ranks: int) -> dict[str, Any]:
    """What ranks read of shards, per step and per epoch."""
    steps_per_window = window * samples / batch_size
    own = batch_size // num_ranks
    touched = {order(0, position)[0] for position in range(own)}
    return {
        "shards_touched_by_a_rank_in_a_step": len(touched),
        "steps_per_window": round(steps_per_window, 2),
        "new_shards_per_step": round(window / steps_per_window, 2),
        "bytes_of_two_windows": 2 * window * samples * _BYTES_PER_SAMPLE,
        "bytes_read_by_a_rank_in_a_step": own * _BYTES_PER_SAMPLE,
    }


def _write_facts(names: list[str], counts: array[int]) -> None:
    """What `ldm data index` would leave of these shards."""
    stamps, number = array("q"), len(counts)
    for count in counts:
        stamps.extend((count * _BYTES_PER_SAMPLE, 0, 0))
    contents = b"".join(shard.to_bytes(32, "little") for shard in range(number))
    facts = ShardFacts(counts, stamps, contents, b"", {}, {"jpg": sum(counts)}, is_indexed=True)
    write_shard_facts(_paths(names), facts)


def _paths(names: list[str]) -> ShardPaths:
    return ShardPaths(path for name in names for path in expand_braces(name))


def _open(names: list[str]) -> ShardSet:
    paths = _paths(names)
    facts = read_shard_facts(paths, None)
    assert facts is not None
    return ShardSet(paths, facts, ShardTables(paths, facts, {}), (range(len(paths)),))


def _timed(work: Callable[[], T]) -> tuple[T, float]:
    start = time.perf_counter()
    result = work()
    return result, time.perf_counter() - start


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    """Print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=int, default=500_000)
    parser.add_argument("--samples", type=int, default=10_000, help="samples per shard")
    parser.add_argument("--ranks", type=int, default=1024)
    parser.add_argument("--batch-size", type=int, default=8192)
    parser.add_argument("--positions", type=int, default=10_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        os.environ["XDG_CACHE_HOME"] = cache
        result = simulate(options.shards, options.samples, options.ranks, options.batch_size, options.positions)
    json.dump(result, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
