"""Which device a rank takes, as torchrun, Slurm or a pod's manifest tells it."""

from __future__ import annotations

import pytest
import torch

from ldm_cli.cli.launch import warn_of_copies
from ldm_cli.errors import UsageError
from ldm_cli.reporting import SilentReporter
from ldm_cli.training.distributed import joined, local_rank

_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_LOCALID", "SLURM_NTASKS", "SLURM_STEP_NUM_TASKS")
_NAMES += ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


def _set(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    for name in _NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("environment", "num_devices", "expected"),
    [
        ({"RANK": "3", "WORLD_SIZE": "4"}, 1, 0),  # four pods with a device each
        ({"RANK": "5", "WORLD_SIZE": "8"}, 4, 1),  # two machines with four devices each
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "3"}, 4, 3),
        ({"RANK": "5", "WORLD_SIZE": "8", "SLURM_LOCALID": "2"}, 4, 2),
        ({"RANK": "5", "WORLD_SIZE": "8", "SLURM_LOCALID": "2"}, 1, 0),  # srun --gpus-per-task=1
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "SLURM_LOCALID": "2"}, 4, 1),
        ({"RANK": "1", "WORLD_SIZE": "2"}, 0, 1),
        ({}, 4, 0),
    ],
)
def test_the_local_rank_is_told_or_fits_the_devices(
    environment: dict[str, str], num_devices: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    _set(monkeypatch, environment)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_devices)
    assert local_rank() == expected


class _Listening(SilentReporter):
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, message: str) -> None:
        self.warnings.append(message)


@pytest.mark.parametrize(
    ("environment", "num_warnings"),
    [
        ({"SLURM_NTASKS": "2"}, 1),
        ({"SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "4"}, 1),
        ({"SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1"}, 0),
        ({"SLURM_NTASKS": "1"}, 0),
        ({"SLURM_NTASKS": "2", "RANK": "0", "WORLD_SIZE": "2"}, 0),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, 1),
        ({"PMI_SIZE": "4"}, 1),
        ({"PMI_SIZE": "4", "SLURM_STEP_NUM_TASKS": "1"}, 0),
        ({"OMPI_COMM_WORLD_SIZE": "2", "RANK": "0", "WORLD_SIZE": "2"}, 0),
        ({}, 0),
    ],
)
def test_copies_that_slurm_or_mpi_starts_and_nothing_joins_are_told_of(
    environment: dict[str, str], num_warnings: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    _set(monkeypatch, environment)
    reporter = _Listening()
    warn_of_copies(reporter)
    assert len(reporter.warnings) == num_warnings


@pytest.mark.parametrize(
    "address",
    [
        {"MASTER_PORT": "tcp://10.0.0.1:29500"},
        {"MASTER_PORT": "29500.0"},
        {"MASTER_PORT": "70000"},
        {"MASTER_PORT": ""},
        {"MASTER_PORT": "-1"},
        {"MASTER_ADDR": "tcp://10.0.0.1"},
        {"MASTER_ADDR": "10.0.0.1:29500"},
        {"MASTER_ADDR": ""},
    ],
)
def test_an_address_that_is_none_is_named(address: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    _set(monkeypatch, {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", **address})
    ((name, value),) = address.items()
    with pytest.raises(UsageError, match=f"{name}={value}") as caught, joined(torch.device("cpu"), 1.0):
        pass
    assert caught.value.code == 2
