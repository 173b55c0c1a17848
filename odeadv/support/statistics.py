"""Confidence intervals and tests of accuracies. SciPy computes them, and is imported by the first call only."""

from __future__ import annotations

import functools

from odeadv.support.extras import extra


@functools.lru_cache(maxsize=4096)  # a report asks for the same counts again and again
def wilson_interval(correct: int, n: int) -> tuple[float, float]:
    """Return the ends of the 95 % Wilson score interval of the accuracy ``correct / n``, ``n`` >= 1 (Wilson 1927)."""
    with extra("evaluate"):
        from scipy.stats import binomtest

    # At this p the test's own p-value, which nobody reads, needs no search; the interval does not depend on p.
    low, high = binomtest(correct, n, correct / n).proportion_ci(confidence_level=0.95, method="wilson")
    return float(low), float(high)


def exact_p_value(b: int, c: int) -> float:
    """Return the two-sided p-value of the exact binomial test that ``b`` and ``c`` are the counts of a fair coin."""
    with extra("evaluate"):
        from scipy.stats import binomtest

    return float(binomtest(min(b, c), b + c, 0.5).pvalue) if b + c else 1.0
