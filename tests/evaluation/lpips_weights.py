"""Weights for LPIPS as the two published files hold them: numbers of an integer hash."""

from __future__ import annotations

from torch import Tensor

from ldm_cli.core.models.lpips import LPIPS, LPIPSBackbone
from ldm_cli.formats.model_folder import without_weights
from tests.evaluation.inception_weights import uniform


def lpips_weights(backbone: LPIPSBackbone) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The classifier's tensors and the heads': signals keep their size, heads are not negative."""
    with without_weights():
        shapes = {name: tensor.shape for name, tensor in LPIPS(backbone).state_dict().items()}
    classifier, heads = dict[str, Tensor](), dict[str, Tensor]()
    for name, shape in shapes.items():
        values = uniform(name, shape.numel()).view(shape)
        if name.startswith("lin"):
            heads[name] = values.abs()
        else:
            classifier[name] = values * (6 / shape[1:].numel()) ** 0.5 if len(shape) > 1 else 0.1 * values
    return classifier, heads
