"""Comparisons of rows over seeds: a pooled fit, intervals, Holm's adjustment and the words of the rules.

docs/results/rules.md states the rules.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from odeadv.support.extras import extra

with extra("train"):
    import numpy as np

#: The probability outside a 95 % interval, on each side.
TAIL = 0.025
# Differences and intervals keep this number of decimals; p-values keep this number of significant digits.
DIGITS = 9


def t_quantile(df: float) -> float:
    """Return the two-sided 95 % quantile of Student's t with ``df`` degrees of freedom.

    With ``df = inf`` it is the quantile of the normal distribution.
    """
    with extra("evaluate"):
        from scipy.special import ndtri, stdtrit

    return float(-ndtri(TAIL) if math.isinf(df) else -stdtrit(df, TAIL))


def two_sided_p(t: float, df: float) -> float:
    """Return the two-sided p-value of a t statistic; ``df = inf`` gives the normal distribution."""
    with extra("evaluate"):
        from scipy.special import ndtr, stdtr

    return float(2 * (ndtr(-abs(t)) if math.isinf(df) else stdtr(df, -abs(t))))


@dataclass(frozen=True)
class Contrast:
    """One row minus another, with its error.

    Attributes:
        mean: the difference.
        half: half the width of the 95 % interval; None without degrees of freedom and without an error of the images.
        p: two-sided p-value of the hypothesis that the difference is 0; None if ``half`` is None.
        df: degrees of freedom of the pooled residual.
        by_images: True if the sampling error of the test images sets the interval; False if the seeds set it.
    """

    mean: float
    half: float | None
    p: float | None
    df: int
    by_images: bool = False

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval of the difference; None if ``half`` is None."""
        return None if self.half is None else (self.mean - self.half, self.mean + self.half)

    def __str__(self) -> str:
        interval = self.interval
        return f"{self.mean:+.2f}" if interval is None else f"{self.mean:+.2f} [{interval[0]:+.2f}, {interval[1]:+.2f}]"


class TwoWay:
    """The least-squares fit value = row + seed + residual, with one variance for all residuals.

    If every row has every seed, the difference of two rows is the difference of their means. The residual then has
    (rows - 1)(seeds - 1) degrees of freedom. Runs may be missing.

    Args:
        values: the values by row, then by seed.

    Raises:
        ValueError: if ``values`` is empty.
    """

    def __init__(self, values: Mapping[str, Mapping[int, float]]) -> None:
        self.rows = [row for row, by_seed in values.items() if by_seed]
        seeds = sorted({seed for by_seed in values.values() for seed in by_seed})
        cells = [(row, seed, value) for row in self.rows for seed, value in values[row].items()]
        if not cells:
            raise ValueError("values: got none, expected at least one run")
        # One column per row and one per seed. The first seed is left out, because the columns would be dependent.
        design = np.zeros((len(cells), len(self.rows) + len(seeds) - 1))
        for n, (row, seed, _) in enumerate(cells):
            design[n, self.rows.index(row)] = 1.0
            if seed != seeds[0]:
                design[n, len(self.rows) + seeds.index(seed) - 1] = 1.0
        y = np.array([value for _, _, value in cells])
        self._fit, _, rank, _ = np.linalg.lstsq(design, y, rcond=None)
        self._design = design
        self._inverse = np.linalg.pinv(design.T @ design)
        self.df = len(cells) - int(rank)
        residual = y - design @ self._fit
        self.variance = float(residual @ residual) / self.df if self.df else math.nan

    def contrast(self, row: str, other: str, floor: float = 0.0) -> Contrast | None:
        """Return ``row`` minus ``other``; None if no chain of common seeds connects the two rows.

        Args:
            row: name of the row.
            other: name of the row that is subtracted.
            floor: standard error that comes only from the sampling of the test images, see `image_error`; 0 if unknown.
        """
        if row not in self.rows or other not in self.rows:
            return None
        weights = np.zeros(self._design.shape[1])
        weights[self.rows.index(row)] += 1.0
        weights[self.rows.index(other)] -= 1.0
        # Without a chain of common seeds, the effect of the rows cannot be separated from the effect of the seeds.
        if not np.allclose(weights @ self._inverse @ (self._design.T @ self._design), weights, atol=1e-8):
            return None
        # The last bits of the fit depend on the processor. They are rounded away, so that pages have the same bytes on
        # every machine. (Accuracies are multiples of 1 / images, so differences often lie halfway between printed
        # digits.)
        mean = round(float(weights @ self._fit), DIGITS) + 0.0  # + 0.0 turns -0.0 into 0.0
        options = []
        if self.df:
            error = math.sqrt(self.variance * float(weights @ self._inverse @ weights))
            options.append((t_quantile(self.df) * error, error, float(self.df)))
        if floor > 0:  # the error comes from thousands of images, so use the normal distribution
            options.append((t_quantile(math.inf) * floor, floor, math.inf))
        if not options:
            return Contrast(mean, None, None, 0)
        half, error, df = max(options)
        if error == 0.0:
            p = 1.0 if mean == 0.0 else 0.0
        else:
            p = max(two_sided_p(mean / error, df) for _, error, df in options if error)
        return Contrast(mean, round(half, DIGITS), float(f"{p:.{DIGITS}g}"), self.df, by_images=math.isinf(df))


def image_error(outcomes: Sequence[Any], others: Sequence[Any]) -> float:
    """Return the standard error of a difference of accuracies (in %) that comes from the choice of the test images.

    Args:
        outcomes: per common seed of the two rows, the share of attacks that leave each image correct, (images,).
        others: the same shares for the other row, on the same images.
    """
    difference = np.mean([a - b for a, b in zip(outcomes, others, strict=True)], axis=0)
    return float(100 * difference.std(ddof=1) / math.sqrt(len(difference)))


def holm(ps: Sequence[float]) -> list[float]:
    """Return the p-values adjusted by Holm's method (Holm 1979).

    The hypotheses with adjusted p-values below 0.05 are rejected jointly at the 5 % level.
    """
    order = sorted(range(len(ps)), key=lambda n: ps[n])
    adjusted, highest = [0.0] * len(ps), 0.0
    for rank, n in enumerate(order):
        highest = max(highest, min(1.0, (len(ps) - rank) * ps[n]))
        adjusted[n] = highest
    return adjusted


def word(contrast: Contrast, p: float | None, paper: float | None, *, gain: float | None = None) -> str:
    """Return the word from the rules for a difference that the paper claims.

    Args:
        contrast: the difference in these runs.
        p: p-value of the difference, adjusted over the primary contrasts.
        paper: the paper's difference; None if the paper implies a positive difference but gives no number.
        gain: gain of the row over its baseline. If ``paper`` is None, half the gain is the limit for "absent".
    """
    if contrast.interval is None or p is None:
        return "undecided"
    low, high = contrast.interval
    if p < 0.05:
        if paper is None:
            return "confirmed" if contrast.mean > 0 else "opposite"
        if (contrast.mean > 0) != (paper > 0):
            return "opposite"
        return "confirmed" if low <= paper <= high else "sign only"
    size = abs(paper if paper is not None else gain or 0.0) / 2
    return "absent" if -size <= low and high <= size else "undecided"
