"""Files of tensors of which each rank holds a part, through `torch.distributed.checkpoint`.

Each rank writes its parts as safetensors whose headers name the tensor and the place in it. Any number of ranks reads
them. Nothing is unpickled: torch's own metadata file, which is a pickle, is neither written nor read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from ldm_cli.training.host_copy import host_copy
from ldm_cli.training.ranks import Ranks


def is_part(tensor: Tensor) -> bool:
    """Whether a rank holds a part of this tensor."""
    return isinstance(tensor, DTensor)


def host_part(tensor: Tensor) -> Tensor:
    """A DTensor whose local part is a `host_copy`."""
    assert isinstance(tensor, DTensor)
    mesh = tensor.device_mesh
    if mesh.device_type != "cpu":
        assert dist.group.WORLD is not None
        mesh = DeviceMesh.from_group(dist.group.WORLD, "cpu")  # of gloo
    local = host_copy(tensor.to_local())
    shape, stride = tensor.shape, tensor.stride()
    part: Tensor = DTensor.from_local(local, mesh, tensor.placements, run_check=False, shape=shape, stride=stride)
    return part


def write_parts(folder: Path, tensors: Mapping[str, Tensor], ranks: Ranks) -> None:
    """Write the parts that the ranks hold of some tensors; all ranks together.

    Args:
        folder: is created in one that rank 0 has made; on a file system that all ranks see.
        tensors: name → DTensor.

    Raises:
        OSError: writing failed, on any rank.
        WorkerError: a rank is gone.
    """
    content = _filled(tensors)

    def work(group: dist.ProcessGroup | None) -> None:
        dist.barrier(group)  # rank 0 has made the folder that holds `folder`
        save(content, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True), process_group=group)

    with _causes():
        ranks.watched(work)


def read_parts(folder: Path, tensors: Mapping[str, Tensor], ranks: Ranks) -> None:
    """Fill some tensors from files that any number of ranks have written; all ranks together.

    Args:
        tensors: name → DTensor, of which this rank's part is filled; or a plain tensor, which is filled as a whole.

    Raises:
        RuntimeError, ValueError: tensors are missing, or of another shape.
        WorkerError: a rank is gone.
    """
    content = _filled(tensors)
    with _causes():
        ranks.watched(
            lambda group: load(
                content,
                storage_reader=HuggingFaceStorageReader(str(folder)),
                process_group=group,
                no_dist=group is None,
            )
        )


def _filled(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of which this rank holds rows; of small ones there may be fewer rows than ranks."""
    return {name: t for name, t in tensors.items() if not isinstance(t, DTensor) or t.to_local().numel()}


@contextmanager
def _causes() -> Iterator[None]:
    """Raise the first error of a rank instead of torch's collection of errors."""
    try:
        yield
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from error
