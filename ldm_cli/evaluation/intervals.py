"""Standard errors and 95 % intervals of statistics of sets of pictures."""

from __future__ import annotations

from collections.abc import Sequence

NUM_GROUPS = 10
"""Groups of a jackknife."""

STUDENT_QUANTILE = 2.262
"""97.5 % of Student's t with NUM_GROUPS − 1 degrees of freedom."""
NORMAL_QUANTILE = 1.960
"""97.5 % of the normal distribution."""


def jackknife(differences: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Bias and standard error of a statistic by the jackknife that leaves out one of G groups.

    Sources: Quenouille 1956, doi:10.2307/2332914 (bias); Tukey 1958, doi:10.1214/aoms/1177706647 (variance); of
    several independent sets, both add up (Arvesen 1969, doi:10.1214/aoms/1177697287).

    Args:
        differences: for each set and each group, the statistic without this group minus that of all.
    """
    bias, variance = 0.0, 0.0
    for group in differences:
        mean = sum(group) / len(group)
        bias += (len(group) - 1) * mean
        variance += (len(group) - 1) / len(group) * sum((difference - mean) ** 2 for difference in group)
    return bias, variance**0.5


def interval(value: float, standard_error: float, quantile: float = STUDENT_QUANTILE) -> list[float]:
    """Both ends of the 95 % interval around a value, whose standard error is that of `NUM_GROUPS` groups or more."""
    return [value - quantile * standard_error, value + quantile * standard_error]


def share_interval(share: float, count: int) -> list[float]:
    """Both ends of the 95 % interval of a share of `count` trials (Wilson 1927, doi:10.1080/01621459.1927.10502953)."""
    z = NORMAL_QUANTILE
    middle = share + z**2 / (2 * count)
    spread = z * (share * (1 - share) / count + z**2 / (4 * count**2)) ** 0.5
    return [(middle + sign * spread) / (1 + z**2 / count) for sign in (-1, 1)]
