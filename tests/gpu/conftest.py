"""What only a CUDA device can show. Without one each test is skipped."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="session")
def cuda() -> torch.device:
    """The device."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device("cuda", 0)


@pytest.fixture
def exact_products(cuda: torch.device) -> Iterator[None]:
    """float32 is multiplied as float32, as on the CPU, and not in TF32."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "set_float32_matmul_precision", lambda _: None)
        patch.setattr(torch.backends.cudnn, "allow_tf32", False)
        yield
