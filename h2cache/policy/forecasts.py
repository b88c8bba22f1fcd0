"""What stands in for skipped features: a polynomial in the steps since they were last computed.

Order 0 is plain reuse of what was last computed. Higher orders extrapolate with divided differences of the features F
at the computed steps: `D_0 = F`, `D_{k+1} = (D_k - previous D_k) / (i - previous i)`. The bases differ only in the
coefficients of D_k at x steps ahead (Taylor: arXiv 2503.06923; scaled Hermite: arXiv 2508.16984, eq. of dual
scaling). Coefficients are plain floats, computed once a step.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Features = tuple[Tensor, ...]  # what is forecast together: the two streams of a stage, or the outputs of a module


class Forecast(Protocol):
    """A basis. `first_difference`: the computed step at which differences begin to be taken; 0: as soon as they can."""

    @property
    def order(self) -> int: ...

    @property
    def first_difference(self) -> int: ...

    def coefficients(self, x: int) -> list[float]:
        """Those of D_0 .. D_order at x steps ahead."""


class FittedForecast(Forecast, Protocol):
    """A basis that learns during a run from how it would have forecast what is being computed."""

    def fitted(self, products: list[list[float]], x: int) -> Forecast:
        """The basis to go on with.

        `products` are the inner products of newly computed features and of `D_0 .. D_order` as they were x steps
        before, in this order.
        """


@dataclass(frozen=True)
class Taylor:
    """`sum_k D_k x^k / k!`; order 0 reuses what was last computed."""

    order: int = 0
    first_difference: int = 0

    def coefficients(self, x: int) -> list[float]:
        return [x**k / math.factorial(k) for k in range(self.order + 1)]


@dataclass(frozen=True)
class ScaledTaylor:
    """`sum_k sigma^(2k) D_k x^k / k!`: HiCache's ablation, its dual scaling on the monomials."""

    order: int = 1
    sigma: float = 0.5
    first_difference: int = 0

    def coefficients(self, x: int) -> list[float]:
        return [(self.sigma**2 * x) ** k / math.factorial(k) for k in range(self.order + 1)]


@dataclass(frozen=True)
class Hermite:
    """`F + sum_{n>=1} D_n / n! * sigma^n H_n(sigma x)` with the physicists' polynomials H_n, at +x.

    The differences run forward in step index, so the basis must be evaluated ahead: at -x it would extrapolate
    backwards.
    """

    order: int = 1
    sigma: float = 0.5
    first_difference: int = 0

    def coefficients(self, x: int) -> list[float]:
        argument = self.sigma * x
        hermite = [1.0, 2 * argument]
        for n in range(1, self.order):
            hermite.append(2 * argument * hermite[n] - 2 * n * hermite[n - 1])
        return [self.sigma**n * hermite[n] / math.factorial(n) for n in range(self.order + 1)]


@dataclass(frozen=True)
class BackcastHermite(Hermite):
    """Scaled Hermite whose sigma the run itself chooses, at each computed step; until then it is `sigma`.

    The sigma that would have forecast the newest computed features best, in least squares with the differences that
    were there before, is right for a whole interval ahead. Most forecasts are made nearer by, where a difference still
    tells more: the geometric mean with sqrt(1/2), at which order 1 carries a difference on unchanged, is used. The
    paper gives no rule; docs/methods.md has the measurements.
    """

    def fitted(self, products: list[list[float]], x: int) -> Forecast:
        def error(sigma: float) -> float:
            weights = [1.0, *(-c for c in Hermite(self.order, sigma).coefficients(x))]
            return sum(a * b * products[i][j] for i, a in enumerate(weights) for j, b in enumerate(weights))

        best = min((percent / 100 for percent in range(1, 100)), key=error)
        if not math.isfinite(error(best)):
            return self
        return Hermite(self.order, math.sqrt(best * math.sqrt(0.5)), self.first_difference)


def inner_products(vectors: Sequence[Features]) -> Tensor:
    """(K, K) float32 inner products of K lists of tensors, each list taken as one long vector."""
    rows = [
        torch.stack([sum((a.float() * b.float()).sum() for a, b in zip(v, w, strict=True)) for w in vectors])
        for v in vectors
    ]
    return torch.stack(rows)


def advance_terms(terms: list[Features], computed: Features, elapsed: int, order: int) -> list[Features]:
    """The differences `D_0 .. D_order` after newly computed features, `elapsed` steps after those of `terms`.

    There is one term more than before, up to the order: a difference needs two computed values.
    """
    fresh = [tuple(computed)]
    for old in terms[:order]:
        difference = torch._foreach_sub(fresh[-1], old)
        if elapsed != 1:
            torch._foreach_div_(difference, elapsed)
        fresh.append(tuple(difference))
    return fresh


def extrapolate(
    terms: list[Features], coefficients: list[float], base: Features | None = None, into: Features | None = None
) -> Features:
    """`base + sum_k coefficients[k] * terms[k]` in the features' dtype; without a base, D_0 is it (its coefficient is 1
    in every basis). Written into the tensors `into`, where they are given with a base.

    One multi-tensor operation a term, so that each cached tensor is read once. With no base and order 0 the cached
    tensors themselves are returned.
    """
    if base is None:
        base, terms, coefficients = terms[0], terms[1:], coefficients[1:]
    total: Sequence[Tensor] = base
    for coefficient, term in zip(coefficients, terms, strict=False):
        if total is not base:
            torch._foreach_add_(total, term, alpha=coefficient)
        elif into is None:
            total = torch._foreach_add(base, term, alpha=coefficient)
        else:
            total = [
                torch.add(part, added, alpha=coefficient, out=place)
                for part, added, place in zip(base, term, into, strict=True)
            ]
    return tuple(total)
