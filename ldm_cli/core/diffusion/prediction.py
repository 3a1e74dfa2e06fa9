"""What a network predicts, in one table: F = p x_0 + q ε, where x_t = a x_0 + b ε.

    type              p    q    d     prediction
    epsilon           0    1    a     ε (Ho et al. 2020, arXiv:2006.11239)
    v_prediction     −b    a    1     v = a ε − b x_0, if a² + b² = 1 (Salimans & Ho 2022, app. D, arXiv:2202.00512)
    sample            1    0    −b    x_0
    flow_prediction  −1    1    1     u = ε − x_0, if a + b = 1 (Lipman et al. 2023, arXiv:2210.02747)

F and x_t are two linear equations for x_0 and ε, with the determinant d = a q − b p:

    x_0 = (q/d) x_t − (b/d) F,   ε = (a/d) F − (p/d) x_t,   and at a known x_t   F − F̂ = −(d/b) (x_0 − x̂_0).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

Coefficient = float | Tensor
"""A number, or a tensor that broadcasts with the samples [B, …]."""


@dataclass(frozen=True)
class Prediction:
    """One prediction type.

    Attributes:
        name: as in a diffusers scheduler_config.json.
        coefficients: (a, b) → (p, q, d).
    """

    name: str
    coefficients: Callable[[Coefficient, Coefficient], tuple[Coefficient, Coefficient, Coefficient]]

    def target(self, x0: Tensor, noise: Tensor, a: Coefficient, b: Coefficient) -> Tensor:
        """F for x_0 and ε, both [B, …], at the level a, b."""
        p, q, _ = self.coefficients(a, b)
        return p * x0 + q * noise

    def x0(self, output: Tensor, x: Tensor, a: Coefficient, b: Coefficient) -> Tensor:
        """The clean sample x_0 that follows from a network output.

        Args:
            output, x: F and x_t, [B, …].
            a, b: the level of x_t.

        Raises:
            ValueError: a is the number 0 and the network predicts ε: x_0 is undetermined.
        """
        _, q, d = self.coefficients(a, b)
        if isinstance(d, float) and d == 0.0:
            raise ValueError(f"prediction type '{self.name}' at a={a}, b={b}: x_0 is undetermined")
        return (q / d) * x - (b / d) * output

    def epsilon(self, output: Tensor, x: Tensor, a: Coefficient, b: Coefficient) -> Tensor:
        """The noise ε that follows from a network output; arguments as in `x0`, and d not 0."""
        p, _, d = self.coefficients(a, b)
        return (a / d) * output - (p / d) * x

    def min_snr_weight(self, a: Tensor, b: Tensor, gamma: float) -> Tensor:
        """Weight on |F − F̂|² that puts min(SNR, γ) on |x_0 − x̂_0|² (Hang et al. 2023, eq. 6, arXiv:2303.09556).

        It is min(SNR, γ) (b/d)² = min(a², γ b²) / d²: 0 at zero signal, where it is undefined for ε.

        Args:
            a, b: levels, of one shape.
            gamma: γ.

        Returns:
            Weights of that shape.
        """
        return (a**2).minimum(gamma * b**2) / self.coefficients(a, b)[2] ** 2


EPSILON = Prediction("epsilon", lambda a, b: (0.0, 1.0, a))
V_PREDICTION = Prediction("v_prediction", lambda a, b: (-b, a, 1.0))
SAMPLE = Prediction("sample", lambda a, b: (1.0, 0.0, -b))
FLOW_PREDICTION = Prediction("flow_prediction", lambda a, b: (-1.0, 1.0, 1.0))
PREDICTIONS = {prediction.name: prediction for prediction in (EPSILON, V_PREDICTION, SAMPLE, FLOW_PREDICTION)}
"""The prediction types by name."""
