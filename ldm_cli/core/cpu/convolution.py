"""Convolutions without gradients whose results do not depend on the batch.

torch chooses among several algorithms by the number of rows, and each adds in an order of its own: all 3×3 convolutions
of one row, many 1×1 convolutions of any number (torch 2.13). The operator that torch.compile calls always takes
oneDNN's own choice, which is the same for every number of rows; see `sampling/fixed_rows.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ldm_cli.core.cpu.linear import is_plain


class TunedConv2d(nn.Conv2d):
    """A convolution of the same algorithm for every number of rows."""

    def forward(self, input: Tensor) -> Tensor:
        """[B, C, H, W] → [B, O, H', W']."""
        is_usual = input.ndim == 4 and self.padding_mode == "zeros" and not isinstance(self.padding, str)
        if torch.is_grad_enabled() or not is_plain(input) or not is_usual:
            return super().forward(input)
        result: Tensor = torch.ops.mkldnn._convolution_pointwise(
            input, self.weight, self.bias, self.padding, self.stride, self.dilation, self.groups, "none", [], ""
        )
        return result
