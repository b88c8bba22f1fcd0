"""What stands in for a skipped stage: a polynomial in the steps since the stage was last computed.

Order 0 is plain reuse of the last residual. Higher orders extrapolate with divided differences of the residuals at
the computed steps: `D_0 = F`, `D_{k+1} = (D_k - previous D_k) / (i - previous i)`. The bases differ only in the
coefficients of D_k at x steps ahead (Taylor: arXiv 2503.06923; scaled Hermite: arXiv 2508.16984, eq. of dual
scaling).
"""

import math
from dataclasses import dataclass

import torch

from .streams import Streams


@dataclass(frozen=True)
class Taylor:
    """`sum_k D_k x^k / k!`; order 0 reuses the last residual."""

    order: int = 0

    def coefficients(self, x: int) -> list[float]:
        return [x**k / math.factorial(k) for k in range(self.order + 1)]


@dataclass(frozen=True)
class Hermite:
    """`F + sum_{n>=1} D_n / n! * sigma^n H_n(sigma x)` with the physicists' polynomials H_n, at +x.

    The differences run forward in step index, so the basis must be evaluated ahead: at -x it would extrapolate
    backwards.
    """

    order: int = 1
    sigma: float = 0.5

    def coefficients(self, x: int) -> list[float]:
        argument = self.sigma * x
        hermite = [1.0, 2 * argument]
        for n in range(1, self.order):
            hermite.append(2 * argument * hermite[n] - 2 * n * hermite[n - 1])
        return [self.sigma**n * hermite[n] / math.factorial(n) for n in range(self.order + 1)]


Forecast = Taylor | Hermite


def advance_terms(terms: list[Streams], residual: Streams, steps: int, order: int) -> list[Streams]:
    """The differences `D_0 .. D_order` after a new computed residual, `steps` after the one that `terms` belong to.

    There is one term more than before, up to the order: a difference needs two computed values.
    """
    fresh = [residual]
    for old in terms[:order]:
        fresh.append(Streams(*((new - last) / steps for new, last in zip(fresh[-1], old, strict=True))))
    return fresh


def add_forecast(streams: Streams, terms: list[Streams], coefficients: list[float]) -> Streams:
    """`streams + sum_k coefficients[k] * terms[k]`, in the streams' dtype, one fused call a term."""
    total: list | tuple = streams
    for coefficient, term in zip(coefficients, terms, strict=False):
        total = torch._foreach_add(total, term, alpha=coefficient)
    return Streams(*total)
