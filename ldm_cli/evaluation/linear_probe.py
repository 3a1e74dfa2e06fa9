"""A linear probe: logistic regression on the features of a frozen model."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_STEPS_PER_DECADE = 8
_DECADES = 6  # on both sides of 1
_FIRST_STEP = 16
_HELD_OUT_EVERY = 5
_MAX_ITERATIONS = 1000


def linear_probe(features: Tensor, labels: Tensor, test_features: Tensor, test_labels: Tensor) -> dict[str, float]:
    """Accuracy on a test set of the classifier that is fitted to training features.

    Source: Radford et al. 2021, arXiv:2103.00020, appendix A.3. The weight of the L2 penalty is the best on every fifth
    training sample, of 97 from 1e-6 to 1e6, found as there: seven of them first, then ever closer to the best. With it,
    the classifier is fitted to all training samples.

    Args:
        features, test_features: float [N, D], [M, D].
        labels, test_labels: int64 [N], [M], classes from 0; N at least 2, M at least 1.

    Returns:
        `top1`; `per_class`: the mean over the classes of the test set; `l2`, the weight of the penalty; `num_train`.
    """
    features, test_features = features.double(), test_features.double()
    held_out = torch.arange(len(labels)) % _HELD_OUT_EVERY == 0
    num_classes = int(torch.cat((labels, test_labels)).max()) + 1
    accuracy: dict[int, float] = {}

    def accuracy_at(exponent: int) -> float:
        if exponent not in accuracy:
            l2 = 10 ** (exponent / _STEPS_PER_DECADE)
            weight, bias = fit_logistic(features[~held_out], labels[~held_out], num_classes, l2)
            predicted = (features[held_out] @ weight.T + bias).argmax(1)
            accuracy[exponent] = float((predicted == labels[held_out]).double().mean())
        return accuracy[exponent]

    end, step = _DECADES * _STEPS_PER_DECADE, _FIRST_STEP
    best = max(range(end, -end - 1, -step), key=accuracy_at)
    while step > 1:
        step //= 2
        best = max((best, min(best + step, end), max(best - step, -end)), key=accuracy_at)
    l2 = 10 ** (best / _STEPS_PER_DECADE)
    weight, bias = fit_logistic(features, labels, num_classes, l2)
    right = ((test_features @ weight.T + bias).argmax(1) == test_labels).double()
    per_class = torch.stack([right[test_labels == label].mean() for label in torch.unique(test_labels)])
    return {"top1": float(right.mean()), "per_class": float(per_class.mean()), "l2": l2, "num_train": len(labels)}


def fit_logistic(features: Tensor, labels: Tensor, num_classes: int, l2: float) -> tuple[Tensor, Tensor]:
    """The minimum of Σ cross entropy + l2 / 2 · |W|², by L-BFGS. The bias is not penalised.

    Args:
        features: float64 [N, D].
        labels: int64 [N] in [0, C).
        num_classes: C.
        l2: weight of the penalty, the inverse of scikit-learn's C.

    Returns:
        W float64 [C, D], bias float64 [C].
    """
    weight = torch.zeros(num_classes, features.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(num_classes, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=_MAX_ITERATIONS,
        tolerance_grad=1e-6,
        tolerance_change=1e-10,
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        optimizer.zero_grad()
        # Divided by N, which leaves the minimum where it is and makes the tolerances fit every N.
        loss = F.cross_entropy(features @ weight.T + bias, labels) + l2 / (2 * len(labels)) * weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    with torch.enable_grad():
        optimizer.step(objective)  # type: ignore[no-untyped-call]
    return weight.detach(), bias.detach()
